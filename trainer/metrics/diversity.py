"""Diversity: how much pictures differ from each other, as the mean distance of pairs (LPIPS, features/lpips.py)."""

from __future__ import annotations

import numpy as np

from safelight.trainer.metrics.interval import Interval
from safelight.trainer.metrics.mmd import Groups
from safelight.trainer.metrics.resampling import MIN_UNITS, TooFewPictures, bootstrap, keyed, percentile_interval


def diversity(distances_NN: np.ndarray) -> Interval:
    """Return the mean distance of pictures of different prompts, or of photographs, with its bootstrap interval.

    A unit that was drawn twice is not compared with itself, which would make every draw less diverse. Raises
    TooFewPictures.
    """
    distances = np.array(distances_NN, dtype=np.float64)
    num = len(distances)
    if num < MIN_UNITS:
        raise TooFewPictures(f"{num} of the {MIN_UNITS} pictures that it needs")
    np.fill_diagonal(distances, 0)

    def statistic(counts: np.ndarray) -> np.ndarray:
        num_pairs = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
        return np.einsum("du,du->d", counts @ distances, counts) / num_pairs

    (value,) = statistic(np.ones((1, num)))
    return percentile_interval(value, bootstrap(keyed("diversity"), statistic, num), num)


def seed_diversity(distances_NN: np.ndarray, groups: Groups) -> np.ndarray:
    """Return the mean distance of the pictures of one prompt from each other, for each prompt with several: (P,).

    groups: the prompt of each picture. `mean_interval` and `paired_difference` take the result.
    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features", arXiv:1801.03924, as used for
    diversity by Zhu et al. 2017, arXiv:1711.11586.
    """
    prompts = list(dict.fromkeys(groups or ()))
    places = [[place for place, group in enumerate(groups or ()) if group == prompt] for prompt in prompts]
    return np.array(
        [distances_NN[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)].mean() for rows in places if len(rows) > 1]
    )
