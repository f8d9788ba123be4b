"""Density and coverage: whether drawn pictures lie where photographs lie, and whether they lie everywhere there.

    density  = 1 / (k M) sum_j sum_i [Y_j in B(X_i, NND_k(X_i))]
    coverage = 1 / N sum_i [some Y_j in B(X_i, NND_k(X_i))]

X are N photographs, Y are M drawn pictures, NND_k is the distance to the k-th nearest other photograph.
Source: Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models", arXiv:2002.09797.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from safelight.trainer.metrics.exceedance import share_interval
from safelight.trainer.metrics.interval import Interval
from safelight.trainer.metrics.mmd import Groups
from safelight.trainer.metrics.resampling import TooFewPictures, blocks, jackknife_interval, units_of

K = 5


class Neighbours(NamedTuple):
    """density: 1 for a perfect model, more if pictures crowd where photographs are densest. coverage: from 0 to 1.

    perfect_coverage: what a perfect model has on average with as many pictures and photographs.
    """

    density: Interval
    coverage: Interval
    perfect_coverage: float


def neighbours(
    real_ND: np.ndarray, drawn_MD: np.ndarray, real_groups: Groups = None, drawn_groups: Groups = None, k: int = K
) -> Neighbours:
    """Return density and coverage, with limits of the jackknife.

    Both depend on N and M; the limits are of what other sets of these sizes would give. Those of coverage are at least
    as wide as those of a share of as many independent pictures. groups: see `units_of`. Raises
    TooFewPictures if a set has fewer than k + 2 pictures.
    """
    real, drawn = np.asarray(real_ND, dtype=np.float64), np.asarray(drawn_MD, dtype=np.float64)
    if min(len(real), len(drawn)) < k + 2:
        raise TooFewPictures(f"{min(len(real), len(drawn))} of the {k + 2} pictures that it needs")
    kept_real = blocks(*units_of(real_groups, len(real)))
    kept_drawn = blocks(*units_of(drawn_groups, len(drawn)))
    if min(kept.sum() for kept in kept_real) < k + 1:
        raise TooFewPictures(f"without one group of photographs, fewer than the {k + 1} that it needs")
    among, apart = _distances(real, real), _distances(real, drawn)
    np.fill_diagonal(among, np.inf)
    radii = np.partition(among, k - 1, axis=1)[:, k - 1]
    is_inside = apart <= radii[:, None]
    without_drawn = [_figures(is_inside[:, kept], k) for kept in kept_drawn]
    without_real = []
    for kept in kept_real:
        # only those of which a neighbour went have another radius
        has_lost = kept & (among[:, ~kept].min(axis=1) <= radii)
        inside = is_inside.copy()
        if has_lost.any():
            found = np.partition(among[np.ix_(has_lost, kept)], k - 1, axis=1)[:, k - 1]
            inside[has_lost] = apart[has_lost] <= found[:, None]
        without_real.append(_figures(inside[kept], k))
    parts = [np.array(without_real).T, np.array(without_drawn).T]
    density, coverage = (
        jackknife_interval(value, *(part[place] for part in parts))
        for place, value in enumerate(_figures(is_inside, k))
    )
    # where all or none are covered, leaving one out changes nothing, and the jackknife claims to be sure
    num_sure = min(len(kept_real), len(kept_drawn))
    least = share_interval(round(coverage.value * num_sure), num_sure)
    return Neighbours(
        Interval(density.value, max(0.0, density.low), density.high),
        Interval(
            coverage.value,
            max(0.0, min(coverage.low, least.low)),
            min(1.0, max(coverage.high, least.high)),
        ),
        expected_coverage(len(real), len(drawn), k),
    )


def expected_coverage(num_real: int, num_drawn: int, k: int = K) -> float:
    """Return the mean coverage of pictures that are distributed as the photographs, near 1 - 2^-k for equal numbers.

    The chance that, of the other photographs and the pictures, the k nearest to a photograph are all photographs.
    """
    others = np.arange(k)
    return 1 - float(np.prod((num_real - 1 - others) / (num_real - 1 + num_drawn - others)))


def _figures(is_inside_NM: np.ndarray, k: int) -> tuple[float, float]:
    """Return (density, coverage)."""
    num_drawn = is_inside_NM.shape[1]
    return float(is_inside_NM.sum()) / (k * num_drawn), float(is_inside_NM.any(axis=1).mean())


def _distances(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    squares = (x_ND**2).sum(axis=1)[:, None] + (y_MD**2).sum(axis=1) - 2 * x_ND @ y_MD.T
    return np.sqrt(np.maximum(squares, 0))
