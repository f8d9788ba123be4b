"""How models are named in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.trainer.report.comparison import ComparedModel
from safelight.trainer.report.facts import format_epoch
from safelight.trainer.report.figures import show_p


def names_of(models: Sequence[ComparedModel]) -> dict[str, str]:
    """Return "the base" or "epoch 27" for the id of each model; "step 300" where two were saved in one epoch."""
    epochs = [format_epoch(model.epoch) for model in models]
    return {
        model.id: f"epoch {epoch}" if model.step and epochs.count(epoch) == 1 else model_name(model.id)
        for model, epoch in zip(models, epochs, strict=True)
    }


def model_name(model: str) -> str:
    """Return "the base" or "step 300" for an id of comparison.py."""
    return "the base" if model == "base" else model.replace("-", " ")


def said_p(p: float) -> str:
    """Return a p-value as people write it: "p 0.02", "p < 0.001"."""
    return f"p {show_p(p)}"


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
