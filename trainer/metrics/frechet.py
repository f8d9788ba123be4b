"""Fréchet distance of two sets of features: FID on Inception's, FD-DINOv2 on DINOv2's."""

from __future__ import annotations

import numpy as np

from safelight.trainer.metrics.interval import Interval
from safelight.trainer.metrics.mmd import Groups
from safelight.trainer.metrics.resampling import blocks, jackknife_interval, units_of

# below it the covariance of 2048 features is mostly unknown; the usual advice is 50,000
SOUND_NUM = 10_000


def frechet(
    real_ND: np.ndarray, drawn_MD: np.ndarray, real_groups: Groups = None, drawn_groups: Groups = None
) -> Interval:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with limits of the jackknife.

    It is too large by about 1 / n of its own scale, so that only figures of equally many pictures can be compared; the
    limits are of what other sets of this size would give, not of the true distance. groups: see `units_of`. Raises
    TooFewPictures.
    Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule", arXiv:1706.08500.
    """
    real, drawn = np.asarray(real_ND, dtype=np.float64), np.asarray(drawn_MD, dtype=np.float64)
    products = real @ drawn.T
    real_unit, drawn_unit = units_of(real_groups, len(real)), units_of(drawn_groups, len(drawn))
    without_real = [_distance(real[kept], drawn, products[kept]) for kept in blocks(*real_unit)]
    without_drawn = [_distance(real, drawn[kept], products[:, kept]) for kept in blocks(*drawn_unit)]
    return jackknife_interval(_distance(real, drawn, products), np.array(without_real), np.array(without_drawn))


def warning(num: int) -> str:
    """Return what has to be said beside a Fréchet distance of so many pictures, "" if there are enough."""
    if num >= SOUND_NUM:
        return ""
    return (
        f"Biased upwards at {num:,} pictures: even two halves of the same photographs are far apart. Compare it only "
        "between models with equally many pictures, and rely on KID."
    )


def _distance(x_ND: np.ndarray, y_MD: np.ndarray, products_NM: np.ndarray) -> float:
    """Return the distance. products_NM: X Y'.

    The trace of (S1 S2)^(1/2) is the nuclear norm of the centred sets' product: with S1 = X'X and S2 = Y'Y, S1 S2 has
    the nonzero eigenvalues of (X Y')(X Y')'. So no root of a D x D matrix is taken, which fails when there are fewer
    pictures than features.
    """
    shift = x_ND.mean(axis=0) - y_MD.mean(axis=0)
    # centring both sets centres rows and columns of their product
    centred = products_NM - products_NM.mean(axis=0) - products_NM.mean(axis=1, keepdims=True) + products_NM.mean()
    centred /= np.sqrt((len(x_ND) - 1) * (len(y_MD) - 1))
    root_trace = np.linalg.svd(centred, compute_uv=False).sum()
    variances = x_ND.var(axis=0, ddof=1).sum() + y_MD.var(axis=0, ddof=1).sum()
    return float(shift @ shift + variances - 2 * root_trace)
