"""The report's headline figures and its verdict on overfitting, as pure functions of the metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safelight.trainer.report.run_reader import Metrics, Validation

# Fine-tuning changes held-out loss by a few per cent at most. After the best point, the loss has risen only if it rose
# by more than this fraction of the loss and more than this fraction of the gain so far.
MIN_RISE_OF_LOSS = 0.0025
MIN_RISE_OF_GAIN = 0.1
# seconds between two lines: no step takes a day, and lines are out of order by an hour at most
MAX_GAP_S = 24 * 3600.0
MAX_DISORDER_S = 3600.0


@dataclass(frozen=True)
class Facts:
    """The headline figures. None if the run did not measure them."""

    last_step: int
    last_epoch: float
    best: Validation | None
    # change of the best held-out loss from step 0; negative is better
    change_percent: float | None
    run_time_s: float | None
    images_per_s: float | None
    peak_memory_gib: float | None


@dataclass(frozen=True)
class Verdict:
    """What the validation curves say about overfitting, as one of the kinds and as text with figures."""

    # unknown | improving | level | rising | overfitting | worsening | no-gain
    kind: str
    text: str

    @property
    def is_warning(self) -> bool:
        return self.kind in ("rising", "overfitting", "worsening", "no-gain")


def headline_facts(metrics: Metrics) -> Facts:
    """Return the headline figures of a run."""
    held_out = metrics.validation["held_out"]
    best = best_validation(held_out)
    first = held_out[0] if held_out and held_out[0].step == 0 else None
    change = 100 * (best.loss / first.loss - 1) if best and first and first.loss > 0 else None
    return Facts(
        last_step=metrics.last_step,
        last_epoch=metrics.last_epoch,
        best=best,
        change_percent=change,
        run_time_s=run_time_s(metrics.times),
        images_per_s=_reduce(np.mean, metrics.train["images_per_s"]),
        peak_memory_gib=_reduce(np.max, metrics.train["memory_gib"]),
    )


def best_validation(points: Sequence[Validation]) -> Validation | None:
    """Return the validation with the lowest loss, the earlier one if two are equal."""
    return min(points, key=lambda point: (point.loss, point.step), default=None)


def run_time_s(times: Sequence[tuple[float, str]]) -> float | None:
    """Return how many seconds the run took, including validation and samples; None from fewer than two lines."""
    elapsed = [seconds for seconds in work_times_s(times) if math.isfinite(seconds)]
    return elapsed[-1] if len(elapsed) > 1 else None


def work_times_s(times: Sequence[tuple[float, str]]) -> list[float]:
    """Return for each line how many seconds the run had worked by then, NaN for a line without a time.

    times: (unix seconds, event or "") of every line. Not counted are the pause between the last line of an interrupted
    run and its `resumed` event, time that runs backwards, and a gap that no step, validation or sample can fill: the
    clock was set.
    """
    gaps, latest = np.zeros(len(times)), math.nan
    for line, (time, event) in enumerate(times):
        if math.isnan(time):
            continue
        is_resume = event.startswith("resume")
        if not is_resume and time > latest:
            gaps[line] = time - latest
        if is_resume or not latest - time <= MAX_DISORDER_S or time > latest:
            latest = time
    usual = gaps[gaps > 0]
    limit = max(MAX_GAP_S, 100 * float(np.median(usual))) if len(usual) else MAX_GAP_S
    worked = np.cumsum(np.where(gaps > limit, 0.0, gaps))
    return [math.nan if math.isnan(time) else float(total) for (time, _), total in zip(times, worked, strict=True)]


def over_fitting_verdict(held_out: Sequence[Validation], subset: Sequence[Validation]) -> Verdict:
    """Return what the validation curves say about overfitting.

    held_out, subset: validations on held-out photographs and on some of the training photographs, in order of steps.
    The verdict is overfitting only if held-out loss rose after its best point while the gap between the two grew.
    """
    if not held_out:
        return Verdict(
            "unknown",
            "There was no validation on held-out photographs, so overfitting cannot be judged "
            "(see data.validation_fraction and validate.every_epochs).",
        )
    if len(held_out) < 3:
        counted = "one validation" if len(held_out) == 1 else "two validations"
        return Verdict("unknown", f"Overfitting cannot be judged from {counted}; it takes at least three.")
    first, last, best = held_out[0], held_out[-1], best_validation(held_out)
    where = f"epoch {format_epoch(best.epoch)}"
    if best.step == first.step:
        return _verdict_without_gain(held_out)
    if best.step == last.step:
        return Verdict(
            "improving",
            f"No overfitting: held-out loss was lowest ({best.loss:.4f}) at the last validation, {where}. "
            "A little more training may still help.",
        )
    if not _rose(held_out):
        return Verdict(
            "level",
            f"No noticeable overfitting: held-out loss was lowest at {where} ({best.loss:.4f}) and has hardly changed "
            f"since ({last.loss:.4f}).",
        )
    rise = (
        f"held-out loss was lowest at {where} ({best.loss:.4f}) and has risen by {_rise_percent(best, last)} since, "
        f"to {last.loss:.4f}"
    )
    by_step = {point.step: point for point in subset}
    if best.step not in by_step or last.step not in by_step:
        unknown = "Training photographs were not validated at the same steps, so the two cannot be compared."
        return Verdict("rising", f"Possibly overfitting: {rise}. {unknown}")
    gap_then = best.loss - by_step[best.step].loss
    gap_now = last.loss - by_step[last.step].loss
    moved = _change(by_step[best.step].loss, by_step[last.step].loss)
    trained = f"on the training photographs it {'fell' if moved < 0 else 'rose'} by {100 * abs(moved):.1f} %"
    gap = f"the gap went from {gap_then:+.4f} to {gap_now:+.4f}".replace("-", "−")
    if gap_now > gap_then and moved < _change(best.loss, last.loss):
        return Verdict(
            "overfitting",
            f"Overfitting since {where}: {rise}, while {trained} ({gap}). Use the checkpoint of {where}.",
        )
    return Verdict(
        "worsening",
        f"Not overfitting, but getting worse: {rise}, and {trained} as well ({gap}). "
        "The learning rate may be too high.",
    )


def format_epoch(epoch: float) -> str:
    """Return an epoch with at most one decimal: 27, or 4.5."""
    return f"{epoch:.1f}".removesuffix(".0") if math.isfinite(epoch) else "?"


def format_duration(seconds: float) -> str:
    """Return a time span in its two largest units."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def format_percent(percent: float) -> str:
    """Return a signed percentage with a true minus sign."""
    return f"{percent:+.1f} %".replace("-", "−")


def smooth(values: np.ndarray, half_width: int) -> np.ndarray:
    """Return the running mean over 2 * half_width + 1 values, fewer at the ends. NaN values are ignored."""
    if not len(values):
        return values
    kernel = np.ones(2 * half_width + 1)
    known = np.isfinite(values)
    # the middle of mode="full", because the result of mode="same" is as long as the kernel if that is longer
    total, weight = (
        np.convolve(column, kernel, mode="full")[half_width : half_width + len(values)]
        for column in (np.where(known, values, 0.0), known.astype(np.float64))
    )
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def evenly_chosen(num_all: int, num_wanted: int) -> list[int]:
    """Return at most num_wanted evenly spaced indices below num_all, including the first and the last."""
    if num_all <= num_wanted:
        return list(range(num_all))
    return sorted({round(i * (num_all - 1) / (num_wanted - 1)) for i in range(num_wanted)})


def _verdict_without_gain(held_out: Sequence[Validation]) -> Verdict:
    first, last = held_out[0], held_out[-1]
    if _rose(held_out):
        return Verdict(
            "no-gain",
            f"Held-out loss was lowest at the start ({first.loss:.4f}) and has risen by {_rise_percent(first, last)} "
            f"to {last.loss:.4f}: the model got worse on photographs it was not trained on. "
            "Try a lower learning rate.",
        )
    return Verdict(
        "no-gain", f"Held-out loss never fell below its start ({first.loss:.4f}): there was no measurable improvement."
    )


def _rose(held_out: Sequence[Validation]) -> bool:
    best, last = best_validation(held_out), held_out[-1]
    gain = held_out[0].loss - best.loss
    return last.loss - best.loss > max(MIN_RISE_OF_LOSS * best.loss, MIN_RISE_OF_GAIN * gain)


def _change(before: float, after: float) -> float:
    """Return by what fraction a loss changed; infinity if it was zero."""
    return after / before - 1 if before > 0 else math.inf


def _rise_percent(best: Validation, last: Validation) -> str:
    return f"{100 * _change(best.loss, last.loss):.1f} %"


def _reduce(function, values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(function(known)) if len(known) else None
