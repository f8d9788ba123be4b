"""The Fréchet distance against its closed form and scipy's root of a matrix; its bias and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from safelight.trainer.metrics.frechet import frechet, warning


def by_roots(x: np.ndarray, y: np.ndarray) -> float:
    first, second = np.cov(x.T), np.cov(y.T)
    shift = x.mean(axis=0) - y.mean(axis=0)
    return float(shift @ shift + np.trace(first + second - 2 * sqrtm(first @ second).real))


def test_it_is_what_a_root_of_the_matrices_gives():
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(40, 6)), draws.normal(size=(30, 6)) @ draws.normal(size=(6, 6)) + 0.5
    assert frechet(x, y).value == pytest.approx(by_roots(x, y), rel=1e-9)


def test_it_is_the_closed_form_of_gaussians():
    """Diagonal covariances a^2, b^2: |shift|^2 + sum (a - b)^2."""
    draws = np.random.default_rng(1)
    x, y = draws.normal(size=(150, 4)), 2 * draws.normal(size=(150, 4)) + 1
    assert frechet(x, y).value == pytest.approx(4 * (1 + 1), rel=0.25)


def test_fewer_pictures_than_features_are_no_harm():
    draws = np.random.default_rng(2)
    x, y = draws.normal(size=(12, 40)), draws.normal(size=(9, 40))
    # the root of a singular matrix is only known to a few digits
    assert frechet(x, y).value == pytest.approx(by_roots(x, y), rel=1e-4)
    assert frechet(x, x).value == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 3).value == pytest.approx(40 * 9)


def test_it_is_symmetric_and_biased_upwards():
    draws = np.random.default_rng(3)
    x, y = draws.normal(size=(90, 16)), draws.normal(size=(90, 16))
    assert frechet(x, y).value == pytest.approx(frechet(y, x).value)
    few, many = frechet(x[:20], y[:20]), frechet(x, y)
    assert few.value > 3 * many.value > 0
    assert warning(20).startswith("Biased upwards at 20 pictures")
    assert warning(50_000) == ""


def test_copies_under_their_prompts_leave_the_limits_as_wide():
    draws = np.random.default_rng(4)
    x, y = draws.normal(size=(30, 4)), draws.normal(size=(20, 4))
    once, twice = frechet(x, y), frechet(x, np.tile(y, (2, 1)), drawn_groups=list(range(20)) * 2)
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_limits_cover_the_mean_at_this_size(shift):
    draws = np.random.default_rng(5)
    found = [frechet(draws.normal(size=(40, 8)), draws.normal(size=(40, 8)) + shift) for _ in range(300)]
    mean = np.mean([interval.value for interval in found])
    assert np.mean([interval.low <= mean <= interval.high for interval in found]) >= 0.93


def test_torch_fidelity_agrees():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed")
    draws = np.random.default_rng(6)
    x, y = draws.normal(size=(300, 16)), draws.normal(size=(200, 16)) + 0.3
    statistics = [{"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)} for rows in (x, y)]
    expected = fidelity.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet(x, y).value == pytest.approx(expected, rel=1e-4)
