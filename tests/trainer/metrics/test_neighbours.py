"""Density and coverage: their definition, what a perfect model has, and what too tight and too wide sets have."""

from __future__ import annotations

import numpy as np
import pytest

from safelight.trainer.metrics.exceedance import share_interval
from safelight.trainer.metrics.neighbours import expected_coverage, neighbours
from safelight.trainer.metrics.resampling import TooFewPictures


def by_definition(real: np.ndarray, drawn: np.ndarray, k: int) -> tuple[float, float]:
    radii = [sorted(np.linalg.norm(real - x, axis=1))[k] for x in real]
    inside = [[np.linalg.norm(x - y) <= radius for y in drawn] for x, radius in zip(real, radii, strict=True)]
    return np.sum(inside) / (k * len(drawn)), np.mean([any(row) for row in inside])


def test_they_are_what_the_paper_defines():
    draws = np.random.default_rng(0)
    real, drawn = draws.normal(size=(23, 3)), 0.8 * draws.normal(size=(17, 3)) + 0.4
    found = neighbours(real, drawn)
    assert (found.density.value, found.coverage.value) == pytest.approx(by_definition(real, drawn, 5))


def test_what_a_jackknife_leaves_out_is_as_if_it_had_not_been_there():
    """The variance of figures computed anew without each picture and without each photograph."""
    draws = np.random.default_rng(1)
    real, drawn = draws.normal(size=(30, 2)), 0.2 * draws.normal(size=(9, 2)) + 1
    variances = np.zeros(2)
    for rows, without in ((real, lambda kept: (kept, drawn)), (drawn, lambda kept: (real, kept))):
        found = [by_definition(*without(np.delete(rows, place, axis=0)), 5) for place in range(len(rows))]
        variances += (len(rows) - 1) * np.var(found, axis=0)
    found = neighbours(real, drawn)
    # of Student's t with 8 degrees of freedom
    assert found.density.high - found.density.value == pytest.approx(2.3060 * variances[0] ** 0.5, rel=1e-4)
    half, least = 2.3060 * variances[1] ** 0.5, share_interval(round(9 * found.coverage.value), 9)
    assert half > 0.1
    assert found.coverage.low == pytest.approx(min(found.coverage.value - half, least.low), abs=1e-4)
    assert found.coverage.high == pytest.approx(max(found.coverage.value + half, least.high), abs=1e-4)


def test_full_coverage_is_not_certain():
    """Every photograph has several pictures near it, so that none is missed; a share of 20 of 20 is 0.83 or more."""
    draws = np.random.default_rng(6)
    real = draws.normal(size=(20, 2))
    found = neighbours(real, np.concatenate([real, real + 1e-3]), drawn_groups=list(range(20)) * 2)
    assert found.coverage == pytest.approx((1, 0.05 ** (1 / 20) * 0.966, 1), abs=0.01)


@pytest.mark.parametrize(("num_real", "num_drawn", "k"), [(40, 40, 5), (60, 15, 3), (20, 50, 2)])
def test_a_perfect_model_has_the_expected_coverage_and_a_density_of_1(num_real, num_drawn, k):
    draws = np.random.default_rng(2)
    found = [neighbours(draws.normal(size=(num_real, 4)), draws.normal(size=(num_drawn, 4)), k=k) for _ in range(30)]
    coverage = [one.coverage.value for one in found]
    expected = expected_coverage(num_real, num_drawn, k)
    assert np.mean(coverage) == pytest.approx(expected, abs=4 * np.std(coverage) / 5)
    assert found[0].perfect_coverage == expected
    assert np.mean([one.density.value for one in found]) == pytest.approx(1, abs=0.15)


def test_expected_coverage_is_near_1_minus_2_to_the_minus_k():
    for k in (1, 3, 5):
        assert expected_coverage(100_000, 100_000, k) == pytest.approx(1 - 2.0**-k, abs=1e-4)


def test_pictures_of_one_kind_are_dense_and_cover_little():
    draws = np.random.default_rng(3)
    real = draws.normal(size=(80, 4))
    tight, wide = neighbours(real, 0.1 * draws.normal(size=(80, 4))), neighbours(real, 4 * draws.normal(size=(80, 4)))
    assert tight.density.low > 1
    assert tight.coverage.high < 0.9
    assert wide.density.high < 0.3
    assert 0 <= wide.coverage.low <= wide.coverage.high <= 1


def test_too_few_pictures_are_refused():
    draws = np.random.default_rng(4)
    with pytest.raises(TooFewPictures, match="6 of the 7 pictures"):
        neighbours(draws.normal(size=(20, 2)), draws.normal(size=(6, 2)))
    with pytest.raises(TooFewPictures, match="without one group"):
        neighbours(draws.normal(size=(9, 2)), draws.normal(size=(9, 2)), real_groups=[0, 0, 0, 0, 0, 1, 2, 3, 4])


@pytest.mark.slow
def test_limits_cover_the_mean_at_this_size():
    draws = np.random.default_rng(5)
    found = [neighbours(draws.normal(size=(40, 4)), draws.normal(size=(40, 4)) + 0.5) for _ in range(300)]
    for intervals in ([one.density for one in found], [one.coverage for one in found]):
        mean = np.mean([interval.value for interval in intervals])
        assert np.mean([interval.low <= mean <= interval.high for interval in intervals]) >= 0.93
