"""Divergences between two sets of vectors, for many ways of dividing the same vectors into two sets at once.

A division is a row of two masks, `first` and `second`: (P, N), bool, with at least two vectors in each. Means and
covariances of all divisions come from a few matrix products, so that a permutation test of thousands is cheap.
"""

from __future__ import annotations

import numpy as np

# of the mean variance of all vectors; keeps covariances invertible where those of a set hardly vary
LEAST_VARIANCE = 1e-6
# entries of the largest temporary array
_CHUNK = 2**22


def gaussian_kl(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return KL(first || second) of each division in nats: (P,).

    Both sets are taken as Gaussians. Each covariance is shrunk towards the pooled within-set covariance by as much as
    Ledoit and Wolf say for vectors whitened by it. That is the same as whitening first and shrinking each towards a
    multiple of the identity, because the divergence does not change under linear maps. The pooled one is shrunk towards
    a multiple of the identity itself.

    x: (N, d). Biased upwards by several tenths for a few dozen vectors, so it is compared with permutations.
    Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(axis=0)
    x = x / (np.sqrt((x * x).mean()) or 1)
    outer = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    rows = max(1, _CHUNK // max(len(x), outer.shape[1]))
    chunks = [slice(start, start + rows) for start in range(0, len(first), rows)]
    return np.concatenate([_gaussian_kl(x, outer, first[chunk], second[chunk]) for chunk in chunks])


def _gaussian_kl(x, outer, first, second) -> np.ndarray:
    d = x.shape[1]
    (num1, mean1, cov1), (num2, mean2, cov2) = _moments(x, outer, first), _moments(x, outer, second)
    num = num1 + num2
    within = (num1[:, None, None] * cov1 + num2[:, None, None] * cov2) / num[:, None, None]
    identity = np.broadcast_to(np.eye(d), within.shape)
    fourth = sum(
        (mask * _lengths(x, outer, mean, identity) ** 2).sum(1) for mask, mean in ((first, mean1), (second, mean2))
    )
    pooled = _shrunk(within, identity, within, fourth, num) + LEAST_VARIANCE * identity
    precision = np.linalg.inv(pooled)
    sets = []
    for mask, n, mean, cov in ((first, num1, mean1, cov1), (second, num2, mean2, cov2)):
        fourth = (mask * _lengths(x, outer, mean, precision) ** 2).sum(1)
        sets.append(_shrunk(cov, pooled, precision @ cov, fourth, n) + LEAST_VARIANCE * pooled)
    shrunk1, shrunk2 = sets
    inverse2 = np.linalg.inv(shrunk2)
    shift = mean2 - mean1
    distance = np.einsum("pi,pij,pj->p", shift, inverse2, shift)
    trace = np.einsum("pij,pji->p", inverse2, shrunk1)
    return 0.5 * (trace + distance - d + np.linalg.slogdet(shrunk2)[1] - np.linalg.slogdet(shrunk1)[1])


def _moments(x, outer, mask):
    """Return (number, mean, maximum-likelihood covariance) of the vectors in each row of a mask."""
    mask = mask.astype(np.float64)
    num = mask.sum(1)
    mean = mask @ x / num[:, None]
    second = (mask @ outer / num[:, None]).reshape(len(mask), x.shape[1], x.shape[1])
    return num, mean, second - mean[:, :, None] * mean[:, None, :]


def _lengths(x, outer, mean, precision) -> np.ndarray:
    """Return (x - mean)' precision (x - mean): (P, N)."""
    scaled = np.einsum("pij,pj->pi", precision, mean)
    return precision.reshape(len(mean), -1) @ outer.T - 2 * scaled @ x.T + (scaled * mean).sum(1)[:, None]


def _shrunk(cov, target, whitened, fourth, num) -> np.ndarray:
    """Return (1 - s) cov + s mu target, where s and mu are Ledoit's and Wolf's for the whitened covariance.

    whitened: target^-1 cov, of which only traces are used. fourth: sum over vectors of their whitened length to the 4.
    """
    d = cov.shape[-1]
    mu = np.einsum("pii->p", whitened) / d
    squared = np.einsum("pij,pji->p", whitened, whitened)
    spread = np.maximum(squared - d * mu**2, 0)
    noise = np.clip((fourth / num - squared) / num, 0, spread)
    share = np.divide(noise, spread, out=np.zeros_like(noise), where=spread > 0)[:, None, None]
    return (1 - share) * cov + share * mu[:, None, None] * target


def median_mmd(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the unbiased squared maximum mean discrepancy of each division: (P,).

    The kernel is Gaussian, exp(-|x - y|^2 / (2 s^2)), with s the median distance of all pairs of vectors, which no
    division changes. Below zero where the sets are more alike than chance makes them.
    Source: Gretton et al. 2012, "A kernel two-sample test", JMLR 13.
    """
    x = np.asarray(x, dtype=np.float64)
    # what is nearer than this is equal but for rounding
    least = max(1e-12 * float((x * x).mean()), np.finfo(np.float64).tiny)
    x = x - x.mean(axis=0)
    lengths = (x * x).sum(1)
    distances = np.maximum(lengths[:, None] + lengths - 2 * x @ x.T, 0)
    median = np.median(distances[np.triu_indices(len(x), 1)])
    kernel = np.exp(-distances / (2 * max(median, least)))
    np.fill_diagonal(kernel, 0)
    first, second = first.astype(np.float64), second.astype(np.float64)
    to_first, to_second = first @ kernel, second @ kernel
    num1, num2 = first.sum(1), second.sum(1)
    within1, within2 = (
        (to_first * first).sum(1) / (num1 * (num1 - 1)),
        (to_second * second).sum(1) / (num2 * (num2 - 1)),
    )
    return within1 + within2 - 2 * (to_first * second).sum(1) / (num1 * num2)
