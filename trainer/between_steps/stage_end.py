"""Ends a stage whose held-out loss has stopped falling, says when a run over-fits, and begins stages from the best.

All of it is decided from the validations in metrics.jsonl, which a resume cuts to its checkpoint's step, and recorded
in the checkpoint's position: a run that is killed and resumed decides as one that goes on.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from safelight.data.atomic import atomic_write_text
from safelight.text import counted
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.config.timeline import Timeline, stage_records
from safelight.trainer.loading.job import Job
from safelight.trainer.metrics.over_fitting import (
    CONFIDENCE,
    NUM_SMOOTHED,
    Curve,
    OverFitting,
    Wait,
    combined,
    doubt,
    over_fitting,
    relative,
    smoothed,
    wait_of,
)
from safelight.untrusted import path_in, read_json_object

OVER_FITTING = "over-fitting"
ENDED_EARLY = "stage ended early"
# where patience ends a stage without a warning: if chance is likelier to explain the rise than this, none is mentioned
MOST_DOUBT = 0.2
# a smaller change of a loss is shown as none
MIN_SHOWN = 0.0005


def watch(job: Job, position: Position) -> Position:
    """Judge the validations of the present stage after one; return the position, with the stage ended if that is due.

    Logs the first over-fitting of a stage, and the end that its patience brings.
    """
    stage = position.stage
    if any(stage == ended for ended, _ in position.ended):
        return position
    curve = stage_curve(job, position)
    found = over_fitting(curve)
    if found is not None and all(over_fitting(curve.upto(num)) is None for num in range(1, len(curve))):
        _log(job, position, OVER_FITTING, _describe(job, position, found))
    settings = job.timeline.stages[stage].config.validate_
    is_last = position.step >= job.timeline.num_steps or position.epoch >= job.timeline.first_epoch(stage + 1)
    if not settings.patience or is_last:
        return position
    wait = wait_of(curve, settings.min_gain)
    if wait is None or wait.epochs < settings.patience:
        return position
    return _end_stage(job, position, f"{describe_wait(curve, wait)}{possibly(curve)}")


def stage_curve(job: Job, position: Position) -> Curve:
    """Return the validations of the present stage: the first is that of the weights which it began with."""
    metrics, first_epoch = job.progress.metrics, job.timeline.first_epoch(position.stage)
    began = job.timeline.steps_before(first_epoch)
    both = metrics.by_band["held_out"].keys() & metrics.by_band["train_subset"].keys()
    before = [step for step in both if step <= began]
    start = position.began_from if position.began_from in both else max(before, default=None)
    steps = sorted(step for step in both if began < step <= position.step)
    epochs = [metrics.epochs[step] for step in steps]
    if start is not None:
        steps, epochs = [start, *steps], [float(first_epoch), *epochs]
    held_out, subset = ([metrics.by_band[split][step] for step in steps] for split in ("held_out", "train_subset"))
    if len({len(bands) for bands in (*held_out, *subset)}) > 1:
        # validate.timesteps has changed on a resume: losses before it are of other ranges
        num = next(i for i in range(len(steps), 0, -1) if len(held_out[i - 1]) != len(held_out[-1]))
        epochs, held_out, subset = epochs[num:], held_out[num:], subset[num:]
    return Curve.of(epochs, held_out, subset)


def _describe(job: Job, position: Position, found: OverFitting) -> str:
    num_bands = job.timeline.stages[position.stage].config.validate_.timesteps
    ranges = [f"{100 * band / num_bands:.0f}-{100 * (band + 1) / num_bands:.0f} %" for band in found.bands]
    where = f" (most in {', '.join(ranges)} of the noise schedule)" if 0 < len(ranges) < num_bands else ""
    best = f"; the best checkpoint, of step {position.best_step}, is kept" if position.best_step > 0 else ""
    early, late = found.between
    turned = f"epoch {found.epoch:g}"
    if early < late:
        turned += f" ({100 * CONFIDENCE:.0f} % sure: between epochs {early:g} and {late:g})"
    return (
        f"the run over-fits: held-out loss has risen by {100 * found.rise:.1f} % since {turned}{where}, "
        "while that on training photographs has not; the gap between them has opened since then, from "
        f"{found.gap_then:.4f} to {found.gap_now:.4f}{best}"
    )


def describe_wait(curve: Curve, wait: Wait) -> str:
    """Return what was measured of a held-out loss that has not become better for some time."""
    trained = smoothed(combined(relative(curve.subset)))
    moved = [_moved(wait.change), _moved(float(trained[-1] / trained[wait.since] - 1))]
    epochs = f"{wait.epochs:g} {'epoch' if wait.epochs == 1 else 'epochs'}"
    return (
        f"held-out loss, the mean of {NUM_SMOOTHED} validations, last became better at epoch "
        f"{curve.epochs[wait.since]:g}, and has not in {counted(wait.num_validations, 'validation')} ({epochs}) "
        f"since; it {moved[0]}, and that on training photographs {moved[1]}"
    )


def _moved(change: float) -> str:
    """Return how a loss has changed by a fraction."""
    if abs(change) < MIN_SHOWN:
        return "has not changed"
    return f"has {'fallen' if change < 0 else 'risen'} by {100 * abs(change):.1f} %"


def possibly(curve: Curve) -> str:
    """Return that a stage may over-fit and how sure that is, '' if there is little sign of it or it has been said."""
    chance = doubt(curve)
    if chance > MOST_DOUBT or any(over_fitting(curve.upto(num)) for num in range(1, len(curve) + 1)):
        return ""
    runs = math.ceil(100 * chance)
    return (
        f"; it may over-fit ({100 - runs} % sure, too little for a warning: without over-fitting, validations that "
        f"scatter as these do end in so clear a rise in at most {runs} of 100 runs)"
    )


def _end_stage(job: Job, position: Position, why: str) -> Position:
    """Return the position with the present stage ended, after telling so and changing the run's timeline."""
    stage, stages = position.stage, job.timeline.stages
    settings, planned = stages[stage].config.validate_, stages[stage].epochs
    done = position.epoch - job.timeline.first_epoch(stage)
    ended = [*position.ended, (stage, done)]
    if settings.patience_ends == "run":
        ended += [(later, 0) for later in range(stage + 1, len(stages))]
    position = replace(position, ended=tuple(ended))
    what = "the run" if settings.patience_ends == "run" or stage == len(stages) - 1 else f"stage {stage + 1}"
    detail = f"{what} ends after {counted(done, 'epoch')} of {planned} (validate.patience {settings.patience}): {why}"
    _log(job, position, ENDED_EARLY, detail)
    job.timeline = Timeline.of(job.run.user_config, job.dataset.train, position.ended)
    job.progress.follow(job.timeline)
    if job.world.is_main:
        record_stages(job.run.run_dir, job.timeline)
    return position


def _log(job: Job, position: Position, event: str, detail: str) -> None:
    line = f"step {position.step}: {detail}"
    job.progress.terminal.say(line)
    epoch = job.progress.epoch_fraction(position)
    job.progress.metrics.write("event", position.step, event=event, detail=detail, stage=position.stage, epoch=epoch)


def record_stages(run_dir: Path, timeline: Timeline) -> None:
    """Replace the stages in a run's data.json; the next start of the run writes it anew."""
    path = path_in(run_dir, "data.json")
    try:
        record = read_json_object(path)
    except (OSError, ValueError):
        return
    record["stages"] = stage_records(timeline)
    atomic_write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
