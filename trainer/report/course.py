"""What the settings add to the log of a run: where its stages began, and the learning rate of every step.

Only every log.every_steps-th step is logged. The settings know all of them, but may have been changed at a resume, so
they count only where the log bears them out.
"""

import math
import re
from itertools import accumulate

import numpy as np

from safelight.trainer.config.timeline import Timeline, steps_of_counts
from safelight.trainer.config.toml import parse_config
from safelight.trainer.report.facts import evenly_chosen
from safelight.trainer.report.run_reader import Metrics, RunFolder, number, rows_of

MAX_STEPS_A_STAGE = 600
# epochs are logged to six digits
EPOCH_TOLERANCE = 1e-5


def stage_starts(run: RunFolder) -> list[tuple[float, int]]:
    """Return (epoch, stage) where every stage after the first began, the epoch being that of the step before.

    From the settings where the log agrees, else from the log alone.
    """
    first_steps = _first_steps(run.metrics)
    stages, epochs = run.metrics.train["stage"], run.metrics.train["epoch"]
    planned = [0.0, *accumulate(number(stage.get("epochs")) for stage in rows_of(run.config, "stage"))]
    starts = []
    for stage, step in sorted(first_steps.items()):
        if stage < 1:
            continue
        before, since = epochs[stages < stage], epochs[stages >= stage]
        low, high = np.nanmax(before, initial=0.0), np.nanmin(since, initial=run.metrics.last_epoch)
        epoch = planned[stage] if stage < len(planned) else math.nan
        if not low - EPOCH_TOLERANCE <= epoch <= high + EPOCH_TOLERANCE:
            epoch = high if math.isnan(step) else _epoch_at(run.metrics, step - 1)
        if epoch < run.metrics.last_epoch:
            starts.append((float(epoch), stage))
    return starts


def learning_rates(run: RunFolder) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the epoch at the end of a step and its learning rate, for enough steps to draw them all.

    (N,), (N,) float64; the first and the last step of every stage are among them. None where the settings do not give the
    log's own epochs and learning rates.
    """
    timeline = _timeline(run)
    if timeline is None:
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
    for stage, per_epoch in zip(timeline.stages, timeline.stage_steps_per_epoch, strict=True):
        num = min(stage.epochs * per_epoch, last_step - done)
        # a warm-up is short and its end a corner
        corner = {stage.warmup_steps - 1, stage.warmup_steps} & set(range(num))
        chosen += [done + 1 + i for i in sorted({*evenly_chosen(num, MAX_STEPS_A_STAGE), *corner})]
        done += num
    return _at_steps(timeline, chosen)


def _first_steps(metrics: Metrics) -> dict[int, float]:
    """Return the first step of every stage that was reached, NaN where no event tells it."""
    stages = metrics.train["stage"]
    found = {int(stage): math.nan for stage in np.unique(stages[np.isfinite(stages)])}
    for event in metrics.events:
        told = re.match(r"(\d{1,6}) of \d", str(event.get("detail") or ""))
        if event.get("event") == "stage began" and told:
            found[int(told[1]) - 1] = number(event.get("step"))
    return found


def _epoch_at(metrics: Metrics, step: float) -> float:
    pairs = {(point.step, point.epoch) for points in metrics.validation.values() for point in points}
    pairs |= set(zip(metrics.train["step"].tolist(), metrics.train["epoch"].tolist(), strict=True))
    steps, epochs = zip(*sorted(pair for pair in pairs | {(0, 0.0)} if math.isfinite(pair[1])), strict=True)
    return float(np.interp(step, steps, epochs))


def _timeline(run: RunFolder) -> Timeline | None:
    counts = [number(bucket.get("num_train")) for bucket in rows_of(run.data, "buckets")]
    if not run.config or not counts or not all(math.isfinite(count) and count >= 0 for count in counts):
        return None
    try:
        config = parse_config(run.config, "config.toml")
    except ValueError:
        # the settings of another version; the log is drawn instead
        return None
    stages = tuple(config.stages())
    counts = [int(count) for count in counts]
    steps = tuple(steps_of_counts(counts, stage.batch_size, stage.accumulate) for stage in stages)
    return Timeline(stages, steps, config.train.max_steps) if min(steps) > 0 else None


def _at_steps(timeline: Timeline, steps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the epoch at the end of each 1-based step, and its learning rate."""
    epochs, rates = [], []
    for step in steps:
        index, before = 0, step - 1
        while before >= (num := timeline.stages[index].epochs * timeline.stage_steps_per_epoch[index]):
            index, before = index + 1, before - num
        epoch, in_epoch = divmod(before, timeline.stage_steps_per_epoch[index])
        epoch += timeline.first_epoch(index)
        epochs.append(epoch + (in_epoch + 1) / timeline.stage_steps_per_epoch[index])
        rates.append(timeline.learning_rate(epoch, in_epoch))
    return np.array(epochs, dtype=np.float64), np.array(rates, dtype=np.float64)
