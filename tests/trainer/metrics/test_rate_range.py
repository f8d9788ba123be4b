"""The rate that a range test's curve proposes, on curves whose right answer is known."""

import math

import numpy as np
import pytest

from safelight.trainer.metrics.rate_range import propose

RATES = [1e-7 * 10 ** (n / 4) for n in range(29)]
NAN = math.nan


def curve(learns_at: float, harms_at: float, depth: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Return a loss of 0.1 that falls by a fraction `depth` around learns_at and rises from harms_at on."""
    x = np.log10(RATES)
    fall = depth / (1 + np.exp(-4 * (x - math.log10(learns_at))))
    rise = np.exp(6 * (x - math.log10(harms_at)))
    scatter = np.random.default_rng(seed).normal(0, noise, len(RATES))
    return (0.1 * (1 - fall + rise + scatter)).tolist()


def lowest(losses: list[float]) -> float:
    return RATES[int(np.argmin(losses))]


@pytest.mark.parametrize("depth", [0.02, 0.1, 0.5])
@pytest.mark.parametrize(("learns_at", "harms_at"), [(1e-5, 1e-2), (1e-4, 1e-2), (3e-6, 1e-4)])
def test_the_proposed_rate_is_on_the_slope_below_the_lowest_point(learns_at, harms_at, depth):
    losses = curve(learns_at, harms_at, depth)
    found = propose(RATES, losses, 0.1)
    assert found.sureness == "clear"
    assert lowest(losses) / 10 < found.rate < lowest(losses)
    assert found.low < found.rate < found.high
    assert "the loss falls by" in found.reason


@pytest.mark.parametrize("seed", range(5))
def test_scatter_moves_it_little_and_is_not_taken_for_a_fall(seed):
    noisy = propose(RATES, curve(1e-5, 1e-2, 0.1, noise=0.004, seed=seed), 0.1)
    exact = propose(RATES, curve(1e-5, 1e-2, 0.1), 0.1)
    assert 1 / 4 < noisy.rate / exact.rate < 4
    flat = propose(RATES, curve(1e-5, 1e-2, 0.0, noise=0.02, seed=seed), 0.1)
    assert flat.sureness in ("guess", "weak")
    assert flat.rate < 1e-2


def test_without_a_fall_it_is_a_guess_far_below_the_rise():
    found = propose(RATES, curve(1e-5, 1e-3, 0.0), 0.1)
    assert found.sureness == "guess"
    rises_at = next(rate for rate, loss in zip(RATES, curve(1e-5, 1e-3, 0.0), strict=True) if loss > 0.1003)
    assert rises_at / 60 < found.rate < rises_at / 10
    assert "no rate lowers the loss" in found.reason


def test_a_fall_without_an_end_is_weak():
    found = propose(RATES[:12], curve(1e-5, 1e9, 0.5)[:12], 0.1)
    assert found.sureness == "weak"
    assert "the highest rate that was tried" in found.reason


def test_losses_that_are_not_finite_end_the_curve():
    losses = curve(1e-5, 1e-2, 0.1)
    for bad in (NAN, math.inf):
        # lower values behind it are of a broken model
        ended = [*losses[:22], bad, *[1e-9] * 6]
        assert propose(RATES, ended, 0.1) == propose(RATES[:22], losses[:22], 0.1)


@pytest.mark.parametrize(
    ("losses", "first"), [([0.1] * 29, 0.1), ([0.1, NAN, 0.1], 0.1), ([], 0.1), ([0.1] * 29, NAN), ([0.1] * 29, 0.0)]
)
def test_nothing_is_proposed_where_nothing_is_seen(losses, first):
    found = propose(RATES[: len(losses)], losses, first)
    assert (found.rate, found.low, found.high, found.sureness) == (None, None, None, "none")
