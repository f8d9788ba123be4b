"""Differences between two models that drew the same prompts from the same noise."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from safelight.trainer.metrics.interval import Interval
from safelight.trainer.metrics.mmd import Groups
from safelight.trainer.metrics.resampling import (
    bootstrap,
    keyed,
    percentile_interval,
    sign_flips,
    two_sided_p,
    unit_means,
)

# what sums in another order leave of 0
_TIE = 1e-9


class PairedDifference(NamedTuple):
    """Trained minus base per prompt: the mean with its bootstrap interval, and p of a sign-flip permutation test.

    wins, ties, losses: prompts for which the trained model is better, equal and worse.
    """

    interval: Interval
    p: float
    wins: int
    ties: int
    losses: int


def paired_difference(
    base: np.ndarray,
    trained: np.ndarray,
    groups: Groups = None,
    better: Literal["higher", "lower"] = "higher",
    name: str = "paired",
) -> PairedDifference:
    """Return the difference between two models' values of pictures, (N,) each; value i is of one prompt and noise.

    Several pictures of a prompt count as one: their mean. groups: the prompts, see `units_of`; name: of the metric.
    p is two-sided, over all sign flips up to 13 prompts and 10,000 drawn ones beyond. Raises TooFewPictures.
    Source: Good 2005, "Permutation, Parametric, and Bootstrap Tests of Hypotheses", paired comparisons.
    """
    base, trained = np.asarray(base, dtype=np.float64), np.asarray(trained, dtype=np.float64)
    if base.shape != trained.shape:
        raise ValueError(f"{len(base)} values of the base and {len(trained)} of the trained model make no pairs")
    differences = unit_means(trained - base, groups)
    is_tie = np.abs(differences) <= _TIE * np.abs([base, trained]).max()
    differences[is_tie] = 0
    num = len(differences)
    generator = keyed(name)
    draws = bootstrap(generator, lambda counts: counts @ differences / num, num)
    signs, is_complete = sign_flips(generator, num)
    p = two_sided_p(differences.mean(), signs @ differences / num, is_complete)
    is_win = ~is_tie & ((differences > 0) == (better == "higher"))
    interval = percentile_interval(differences.mean(), draws, num)
    return PairedDifference(interval, p, int(is_win.sum()), int(is_tie.sum()), int((~is_tie & ~is_win).sum()))
