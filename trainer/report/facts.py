"""The report's headline figures and its verdict on overfitting, as pure functions of the metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safelight.trainer.metrics.over_fitting import (
    FALSE_ALARMS,
    MIN_RISE,
    Curve,
    doubt,
    is_over_fitting,
    matters,
)
from safelight.trainer.report.run_reader import Metrics, Validation

# the last part of a run's epochs, over which its loss still falls or has become level
LAST_PART = 0.25
# with fewer validations than this, how they scatter is not known
MIN_JUDGED = 12
# a learning rate below this fraction of the run's highest hardly changes a model
LOW_RATE = 0.01
# seconds between two lines: no step takes a day, and lines are out of order by an hour at most
MAX_GAP_S = 24 * 3600.0
MAX_DISORDER_S = 3600.0


@dataclass(frozen=True)
class Facts:
    """The headline figures. None if the run did not measure them."""

    last_step: int
    last_epoch: float
    best: Validation | None
    # change of the best held-out loss from step 0; negative is better. None also if it was measured on one photograph
    change_percent: float | None
    run_time_s: float | None
    images_per_s: float | None
    peak_memory_gib: float | None


@dataclass(frozen=True)
class Ending:
    """How a run ended, as far as its folder tells. place: how far it came, such as "epoch 12 of 40"."""

    # finished | stopped | diverged | open (still running, or killed) | unknown (the settings do not tell its length)
    kind: str
    place: str = ""


UNKNOWN_END = Ending("unknown")


@dataclass(frozen=True)
class Verdict:
    """What the validation curves say about overfitting, as one of the kinds and as text with figures."""

    # unknown | no-rate | improving | level | rising | overfitting | worsening | no-gain
    kind: str
    text: str
    # what the learning rate had come down to, if that was too low for the curve's end to tell of more training
    low_rate: str = ""

    @property
    def is_warning(self) -> bool:
        return self.kind in ("no-rate", "rising", "overfitting", "worsening", "no-gain")


def headline_facts(metrics: Metrics) -> Facts:
    """Return the headline figures of a run."""
    held_out = metrics.validation["held_out"]
    best = best_validation(held_out)
    first = held_out[0] if held_out and held_out[0].step == 0 else None
    is_known = best and first and first.loss > 0 and not is_one_picture(held_out)
    change = 100 * (best.loss / first.loss - 1) if is_known else None
    return Facts(
        last_step=metrics.last_step,
        last_epoch=metrics.last_epoch,
        best=best,
        change_percent=change,
        run_time_s=run_time_s(metrics.times),
        images_per_s=_mean_speed(metrics),
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


def is_one_picture(points: Sequence[Validation]) -> bool:
    """Return whether validation measures a single photograph, whose loss says nothing in per cent about others."""
    return bool(points) and points[-1].num_images == 1


def over_fitting_verdict(
    held_out: Sequence[Validation],
    subset: Sequence[Validation],
    ending: Ending = UNKNOWN_END,
    rates: Sequence[tuple[float, float]] = (),
    is_warned: bool = False,
) -> Verdict:
    """Return what the validation curves say about overfitting.

    held_out, subset: validations on held-out photographs and on some of the training photographs, in order of steps.
    rates: logged steps and their learning rates: a rate near zero explains a flat end. The verdict is overfitting only
    if held-out loss rose after its best point while the loss on the training photographs did not. is_warned: the run
    warned of it; without that, and with enough validations to tell how they scatter, the verdict says how sure it is.
    """
    if not held_out:
        return Verdict(
            "unknown",
            "There was no validation on held-out photographs, so overfitting cannot be judged "
            "(see data.validation_fraction and validate.every_epochs).",
        )
    known = [rate for _, rate in rates if math.isfinite(rate)]
    if known and max(known) == 0:
        return Verdict("no-rate", "The learning rate was 0 at every logged step, so the model did not learn.")
    if len(held_out) < 3:
        counted = "one validation" if len(held_out) == 1 else "two validations"
        return Verdict("unknown", f"Overfitting cannot be judged from {counted}; it takes at least three.")
    if is_one_picture(held_out):
        return Verdict("unknown", "Overfitting cannot be judged from one held-out photograph.")
    first, last, best = held_out[0], held_out[-1], best_validation(held_out)
    where = f"epoch {format_epoch(best.epoch)}"
    if best.step == first.step:
        return _verdict_without_gain(held_out)
    if best.step == last.step:
        return _verdict_at_the_end(held_out, ending, rates, _gap(held_out, subset))
    if not _rose(held_out):
        return Verdict(
            "level",
            f"No noticeable sign of overfitting: held-out loss was lowest at {where} ({best.loss:.4f}) and has hardly "
            f"changed since ({last.loss:.4f}).{_gap(held_out, subset)}{_flattened_by(rates)}",
            _low_rate(rates),
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
    trained = f"{'fell' if moved < 0 else 'rose'} by {100 * abs(moved):.1f} %"
    if abs(moved) < 0.0005:
        trained = "did not change"
    gap = f"the gap went from {gap_then:+.4f} to {gap_now:+.4f}".replace("-", "−")
    if is_over_fitting(_change(best.loss, last.loss), moved):
        what = f"{rise}, while on the training photographs it {trained} ({gap})"
        if chance := _chance_of(held_out, subset, is_warned):
            return Verdict("rising", f"Possibly overfitting: {what}. {chance}")
        return Verdict("overfitting", f"Overfitting since {where}: {what}. Use the checkpoint of {where}.")
    return Verdict(
        "worsening",
        f"Not overfitting, but getting worse: {rise}, and on the training photographs it {trained} as well ({gap}). "
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


def smooth(
    values: np.ndarray, half_width: int, weights: np.ndarray | None = None, at: Sequence[int] | None = None
) -> np.ndarray:
    """Return the weighted mean of the values around each place, over at most 4 * half_width + 1 of them.

    A value counts by its weight (of every value: 1) times its nearness, which falls linearly to zero. At the ends, and
    where values are not finite, fewer are averaged, by the same weights: no value counts for more than its share. at:
    the places, all by default.
    """
    reach = 2 * half_width
    nearness = 1.0 + reach - np.abs(np.arange(-reach, reach + 1))
    weights = np.ones(len(values)) if weights is None else weights
    weights = np.where(np.isfinite(values) & np.isfinite(weights), weights, 0.0)
    known = np.where(weights > 0, values, 0.0)
    places = range(len(values)) if at is None else at
    means = np.full(len(places), np.nan)
    for place, center in enumerate(places):
        first, end = max(0, center - reach), min(len(values), center + reach + 1)
        share = weights[first:end] * nearness[first - center + reach : end - center + reach]
        if share.any():
            means[place] = share @ known[first:end] / share.sum()
    return means


def evenly_chosen(num_all: int, num_wanted: int) -> list[int]:
    """Return at most num_wanted evenly spaced indices below num_all, including the first and the last."""
    if num_all <= num_wanted:
        return list(range(num_all))
    return sorted({round(i * (num_all - 1) / (num_wanted - 1)) for i in range(num_wanted)})


def _verdict_without_gain(held_out: Sequence[Validation]) -> Verdict:
    first, last = held_out[0], held_out[-1]
    start = "the start" if first.step == 0 else f"the first validation, epoch {format_epoch(first.epoch)}"
    if _rose(held_out):
        return Verdict(
            "no-gain",
            f"Held-out loss was lowest at {start} ({first.loss:.4f}) and has risen by {_rise_percent(first, last)} "
            f"to {last.loss:.4f}: the model got worse on photographs it was not trained on. "
            "Try a lower learning rate.",
        )
    if first.step == 0:
        text = f"Held-out loss never fell below its start ({first.loss:.4f}): there was no measurable improvement."
        return Verdict("no-gain", text)
    return Verdict(
        "unknown",
        f"Held-out loss has hardly changed since {start} ({first.loss:.4f}). The base model was not validated, so "
        "whether the model improved before that is not known.",
    )


def _verdict_at_the_end(
    held_out: Sequence[Validation], ending: Ending, rates: Sequence[tuple[float, float]], gap: str
) -> Verdict:
    """Return the verdict where the last validation is the best one: still falling, or level. gap: a sentence on it."""
    first, last = held_out[0], held_out[-1]
    lowest = f"held-out loss was lowest ({last.loss:.4f}) at the last validation, epoch {format_epoch(last.epoch)}"
    since = last.epoch - LAST_PART * (last.epoch - first.epoch)
    before = [point for point in held_out[:-1] if point.epoch <= since] or [first]
    earlier = best_validation(before)
    fall = earlier.loss - last.loss
    if not matters(fall, earlier.loss, first.loss - last.loss):
        then = f"epoch {format_epoch(earlier.epoch)} ({earlier.loss:.4f})"
        text = f"No noticeable sign of overfitting: {lowest}, but has hardly changed since {then}.{gap}"
        return Verdict("level", text + _flattened_by(rates), _low_rate(rates))
    if ending.kind in ("diverged", "open"):
        return Verdict("improving", f"H{lowest[1:]}: no sign of overfitting until then.{gap}")
    if low := _low_rate(rates):
        rate = f" The learning rate had come down {low} by then, so training on takes a stage with a higher one."
        return Verdict("improving", f"No sign of overfitting: {lowest}, and did not rise.{gap}{rate}", low)
    more = " A little more training may still help."
    return Verdict("improving", f"No sign of overfitting: {lowest}, and did not rise.{gap}{more}")


def _gap(held_out: Sequence[Validation], subset: Sequence[Validation]) -> str:
    """Return how far held-out loss lies above that on training photographs, and whether that grew; "" if unknown.

    It grows where a model learns more about its photographs than about others, even while both losses fall.
    """
    by_step = {point.step: point.loss for point in subset}
    both = [(point, point.loss - by_step[point.step]) for point in held_out if point.step in by_step]
    if len(both) < 2 or both[-1][0] is not held_out[-1]:
        return ""
    (first, then), (last, now) = both[0], both[-1]
    if now - then <= MIN_RISE * last.loss:
        return ""
    start = "the start" if first.step == 0 else f"epoch {format_epoch(first.epoch)}"
    moved = f"from {then:+.4f} at {start} to {now:+.4f}".replace("-", "−")
    return (
        f" The gap to the loss on training photographs ({by_step[last.step]:.4f}) widened, {moved}, which is no "
        "overfitting as long as held-out loss does not rise."
    )


def _chance_of(held_out: Sequence[Validation], subset: Sequence[Validation], is_warned: bool) -> str:
    """Return how well chance explains that a run seems to overfit, '' if it does not or cannot be known."""
    by_step = {point.step: point for point in subset}
    both = [(point, by_step[point.step]) for point in held_out if point.step in by_step]
    bands = {len(one.loss_by_timestep) for pair in both for one in pair}
    if is_warned or len(both) < MIN_JUDGED or len(bands) != 1 or bands == {0}:
        return ""
    losses = ([point.loss_by_timestep for point in points] for points in zip(*both, strict=True))
    curve = Curve.of([point.epoch for point, _ in both], *losses)
    if not curve.is_sound or (chance := doubt(curve)) <= FALSE_ALARMS:
        return ""
    if chance == 1:
        return "The validations scatter too much to tell."
    return (
        f"Without overfitting, validations that scatter as these do end in so clear a rise in at most "
        f"{math.ceil(100 * chance)} of 100 runs."
    )


def _low_rate(rates: Sequence[tuple[float, float]]) -> str:
    """Return what the learning rate had come down to at the end, '' if it was not too low to change the model."""
    known = [rate for _, rate in rates if math.isfinite(rate)]
    if not known or known[-1] >= LOW_RATE * max(known):
        return ""
    return "to 0" if known[-1] == 0 else f"below {100 * LOW_RATE:g} % of its highest value"


def _flattened_by(rates: Sequence[tuple[float, float]]) -> str:
    low = _low_rate(rates)
    return f" The learning rate had come down {low} by the end, which flattens any curve." if low else ""


def _rose(held_out: Sequence[Validation]) -> bool:
    best, last = best_validation(held_out), held_out[-1]
    gain = held_out[0].loss - best.loss
    return bool(matters(last.loss - best.loss, best.loss, gain))


def _change(before: float, after: float) -> float:
    """Return by what fraction a loss changed; infinity if it was zero."""
    return after / before - 1 if before > 0 else math.inf


def _rise_percent(best: Validation, last: Validation) -> str:
    return f"{100 * _change(best.loss, last.loss):.1f} %"


def _mean_speed(metrics: Metrics) -> float | None:
    """Return the logged speeds' mean over the time that each lasted, as if all steps had equally many images."""
    speed, steps = metrics.train["images_per_s"], steps_averaged(metrics)
    known = (speed > 1 / MAX_GAP_S) & (speed < math.inf) & (steps > 0)
    return float(steps[known].sum() / (steps[known] / speed[known]).sum()) if known.any() else None


def steps_averaged(metrics: Metrics) -> np.ndarray:
    """Return how many steps each logged line averages: those since the line before. (N,) float64."""
    return np.diff(metrics.train["step"], prepend=0.0)


def _reduce(function, values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(function(known)) if len(known) else None
