"""How models are named in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def model_name(model: str) -> str:
    """Return "the base" or "step 300" for an id of comparison.py."""
    return "the base" if model == "base" else model.replace("-", " ")


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
