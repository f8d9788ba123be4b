"""What a learning rate range test says: a proposed rate, the range around it, and how sure that is.

The test trains while the rate rises exponentially, and after each rate measures a loss on fixed photographs, noise and
timesteps. The curve is flat while the rate is too low to change anything, falls where training learns, and rises where
it does harm. Source: Smith 2015, arXiv:1506.01186. Knows nothing of torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# a fall or rise counts if it is this many times the scatter of neighbours, and this fraction of the first loss
NUM_SCATTERS, MIN_CHANGE = 3.0, 0.003
# with this many scatters a fall is clear
CLEAR_SCATTERS = 8.0
# the proposed rate is below the lowest point of the curve by this factor: a whole run stays at its rate for longer than
# the test does
BELOW_LOWEST = 4.0
# without a fall, it is below the rate at which the loss rises by this factor
BELOW_RISE = 30.0
# rates within this factor of the proposed one are hardly better or worse
AS_GOOD = 3.0
MIN_RATES = 5

Sureness = Literal["clear", "weak", "guess", "none"]


@dataclass(frozen=True)
class Proposal:
    """rate: None if there is none. low, high: of the rates that are about as good. reason: a sentence."""

    rate: float | None
    low: float | None
    high: float | None
    sureness: Sureness
    reason: str


def propose(rates: Sequence[float], losses: Sequence[float], first_loss: float) -> Proposal:
    """Return the rate to train with.

    rates: ascending, in equal ratios. losses: after each; those from the first that is not finite on are ignored.
    first_loss: before the first rate.
    """
    y = np.asarray(losses, dtype=np.float64)
    end = len(y) if np.isfinite(y).all() else int(np.argmin(np.isfinite(y)))
    y = y[:end]
    if end < MIN_RATES or not math.isfinite(first_loss) or first_loss <= 0:
        return Proposal(None, None, None, "none", f"only {end} rates have a finite loss: too few to tell anything")
    smooth = _smoothed(y)
    scatter = _scatter(y, smooth)
    least = max(NUM_SCATTERS * scatter, MIN_CHANGE * first_loss)
    lowest = int(np.argmin(smooth))
    depth = first_loss - smooth[lowest]
    if depth >= least:
        rate = rates[lowest] / BELOW_LOWEST
        is_clear = depth >= CLEAR_SCATTERS * scatter and lowest < end - 1
        fall = f"the loss falls by {100 * depth / first_loss:.2g} %, lowest at {rates[lowest]:.1e}"
        if lowest == end - 1:
            fall += ", the highest rate that was tried"
        return Proposal(
            _rounded(rate), _rounded(rate / AS_GOOD), _rounded(rate * AS_GOOD), "clear" if is_clear else "weak", fall
        )
    risen = np.flatnonzero(smooth > first_loss + least)
    if len(risen):
        rises_at = rates[int(risen[0])]
        rate = rises_at / BELOW_RISE
        reason = f"no rate lowers the loss within the test, and from {rises_at:.1e} on it rises"
        return Proposal(_rounded(rate), _rounded(rate / AS_GOOD**2), _rounded(rate * AS_GOOD), "guess", reason)
    return Proposal(None, None, None, "none", "the loss neither falls nor rises at any of the rates")


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Return the mean of each value, counted twice, and its neighbours; the ends stand for those they lack."""
    padded = np.concatenate([y[:1], y, y[-1:]])
    return (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4


def _scatter(y: np.ndarray, smooth: np.ndarray) -> float:
    """Return the standard deviation of neighbours around a smooth curve, up to the lowest point of the curve.

    From second differences, which a straight line does not have; by their median, which a few large steps do not move.
    """
    part = y[: max(4, int(np.argmin(smooth)) + 1)]
    second = np.diff(part, 2)
    return float(np.median(np.abs(second)) / 0.6745 / math.sqrt(6))


def _rounded(rate: float) -> float:
    """Return a rate with two digits, which is more than the test can tell."""
    return float(f"{rate:.1e}")
