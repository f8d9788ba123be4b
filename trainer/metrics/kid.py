"""Kernel Inception distance (KID): the headline at about 100 pictures, because it is unbiased at any number."""

from __future__ import annotations

import numpy as np

from safelight.trainer.metrics.interval import Interval
from safelight.trainer.metrics.mmd import Groups, SetDifference, mmd, mmd_difference, scaled

SCALE = 1000.0


def kid(real_ND: np.ndarray, drawn_MD: np.ndarray, real_groups: Groups = None, drawn_groups: Groups = None) -> Interval:
    """Return KID times 1000 of two sets of features, with its bootstrap interval: around 0 for equal distributions.

    All pictures are one block, where large sets are usually averaged over blocks of 1000. groups: of the rows, see
    `units_of`. Raises TooFewPictures.
    Source: Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401.
    """
    return scaled(mmd(real_ND, drawn_MD, polynomial_kernel, real_groups, drawn_groups, "kid"), SCALE)


def kid_difference(
    real_ND: np.ndarray,
    base_MD: np.ndarray,
    trained_MD: np.ndarray,
    real_groups: Groups = None,
    groups: Groups = None,
) -> SetDifference:
    """Return the KID of the trained model minus that of the base, times 1000, see `mmd_difference`."""
    found = mmd_difference(real_ND, base_MD, trained_MD, polynomial_kernel, real_groups, groups, "kid")
    return SetDifference(scaled(found.interval, SCALE), found.p)


def polynomial_kernel(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """Return (x.y / D + 1)^3: (N, M)."""
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3
