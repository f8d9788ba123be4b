"""When a stage has stopped learning what carries over to other photographs: pure functions of its validations.

A validation measures the same held-out and training photographs with the same noise in N ranges of the noise schedule
(trainer/step/validate.py). Each range is taken relative to its loss when the stage began, so that one with much noise,
whose loss is small, counts as much as one with little.

Photographs, timesteps and noise being the same, all that is random from one validation to the next is where steps over
random batches have left the weights. How much that moves a loss is not known beforehand, so it is estimated from the
curve itself, and the uncertainty of that estimate counts: a rise is tested against Student's t. The loss is tested
after every validation, on windows of several lengths, and each test has its share of one error probability, so that all
of them together raise a false alarm in at most FALSE_ALARMS of the stages that do not over-fit, however long they are.
Windows overlap, so in fact it is a tenth of that (tools/over_fitting.py).

That is proven for a held-out loss that is expected to fall or stay level, in whatever shape, about which validations
scatter normally and independently of each other: the slope of a window is then normal with a mean of at most 0, and is
independent of the scatter about its line, which a bend only adds to. Weights wander, though, so what one validation is
above the curve can carry over to the next. Values that stay together look steadier than they are; t and its degrees of
freedom are reduced as if half of the scatter carried over. docs/measurements.md has the rates that were measured.

The report's verdict (trainer/report/facts.py) takes from here what rise matters (`matters`), when training photographs
tell of another cause (`is_over_fitting`), and how sure it is (`doubt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

# the most stages without over-fitting that may be said to over-fit
FALSE_ALARMS = 0.01
# windows of these lengths are tested, from seven on each a third longer than the one before. Of three validations, a
# rise would have to be 10,000 times its noise. Their parts of FALSE_ALARMS: the long ones decide where validations
# scatter widely, and the short ones where they hardly do, so that a smaller part suffices.
PARTS = {4: 1, 5: 1, 6: 1, 7: 1, 9: 1, 12: 2, 16: 2, 21: 4, 28: 4, 37: 4, 49: 4, 65: 2, 86: 2}
LENGTHS = tuple(PARTS)
MIN_WINDOW = LENGTHS[0]
# a window is tested anew once this fraction of its validations are
STEP_OF_WINDOW = 1 / 8
# the part of a test that the plain mean over the ranges takes
PART_OF_PLAIN = 0.1
# how much of a validation's distance from the curve carries over to the next one, and its square to the one after it
CARRIED = 0.5
# a rise that is smaller than this fraction of the loss does not matter
MIN_RISE = 0.0025
# Fine-tuning changes held-out loss by a few per cent at most, so a rise must also be more than this fraction of the
# gain so far; or, as in a run from scratch, whose gain is large, more than this fraction of the loss.
MIN_RISE_OF_GAIN = 0.1
CLEAR_RISE = 0.01
# over-fitting if the loss on training photographs has risen by less than this fraction of what the held-out one has
MOST_OF_RISE = 0.1
# how sure the epochs are between which the gap is said to have opened
CONFIDENCE = 0.9
# of patience: a judged value is the mean of the last this many validations
NUM_SMOOTHED = 3
# fewer validations since a stage began, its start included, tell nothing of their noise
MIN_VALIDATIONS = 5
# the standard deviation of normal values from the median of their absolute deviations
SD_OF_MEDIAN = 1.4826


@dataclass(frozen=True)
class Curve:
    """A stage's validations in their order, the first at its start. Losses by range of the noise schedule.

    epochs: (N,). held_out, subset: (N, bands), on held-out and on training photographs.
    """

    epochs: np.ndarray
    held_out: np.ndarray
    subset: np.ndarray

    @classmethod
    def of(
        cls, epochs: Sequence[float], held_out: Sequence[Sequence[float]], subset: Sequence[Sequence[float]]
    ) -> Curve:
        return cls(*(np.array(values, dtype=np.float64) for values in (epochs, held_out, subset)))

    def __len__(self) -> int:
        return len(self.epochs)

    def upto(self, num: int) -> Curve:
        """Return the first `num` validations."""
        return Curve(self.epochs[:num], self.held_out[:num], self.subset[:num])

    @property
    def is_sound(self) -> bool:
        """Whether losses are finite, those of the start above 0, as others are relative to them, and epochs rise."""
        both = (self.held_out, self.subset)
        are_losses = len(self) > 0 and all(bool(np.isfinite(x).all() and (x[0] > 0).all()) for x in both)
        return are_losses and bool((np.diff(self.epochs) > 0).all() and np.isfinite(self.epochs).all())


@dataclass(frozen=True)
class OverFitting:
    """What has been found: held-out loss rises and that on training photographs does not, or by far less.

    epoch: of the validation at which held-out loss turned, after which the gap between the two opened. between: the
    epochs of the validations between which it turned, with CONFIDENCE. rise: fraction by which held-out loss has risen
    since. bands: indices of the ranges in which it has. gap_then, gap_now: held-out loss minus that on training
    photographs, at that epoch and at the last one.
    """

    epoch: float
    between: tuple[float, float]
    rise: float
    bands: tuple[int, ...]
    gap_then: float
    gap_now: float


@dataclass(frozen=True)
class Evidence:
    """The tests of the last validation, T of them for each of a batch of curves: arrays of (..., T), in equal order.

    starts: (T,), the first validation of each test's window. weights: (..., T, bands), of the ranges, of sum 1.
    p: how probable so steep a rise were in a curve that does not rise, as a multiple of the test's error probability.
    is_rise: whether the rise matters, and training photographs do not rise as well.
    """

    starts: np.ndarray
    weights: np.ndarray
    p: np.ndarray
    is_rise: np.ndarray

    @property
    def is_over_fitting(self) -> np.ndarray:
        """Which tests say that the run over-fits, (..., T)."""
        return self.is_rise & (self.p < 1)


def matters(change: float | np.ndarray, loss: float | np.ndarray, gain: float | np.ndarray) -> bool | np.ndarray:
    """Return whether a change of a loss is more than what fluctuates, after a gain since the start."""
    return change > np.maximum(MIN_RISE * loss, np.minimum(MIN_RISE_OF_GAIN * gain, CLEAR_RISE * loss))


def is_over_fitting(rise: float | np.ndarray, of_trained: float | np.ndarray) -> bool | np.ndarray:
    """Return whether a rise of held-out loss is over-fitting: that on training photographs has not risen as well.

    Where it has, it is steps that are too large. Both as fractions of a loss.
    """
    return of_trained <= MOST_OF_RISE * rise


def relative(losses_NB: np.ndarray) -> np.ndarray:
    """Return the losses relative to those of the first validation, (N, bands)."""
    return losses_NB / losses_NB[0]


def combined(relative_NB: np.ndarray) -> np.ndarray:
    """Return the mean over the ranges, each weighted by the inverse square of its own noise, (N,).

    A range whose photographs scatter by a fifth from one validation to the next would hide what the others tell.
    """
    scatter = noise(relative_NB)
    weights = 1 / np.square(np.maximum(scatter, MIN_RISE)) if np.isfinite(scatter).all() else np.ones_like(scatter)
    return relative_NB @ (weights / weights.sum())


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return for each place the mean of the last NUM_SMOOTHED values up to it; of fewer at the start. (N, ...)"""
    return np.stack([values[max(0, i - NUM_SMOOTHED + 1) : i + 1].mean(axis=0) for i in range(len(values))])


def noise(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the values about a smooth curve, of each column. (N, ...) -> (...)

    From their second differences, whose variance is 6 times that of independent noise and which a straight line does
    not change; by the median, so that a jump does not count. Infinite for fewer than MIN_VALIDATIONS.
    """
    if len(values) < MIN_VALIDATIONS:
        return np.full(values.shape[1:], np.inf)
    return SD_OF_MEDIAN * np.median(np.abs(np.diff(values, 2, axis=0)), axis=0) / np.sqrt(6)


def due_tests(num: int) -> list[tuple[int, float]]:
    """Return the windows that are tested after `num` validations: their lengths, and the error probability of each.

    What the tests of one length take sums to its part of FALSE_ALARMS: 1 / sqrt(1 + 4 u) falls from 1 to 0 over them,
    where u is how many lengths of the window have passed since its first test.
    """
    found = []
    for length, part in PARTS.items():
        step = max(1, round(length * STEP_OF_WINDOW))
        since = num - length
        if since >= 0 and since % step == 0:
            share = 1 / np.sqrt(1 + 4 * since / length) - 1 / np.sqrt(1 + 4 * (since + step) / length)
            found.append((length, float(FALSE_ALARMS * share * part / sum(PARTS.values()))))
    return found


def single_look(num: int) -> list[tuple[int, float]]:
    """Return the windows of `num` validations with shares of 1, for tests that are made once."""
    parts = {length: part for length, part in PARTS.items() if length <= num}
    return [(length, part / sum(parts.values())) for length, part in parts.items()]


def evidence(
    epochs_N: np.ndarray, held_out: np.ndarray, subset: np.ndarray, tests: Sequence[tuple[int, float]]
) -> Evidence | None:
    """Return the tests for over-fitting that end at the last validation, None if there are none.

    held_out, subset: (..., N, bands), relative losses. tests: lengths of windows and error probabilities. Of each
    window the slope of two means over the ranges is tested to be above 0, with Student's t: the one in which each range
    counts by the inverse variance of its values in the window, so that one range which scatters widely does not hide
    the others, and the plain mean, for a rise of a single range. Such weights leave the test exact, as they are
    functions of the total sums of squares (Läuter, Biometrics 52, 1996).
    """
    starts, found = [], []
    for length, error in tests:
        held, trained, x = held_out[..., -length:, :], subset[..., -length:, :], epochs_N[-length:]
        spread = held.var(axis=-2)
        inverse = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
        for weights, part in ((np.ones_like(spread), PART_OF_PLAIN), (inverse, 1 - PART_OF_PLAIN)):
            total = weights.sum(axis=-1, keepdims=True)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            values = np.einsum("...nb,...b->...n", held, weights)
            slope, t = _slope(x, values)
            other, _ = _slope(x, np.einsum("...nb,...b->...n", trained, weights))
            # relative losses are 1 at the start
            level = values.mean(axis=-1)
            is_rise = matters(slope * (x[-1] - x[0]), level, 1 - level) & is_over_fitting(slope, other)
            starts.append(len(epochs_N) - length)
            found.append((weights, improbability(t, length) / (part * error), is_rise))
    if not found:
        return None
    weights, p, is_rise = zip(*found, strict=True)
    return Evidence(np.array(starts), np.stack(weights, axis=-2), np.stack(p, axis=-1), np.stack(is_rise, axis=-1))


def improbability(t: np.ndarray, num: int) -> np.ndarray:
    """Return how probable at least this slope of `num` values is if they do not rise. t: as `_slope` has it."""
    # importing scipy.special takes 0.15 s, which every command would wait for
    from scipy.special import stdtr

    inflation, freedom = allowance(num)
    return stdtr(freedom, -t / np.sqrt(inflation))


@cache
def allowance(num: int) -> tuple[float, float]:
    """Return what scatter that carries over does to the slope of `num` values, and to what is known of its error.

    The factor by which the slope's variance exceeds what the residuals let expect, and the degrees of freedom that
    remain of num - 2: those of the chi-squared distribution with the mean and variance of the residuals' sum of squares
    (Satterthwaite, Biometrics Bulletin 2, 1946). For validations in equal distances.
    """
    x = np.arange(num) - (num - 1) / 2
    covariance = CARRIED ** np.abs(np.subtract.outer(x, x))
    residuals = np.eye(num) - 1 / num - np.outer(x, x) / (x @ x)
    of_squares = residuals @ covariance
    total = np.trace(of_squares)
    expected = total / (num - 2)
    return float(x @ covariance @ x / (x @ x) / expected), float(total**2 / np.trace(of_squares @ of_squares))


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the slope of the line through values, (..., N) -> (...), and it in units of its standard error."""
    x = x - x.mean()
    y = y - y.mean(axis=-1, keepdims=True)
    slope = y @ x / (x @ x)
    scatter = np.square(y - slope[..., None] * x).sum(axis=-1) / (len(x) - 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = slope / np.sqrt(scatter / (x @ x))
    return slope, np.nan_to_num(t, nan=0.0, posinf=np.inf, neginf=-np.inf)


def over_fitting(curve: Curve) -> OverFitting | None:
    """Return the over-fitting that the last validation shows, None if it shows none."""
    if len(curve) < MIN_WINDOW or not curve.is_sound:
        return None
    held_out = relative(curve.held_out)
    found = evidence(curve.epochs, held_out, relative(curve.subset), due_tests(len(curve)))
    if found is None or not found.is_over_fitting.any():
        return None
    test = int(np.where(found.is_over_fitting, found.p, np.inf).argmin())
    start = int(found.starts[test])
    turn, between, rise = turning_point(curve.epochs, held_out @ found.weights[test])
    slopes, t = _slope(curve.epochs[start:], held_out[start:].T)
    is_sure = improbability(t, len(curve) - start) < FALSE_ALARMS / len(slopes)
    bands = np.flatnonzero(is_sure & (slopes * (curve.epochs[-1] - curve.epochs[start]) > MIN_RISE))
    gap = (curve.held_out - curve.subset).mean(axis=1)
    return OverFitting(
        epoch=float(curve.epochs[turn]),
        between=between,
        rise=rise,
        bands=tuple(bands.tolist()),
        gap_then=float(gap[turn]),
        gap_now=float(gap[-1]),
    )


def doubt(curve: Curve) -> float:
    """Return how probable at most so clear a sign of over-fitting at the end of a curve were without any; 1 for none.

    For one look at a curve, whereas `over_fitting` may be asked after every validation.
    """
    if len(curve) < MIN_WINDOW or not curve.is_sound:
        return 1.0
    found = evidence(curve.epochs, relative(curve.held_out), relative(curve.subset), single_look(len(curve)))
    return float(min(1.0, np.where(found.is_rise, found.p, 1.0).min()))


def turning_point(epochs_N: np.ndarray, values_N: np.ndarray) -> tuple[int, tuple[float, float], float]:
    """Return where values stop falling and rise: the index, the epochs between which they do so, and the rise since.

    By least squares of all curves that fall up to a validation and rise from there, however they bend. Turns are
    rejected whose sum of squares is too large for CONFIDENCE, by the F distribution (Seber and Wild, Nonlinear
    Regression, 1989, section 5.4), with one degree of freedom taken by each level of the best curve. rise: of the line
    through what follows the turn, as a fraction of its start.
    """
    from scipy.special import stdtrit

    fits = [_fall_and_rise(values_N, turn) for turn in range(len(values_N) - 1)]
    squares = np.array([one[0] for one in fits])
    turn = int(squares.argmin())
    freedom = max(1, len(values_N) - fits[turn][1])
    limit = squares[turn] * (1 + allowance(len(values_N))[0] * stdtrit(freedom, (1 + CONFIDENCE) / 2) ** 2 / freedom)
    accepted = epochs_N[:-1][squares <= limit]
    x, y = epochs_N[turn:], values_N[turn:]
    slope, _ = _slope(x, y) if len(x) > 2 else ((y[-1] - y[0]) / (x[-1] - x[0]), 0.0)
    at_turn = y.mean() - slope * (x.mean() - x[0])
    return turn, (float(accepted.min()), float(accepted.max())), float(slope * (x[-1] - x[0]) / at_turn)


def _fall_and_rise(values_N: np.ndarray, turn: int) -> tuple[float, int]:
    """Return the sum of squares about the best curve that falls up to a place and rises from it, and its levels."""
    # not at the top: importing it adds a filter of warnings
    from scipy.optimize import isotonic_regression

    before = isotonic_regression(values_N[:turn], increasing=False) if turn else None
    after = isotonic_regression(values_N[turn:])
    fitted = after.x if before is None else np.concatenate([np.maximum(before.x, after.x[0]), after.x])
    levels = len(after.blocks) - 1 + (0 if before is None else len(before.blocks) - 1)
    return float(np.square(values_N - fitted).sum()), levels


@dataclass(frozen=True)
class Wait:
    """How long held-out loss has not become better: epochs, and the validations in them. since: index of the last gain.

    change: of the smoothed loss since then, the mean over the ranges, each weighted by its noise, as a fraction.
    """

    epochs: float
    num_validations: int
    since: int
    change: float


def wait_of(curve: Curve, min_gain: float) -> Wait | None:
    """Return for how long neither the mean of all ranges nor half of them has become better; None if unknown.

    Better: a smoothed held-out loss below the lowest before it by more than min_gain times the noise of such values.
    """
    if len(curve) < MIN_VALIDATIONS or not curve.is_sound:
        return None
    held_out = relative(curve.held_out)
    of_mean = _last_gain(combined(held_out), min_gain)
    of_bands = sorted((_last_gain(held_out[:, band], min_gain) for band in range(held_out.shape[1])), reverse=True)
    # at least half of the ranges have gained at this place or later
    of_half = of_bands[(len(of_bands) + 1) // 2 - 1]
    since, smooth = max(of_mean, of_half), smoothed(combined(held_out))
    waited = float(curve.epochs[-1] - curve.epochs[since])
    return Wait(waited, len(curve) - 1 - since, since, float(smooth[-1] / smooth[since] - 1))


def _last_gain(values: np.ndarray, min_gain: float) -> int:
    """Return the last place at which the smoothed values fell below all before by more than what fluctuates."""
    smooth, least = smoothed(values), min_gain * float(noise(values)) / np.sqrt(NUM_SMOOTHED)
    last, lowest = 0, smooth[0]
    for place, value in enumerate(smooth):
        if value < lowest - least:
            last, lowest = place, value
    return last
