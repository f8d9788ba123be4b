"""When a stage has stopped learning what carries over to other photographs: pure functions of its validations.

A validation measures the same held-out and training photographs with the same noise in N ranges of the noise schedule
(trainer/step/validate.py). Each range is taken relative to its loss when the stage began, so that one with much noise,
whose loss is small, counts as much as one with little. What fluctuates is estimated from the curve itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# a judged value is the mean of the last this many validations
NUM_SMOOTHED = 3
# fewer validations since a stage began, its start included, tell nothing of their noise
MIN_VALIDATIONS = 5
# A held-out loss has risen if its smoothed value is this fraction above its lowest, and this many times the noise of
# smoothed values. The report's verdict counts a quarter of a per cent as well (trainer/report/facts.py).
MIN_RISE = 0.0025
MIN_RISE_IN_NOISE = 4.0
# over-fitting if the loss on training photographs has risen by less than this fraction of what the held-out one has
MOST_OF_RISE = 0.5
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
        """Whether all losses are finite and those of the start are above 0, so that others can be relative to them."""
        both = (self.held_out, self.subset)
        return len(self) > 0 and all(bool(np.isfinite(x).all() and (x[0] > 0).all()) for x in both)


@dataclass(frozen=True)
class OverFitting:
    """What has been found: held-out loss rises and that on training photographs does not, or by far less.

    epoch: of the lowest held-out loss, after which the gap between the two opened. rise: fraction by which held-out
    loss has risen since. bands: indices of the ranges in which it has. gap_then, gap_now: held-out loss minus that on
    training photographs, at that epoch and at the last one.
    """

    epoch: float
    rise: float
    bands: tuple[int, ...]
    gap_then: float
    gap_now: float


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


def over_fitting(curve: Curve) -> OverFitting | None:
    """Return the over-fitting that the last validation shows, None if it shows none."""
    if len(curve) < MIN_VALIDATIONS or not curve.is_sound:
        return None
    held_out, subset = relative(curve.held_out), relative(curve.subset)
    mean = combined(held_out)
    smooth, trained = smoothed(mean), smoothed(combined(subset))
    best = int(smooth.argmin())
    least = max(MIN_RISE * smooth[best], MIN_RISE_IN_NOISE * float(noise(mean)) / np.sqrt(NUM_SMOOTHED))
    rise = float(smooth[-1] - smooth[best])
    # a loss that rises on training photographs as well is that of steps which are too large
    if not rise > least or not trained[-1] - trained[best] <= MOST_OF_RISE * rise:
        return None
    by_band = smoothed(held_out)
    rises = by_band[-1] - by_band[: best + 1].min(axis=0)
    bands = np.flatnonzero(rises > np.maximum(MIN_RISE, MIN_RISE_IN_NOISE * noise(held_out) / np.sqrt(NUM_SMOOTHED)))
    turn = int(mean[: best + 1].argmin())
    gap = (curve.held_out - curve.subset).mean(axis=1)
    return OverFitting(
        epoch=float(curve.epochs[turn]),
        rise=float(smooth[-1] / smooth[best] - 1),
        bands=tuple(bands.tolist()),
        gap_then=float(gap[turn]),
        gap_now=float(gap[-1]),
    )


def epochs_without_gain(curve: Curve, min_gain: float) -> float:
    """Return for how many epochs neither the mean of all ranges nor half of them has become better; 0 if unknown.

    Better: a smoothed held-out loss below the lowest before it by more than min_gain times the noise of such values.
    """
    if len(curve) < MIN_VALIDATIONS or not curve.is_sound:
        return 0.0
    held_out = relative(curve.held_out)
    of_mean = _last_gain(combined(held_out), min_gain)
    of_bands = sorted((_last_gain(held_out[:, band], min_gain) for band in range(held_out.shape[1])), reverse=True)
    # at least half of the ranges have gained at this place or later
    of_half = of_bands[(len(of_bands) + 1) // 2 - 1]
    return float(curve.epochs[-1] - curve.epochs[max(of_mean, of_half)])


def _last_gain(values: np.ndarray, min_gain: float) -> int:
    """Return the last place at which the smoothed values fell below all before by more than what fluctuates."""
    smooth, least = smoothed(values), min_gain * float(noise(values)) / np.sqrt(NUM_SMOOTHED)
    last, lowest = 0, smooth[0]
    for place, value in enumerate(smooth):
        if value < lowest - least:
            last, lowest = place, value
    return last
