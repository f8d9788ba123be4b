"""Which checkpoint to use, and why: as the evaluation suggests, else as far as held-out loss can tell."""

from __future__ import annotations

import shlex

from safelight.trainer.report.facts import best_validation, format_epoch
from safelight.trainer.report.markup import Markup, join, shorten, tag
from safelight.trainer.report.run_reader import RunFolder, num_held_out
from safelight.trainer.report.trained import adapter_of_run
from safelight.trainer.report.verdicts import disagreement

TITLE = "Which epoch is best?"


def best_section(run: RunFolder) -> Markup:
    """Return the checkpoint to use with its reasons: the evaluation's suggestion, else what held-out loss tells."""
    suggestion = run.evaluation.suggestion if run.evaluation else None
    if suggestion:
        step = int(suggestion.model.removeprefix("step-")) if suggestion.model != "base" else None
        reasons = [tag("li", shorten(reason, 400)) for reason in suggestion.reasons]
        body = join(
            tag("p", shorten(suggestion.sentence, 1000), class_="lead"),
            tag("ul", reasons) if reasons else None,
            tag("p", against) if (against := disagreement(run, run.evaluation, suggestion.model)) else None,
            _export(run, step),
        )
    else:
        body = _by_loss_alone(run)
    return tag("section", tag("h2", TITLE), body, id="best")


def _by_loss_alone(run: RunFolder) -> Markup:
    held_out = run.metrics.validation["held_out"]
    best, trained = best_validation(held_out), [point for point in held_out if point.step]
    if best is None or not trained:
        text = (
            "Held-out loss was not measured after training began, so only the pictures below can tell. "
            "(The setting validate.every_epochs turns validation on.)"
        )
        return tag("p", text)
    evaluate = join(
        tag("code", "safelight evaluate RUN"), " looks at pictures of every checkpoint as well and suggests one."
    )
    if best.step == 0:
        text = "By held-out loss alone, none is better than the model it started from. "
        return tag("p", text, evaluate)
    if num_held_out(run) == 1:
        text = "A single held-out photograph was too little to find the best epoch by. "
        return tag("p", text, evaluate)
    is_last = best.step == held_out[-1].step
    end = " That is the last one measured: the best may lie beyond it." if is_last else ""
    text = (
        f"By held-out loss alone, epoch {format_epoch(best.epoch)} (step {best.step:,}, loss {best.loss:.4f}).{end} "
        "Loss averages over all noise levels and does not see burnt colours or copied photographs. "
    )
    return join(tag("p", text, evaluate), _export(run, best.step))


def _export(run: RunFolder, step: int | None) -> Markup | None:
    if not step:
        return None
    if not (run.path / "checkpoints" / f"step-{step:08d}").is_dir():
        return tag("p", f"Its checkpoint (step {step:,}) is no longer in the run folder.", class_="note")
    name = shlex.quote(f"{run.name}-step{step}.safetensors")
    command = tag("code", f"safelight export RUN --checkpoint {step} -o {name}")
    is_lora = adapter_of_run(run.config).is_scalable
    kohya = join("; for A1111, Forge and ComfyUI with ", tag("code", "--layout kohya")) if is_lora else None
    return tag("p", "To use it: ", command, kohya, class_="note")
