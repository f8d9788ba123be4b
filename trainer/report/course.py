"""Where a run's stages began, the learning rate of every step, and how it ended, from settings and log together.

Only every log.every_steps-th step is logged. The settings give all of them, but may have changed when the run was
resumed, so they are used only where they agree with the log.
"""

import math
import re
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from safelight.trainer.config.schema import ResolvedStage
from safelight.trainer.config.timeline import StageSteps, Timeline
from safelight.trainer.config.toml import parse_config
from safelight.trainer.registry.schedules import corner_steps
from safelight.trainer.report.facts import Ending, Verdict, evenly_chosen, format_epoch, over_fitting_verdict
from safelight.trainer.report.run_reader import Metrics, RunFolder, number, rows_of, table_of

MAX_STEPS_A_STAGE = 600
# more are a mistake in the run's data.json
MAX_STEPS_AN_EPOCH = 10**9
# finding a step's stage looks at every stage before it
MAX_LOOK_UPS = 5_000_000
# epochs are logged to six digits
EPOCH_TOLERANCE = 1e-5


def stage_starts(run: RunFolder) -> list[tuple[float, int]]:
    """Return (epoch, stage) for the start of every stage after the first; the epoch is that of the step before it.

    Taken from the settings if they agree with the log, else from the log alone.
    """
    first_steps = _first_steps(run.metrics)
    stages, epochs = run.metrics.train["stage"], run.metrics.train["epoch"]
    planned = [0.0, *accumulate(_stage_epochs(run))]
    starts, known = [], known_epochs(run.metrics)
    for stage, step in sorted(first_steps.items()):
        if stage < 1:
            continue
        before, since = epochs[stages < stage], epochs[stages >= stage]
        low, high = np.nanmax(before, initial=0.0), np.nanmin(since, initial=run.metrics.last_epoch)
        epoch = planned[stage] if stage < len(planned) else math.nan
        if not low - EPOCH_TOLERANCE <= epoch <= high + EPOCH_TOLERANCE:
            epoch = high if math.isnan(step) else float(np.interp(step - 1, *known))
        if epoch < run.metrics.last_epoch:
            starts.append((float(epoch), stage))
    return starts


def learning_rates(run: RunFolder) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (epoch at the end of the step, learning rate of the step) for enough steps to draw the whole curve.

    (N,), (N,) float64. Includes the first and last step of every stage. None if the settings contradict the logged
    epochs or learning rates.
    """
    timeline = _timeline(run)
    if timeline is None or len(timeline.stages) * (len(run.metrics.train["step"]) + MAX_STEPS_A_STAGE) > MAX_LOOK_UPS:
        return None
    logged, last_step = run.metrics.train, run.metrics.last_step
    known = np.isfinite(logged["lr"]) & np.isfinite(logged["epoch"])
    if not known.any() or last_step > timeline.num_steps:
        return None
    epochs, rates = _at_steps(timeline, logged["step"][known].astype(int).tolist())
    if not (
        np.allclose(epochs, logged["epoch"][known], rtol=0, atol=EPOCH_TOLERANCE)
        and np.allclose(rates, logged["lr"][known], rtol=1e-6, atol=0)
    ):
        return None
    chosen, done = [], 0
    planned = timeline.planned_steps or [steps.total for steps in timeline.stage_steps]
    for stage, steps, total in zip(timeline.stages, timeline.stage_steps, planned, strict=True):
        num = min(steps.total, last_step - done)
        # the end of warm-up, restarts and peaks are corners of the curve and must not be thinned out
        corner = {step for step in corner_steps(stage, total) if step < num}
        chosen += [done + 1 + i for i in sorted({*evenly_chosen(num, MAX_STEPS_A_STAGE), *corner})]
        done += num
    return _at_steps(timeline, chosen)


def ending(run: RunFolder) -> Ending:
    """Return how a run ended: as its last event says, or by comparing the log's end with the planned one."""
    metrics, (num_steps, num_epochs) = run.metrics, planned_end(run)
    here = f"epoch {format_epoch(metrics.last_epoch)}"
    place = f"{here} of {format_epoch(num_epochs)}" if num_epochs else here
    last = {event.get("event"): line for line, event in enumerate(metrics.events)}
    after = {name for name in ("diverged", "stopped") if last.get(name, -1) > last.get("resumed", -1)}
    if "diverged" in after or lost_losses(metrics):
        return Ending("diverged", place)
    is_done = metrics.last_step >= num_steps if num_steps else metrics.last_epoch >= (num_epochs or math.inf)
    if is_done and metrics.last_step:
        return Ending("finished", place)
    if "stopped" in after:
        return Ending("stopped", place)
    return Ending("open" if num_steps or num_epochs else "unknown", place)


def lost_losses(metrics: Metrics) -> list[str]:
    """Return a sentence about each loss that is not finite where the log ends, [] for a sound run."""
    said, loss = [], metrics.train["loss"]
    known = np.flatnonzero(np.isfinite(loss))
    if len(loss) and not len(known):
        said.append("No logged step has a finite loss.")
    elif len(loss) and known[-1] < len(loss) - 1:
        since = metrics.train["step"][known[-1] + 1]
        said.append(f"From step {since:,.0f} on, no logged step has a finite loss.")
    measured = max((point.step for point in metrics.validation["held_out"]), default=-1)
    if metrics.not_finite and metrics.not_finite[-1] > measured:
        said.append(f"The last held-out loss, at step {metrics.not_finite[-1]:,}, is not finite.")
    return said


def planned_end(run: RunFolder) -> tuple[int | None, float | None]:
    """Return the steps and epochs that the settings plan, None for what they do not tell.

    The steps are known only where the settings agree with the log.
    """
    limit = number(table_of(run.config, "train").get("max_steps"))
    limit = int(limit) if limit > 0 else None
    timeline, last_step = _timeline(run), run.metrics.last_step
    if timeline is not None and timeline.num_steps >= last_step:
        epochs, _ = _at_steps(timeline, [timeline.num_steps, max(1, last_step)])
        if not last_step or abs(epochs[1] - run.metrics.last_epoch) < EPOCH_TOLERANCE:
            return timeline.num_steps, float(epochs[0])
    stages = _stage_epochs(run)
    epochs = sum(stages) if stages else number(table_of(run.config, "train").get("epochs"))
    return limit, None if limit or not epochs > 0 else epochs


def run_verdict(run: RunFolder) -> Verdict:
    """Return what a run's validation curves say about overfitting, given how it ended and its learning rates."""
    train, validation = run.metrics.train, run.metrics.validation
    rates = list(zip(train["step"].tolist(), train["lr"].tolist(), strict=True))
    is_warned = any(event.get("event") == "over-fitting" for event in run.metrics.events)
    return over_fitting_verdict(validation["held_out"], validation["train_subset"], ending(run), rates, is_warned)


def known_epochs(metrics: Metrics) -> tuple[list[float], list[float]]:
    """Return the logged steps, ascending, and the epoch at each."""
    pairs = {(point.step, point.epoch) for points in metrics.validation.values() for point in points}
    pairs |= set(zip(metrics.train["step"].tolist(), metrics.train["epoch"].tolist(), strict=True))
    return tuple(zip(*sorted(pair for pair in pairs | {(0, 0.0)} if math.isfinite(pair[1])), strict=True))


def _first_steps(metrics: Metrics) -> dict[int, float]:
    """Return the first step of every stage that was reached, NaN for a stage without a `stage began` event."""
    stages = metrics.train["stage"]
    first_steps = {int(stage): math.nan for stage in np.unique(stages[np.isfinite(stages)])}
    for event in metrics.events:
        match = re.match(r"(\d{1,6}) of \d", str(event.get("detail") or ""))
        if event.get("event") == "stage began" and match:
            first_steps[int(match[1]) - 1] = number(event.get("step"))
    return first_steps


def _timeline(run: RunFolder) -> Timeline | None:
    if not run.config:
        return None
    try:
        config = parse_config(run.config, "config.toml")
    except ValueError:
        # settings of another Safelight version: the graph shows the logged values instead
        return None
    stages, records = tuple(config.stages()), rows_of(run.data, "stages")
    planned = ()
    if len(records) == len(stages):
        for stage, epochs, record in zip(stages, _stage_epochs(run), records, strict=True):
            # one that patience has ended has fewer
            stage.epochs = int(epochs) if epochs >= 0 else stage.epochs
            steps = number(record.get("planned_steps"))
            planned += (int(steps) if 0 <= steps <= MAX_STEPS_AN_EPOCH else -1,)
    steps = _recorded_steps(run.data, stages) if records else _steps_of_buckets(run.data, stages)
    if not steps:
        return None
    totals = tuple(one.total if num < 0 else num for one, num in zip(steps, planned, strict=False))
    timeline = Timeline(stages, steps, config.train.max_steps, totals if max(planned, default=-1) >= 0 else ())
    return timeline if timeline.total_steps else None


def _stage_epochs(run: RunFolder) -> list[float]:
    """Return the epochs of each stage: as the run recorded them when it ended stages early, else as the settings plan.

    A record of more epochs than are planned is not that of these settings.
    """
    epochs = [number(stage.get("epochs")) for stage in rows_of(run.config, "stage")]
    recorded = [number(stage.get("epochs")) for stage in rows_of(run.data, "stages")]
    if not epochs:
        epochs = [number(table_of(run.config, "train").get("epochs"))] if len(recorded) == 1 else []
    if len(epochs) != len(recorded):
        return epochs
    return [now if 0 <= now < plan else plan for plan, now in zip(epochs, recorded, strict=True)]


def _recorded_steps(data: dict, stages: Sequence[ResolvedStage]) -> tuple[StageSteps, ...] | None:
    """Return each stage's steps as the run recorded them when it started, None if they do not fit the settings."""
    numbers = [row.get("steps_per_epoch") for row in rows_of(data, "stages")]
    if len(numbers) != len(stages):
        return None
    for stage, row in zip(stages, numbers, strict=True):
        # a stage that never began has no numbers
        if not isinstance(row, list) or len(row) not in (1, stage.epochs):
            return None
        if not all(type(num) is int and 0 <= num <= MAX_STEPS_AN_EPOCH for num in row):
            return None
    return tuple(StageSteps(stage.epochs, tuple(row)) for stage, row in zip(stages, numbers, strict=True))


def _steps_of_buckets(data: dict, stages: Sequence[ResolvedStage]) -> tuple[StageSteps, ...] | None:
    """Return each stage's steps of a run that recorded only its buckets: every photograph was used once an epoch."""
    counts = [number(bucket.get("num_train")) for bucket in rows_of(data, "buckets")]
    if not counts or not all(math.isfinite(count) and count >= 0 for count in counts):
        return None
    batches = [sum(-(-int(count) // stage.batch_size) for count in counts) for stage in stages]
    return tuple(
        StageSteps(stage.epochs, (-(-num // stage.accumulate),)) for stage, num in zip(stages, batches, strict=True)
    )


def _at_steps(timeline: Timeline, steps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the epoch at the end of each 1-based step, and its learning rate."""
    epochs, rates = [], []
    for step in steps:
        epoch, in_epoch = timeline.place_of(step)
        epochs.append(epoch + (in_epoch + 1) / timeline.steps_of(epoch))
        rates.append(timeline.learning_rate(epoch, in_epoch))
    return np.array(epochs, dtype=np.float64), np.array(rates, dtype=np.float64)
