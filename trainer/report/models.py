"""What the report calls the models of comparisons and evaluations, and the checkpoint that it puts forward."""

from __future__ import annotations

from collections.abc import Collection

from safelight.trainer.report.facts import best_validation, format_epoch
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder


def name_of(run: RunFolder, model_id: str) -> str:
    """Return a model's name for people: "base model", "epoch 27", or "step 300" where the epoch is unknown."""
    if model_id == BASE:
        return "base model"
    epoch = epochs_of(run).get(model_id)
    return f"epoch {format_epoch(epoch)}" if epoch else model_id.replace("-", " ")


def epochs_of(run: RunFolder) -> dict[str, float]:
    """Return the epoch of every model that a record names; 0 of the base."""
    models = [*(run.comparison.models if run.comparison else ()), *(run.evaluation.models if run.evaluation else ())]
    logged = {f"step-{point.step}": point.epoch for point in run.metrics.validation["held_out"]}
    sampled = {f"step-{sample.step}": sample.epoch for sample in run.samples if sample.epoch >= 0}
    return sampled | logged | {model.id: model.epoch for model in models if model.epoch or model.id == BASE}


def is_suggested(run: RunFolder, model_id: str) -> bool:
    """Whether the evaluation suggests this checkpoint."""
    suggestion = run.evaluation.suggestion if run.evaluation else None
    return suggestion is not None and suggestion.model == model_id


def put_forward(run: RunFolder, ids: Collection[str]) -> str | None:
    """Return the checkpoint to show first: the suggested one, else that of lowest held-out loss, else the last."""
    trained = [model for model in ids if model != BASE]
    best = best_validation(run.metrics.validation["held_out"])
    suggestion = run.evaluation.suggestion if run.evaluation else None
    for wanted in (suggestion and suggestion.model, best and f"step-{best.step}"):
        if wanted in trained:
            return wanted
    return max(trained, key=lambda model: int(model.removeprefix("step-")), default=None)
