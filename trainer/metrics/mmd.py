"""Squared maximum mean discrepancy (MMD): how far two sets of features are apart, 0 if they are of one distribution.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

over independent x, x' and y, y'. The estimate leaves out pairs of a picture with itself and pairs within one prompt,
which are not independent, and is therefore unbiased: around 0, also below it, for equal distributions, however few
pictures there are.
Source: Gretton et al. 2012, "A kernel two-sample test", JMLR 13.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from safelight.trainer.metrics.interval import Interval
from safelight.trainer.metrics.resampling import (
    bootstrap,
    keyed,
    percentile_interval,
    sign_flips,
    two_sided_p,
    units_of,
)

# of (N, D) and (M, D) features, returns (N, M)
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
Groups = Sequence[Hashable] | None
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


class SetDifference(NamedTuple):
    """What a metric of whole sets changes by from the base to a trained model. p: of sign flips of whole prompts."""

    interval: Interval
    p: float


def mmd(
    real_ND: np.ndarray,
    drawn_MD: np.ndarray,
    kernel: Kernel,
    real_groups: Groups = None,
    drawn_groups: Groups = None,
    name: str = "mmd",
) -> Interval:
    """Return the unbiased MMD^2 of two sets of features, with its bootstrap interval.

    real_groups, drawn_groups: of the rows, see `units_of`. name: of the metric, for its draws. Raises TooFewPictures.
    """
    real, drawn = _Side(real_ND, kernel, real_groups), _Side(drawn_MD, kernel, drawn_groups)
    cross = _summed(kernel(real.features, drawn.features), real.unit, drawn.unit)

    def statistic(real_counts: np.ndarray, drawn_counts: np.ndarray) -> np.ndarray:
        apart = _cross_mean(cross, real, real_counts, drawn, drawn_counts)
        return real.mean(real_counts) + drawn.mean(drawn_counts) - 2 * apart

    (value,) = statistic(np.ones((1, real.num_units)), np.ones((1, drawn.num_units)))
    draws = bootstrap(keyed(name), statistic, real.num_units, drawn.num_units)
    return percentile_interval(value, draws, min(real.num_units, drawn.num_units))


def mmd_difference(
    real_ND: np.ndarray,
    base_MD: np.ndarray,
    trained_MD: np.ndarray,
    kernel: Kernel,
    real_groups: Groups = None,
    groups: Groups = None,
    name: str = "mmd",
) -> SetDifference:
    """Return MMD^2(real, trained) - MMD^2(real, base), below 0 if the trained model is closer to the photographs.

    base_MD, trained_MD: row i of both is of one prompt and one noise; a bootstrap draw takes both or neither, and a
    flip exchanges all pictures of a prompt. groups: of these rows. Raises TooFewPictures.
    """
    if len(base_MD) != len(trained_MD):
        raise ValueError(f"{len(base_MD)} pictures of the base and {len(trained_MD)} of the trained make no pairs")
    unit, num = units_of(groups, len(base_MD))
    real = _Side(real_ND, kernel, real_groups)
    # the units of the base, then those of the trained model
    both = _Side(np.concatenate([base_MD, trained_MD]), kernel, np.concatenate([unit, unit + num]).tolist())
    cross = _summed(kernel(real.features, both.features), real.unit, both.unit)

    def distance(real_counts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        # what photographs have among themselves is the same in both
        return both.mean(counts) - 2 * _cross_mean(cross, real, real_counts, both, counts)

    def statistic(real_counts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        none = np.zeros_like(counts)
        trained, base = np.hstack([none, counts]), np.hstack([counts, none])
        return distance(real_counts, trained) - distance(real_counts, base)

    generator = keyed(name)
    every = np.ones((1, real.num_units))
    (value,) = statistic(every, np.ones((1, num)))
    draws = bootstrap(generator, statistic, real.num_units, num)
    signs, is_complete = sign_flips(generator, num)
    kept = (1 + signs) / 2
    flipped = distance(every, np.hstack([1 - kept, kept])) - distance(every, np.hstack([kept, 1 - kept]))
    interval = percentile_interval(value, draws, min(real.num_units, num))
    return SetDifference(interval, two_sided_p(value, flipped, is_complete))


def cmmd(
    real_ND: np.ndarray, drawn_MD: np.ndarray, real_groups: Groups = None, drawn_groups: Groups = None
) -> Interval:
    """Return the CMMD of CLIP features times 1000, with its bootstrap interval. Raises TooFewPictures.

    Gaussian kernel, sigma 10, on features of length 1. The published code keeps pairs of a picture with itself, for
    which k = 1, so that few pictures look worse than many; here they are left out.
    Source: Jayasumana et al. 2024, "Rethinking FID", arXiv:2401.09603.
    """
    return scaled(mmd(real_ND, drawn_MD, cmmd_kernel, real_groups, drawn_groups, "cmmd"), CMMD_SCALE)


def cmmd_difference(
    real_ND: np.ndarray,
    base_MD: np.ndarray,
    trained_MD: np.ndarray,
    real_groups: Groups = None,
    groups: Groups = None,
) -> SetDifference:
    """Return the CMMD of the trained model minus that of the base, see `mmd_difference`."""
    found = mmd_difference(real_ND, base_MD, trained_MD, cmmd_kernel, real_groups, groups, "cmmd")
    return SetDifference(scaled(found.interval, CMMD_SCALE), found.p)


def cmmd_kernel(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """Return exp(-|x - y|^2 / (2 sigma^2)) of features scaled to length 1: (N, M)."""
    # |x - y|^2 = 2 - 2 x.y
    return np.exp((unit_length(x_ND) @ unit_length(y_MD).T - 1) / CMMD_SIGMA**2)


def unit_length(features_ND: np.ndarray) -> np.ndarray:
    """Return each row scaled to length 1, a row of zeros as it is."""
    features = np.asarray(features_ND, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths == 0, 1, lengths)


def scaled(interval: Interval, factor: float) -> Interval:
    """Return an interval in another unit."""
    return Interval(*(factor * value for value in interval))


class _Side:
    """One set's features, and its kernel summed over pairs of different units."""

    def __init__(self, features: np.ndarray, kernel: Kernel, groups: Groups):
        self.features = np.asarray(features, dtype=np.float64)
        self.unit, self.num_units = units_of(groups, len(self.features))
        self.sizes = np.bincount(self.unit, minlength=self.num_units).astype(np.float64)
        self._sums = _summed(kernel(self.features, self.features), self.unit, self.unit)
        np.fill_diagonal(self._sums, 0)

    def mean(self, counts: np.ndarray) -> np.ndarray:
        """Return the mean of the kernel over pairs of different units, drawn as often as (draws, units) counts say."""
        pictures = counts * self.sizes
        num_pairs = pictures.sum(axis=1) ** 2 - (pictures**2).sum(axis=1)
        return np.einsum("du,du->d", counts @ self._sums, counts) / num_pairs


def _summed(kernel_NM: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the kernel summed over the pictures of each pair of units. rows, columns: their units."""
    sums = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(sums, (rows[:, None], columns), kernel_NM)
    return sums


def _cross_mean(
    sums: np.ndarray, first: _Side, first_counts: np.ndarray, second: _Side, second_counts: np.ndarray
) -> np.ndarray:
    num_pairs = (first_counts @ first.sizes) * (second_counts @ second.sizes)
    return np.einsum("du,du->d", first_counts @ sums, second_counts) / num_pairs
