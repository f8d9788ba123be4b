"""KID and CMMD: closed forms, what an unbiased estimate is, prompts with several pictures, differences."""

from __future__ import annotations

import numpy as np
import pytest

from safelight.trainer.metrics import resampling
from safelight.trainer.metrics.kid import kid, kid_difference, polynomial_kernel
from safelight.trainer.metrics.mmd import CMMD_SCALE, cmmd, cmmd_difference, cmmd_kernel, mmd, unit_length
from safelight.trainer.metrics.resampling import TooFewPictures


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(resampling, "NUM_DRAWS", 1000)


def normal(seed: int, num: int, width: int = 8, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, width)) + shift


def gaussian_kid(shift: np.ndarray) -> float:
    """Return KID x 1000 of N(0, 1) and N(shift, 1) in D dimensions.

    With s = x.y / D, E (s + 1)^3 = 1 + 3 E s + 3 E s^2 + E s^3 for independent x, y.
    """
    width = len(shift)

    def expected(m: np.ndarray, n: np.ndarray) -> float:
        mn, mm, nn = m @ n, m @ m, n @ n
        first = mn / width
        second = (mn**2 + mm + nn + width) / width**2
        # of Isserlis' theorem, for y first: E (x.y)^3 = E [(x.n)^3 + 3 (x.n) |x|^2]
        third = (mn**3 + 3 * mn * nn + 3 * (mn * (mm + width) + 2 * mn)) / width**3
        return 1 + 3 * first + 3 * second + third

    zero = np.zeros(width)
    return 1000 * (expected(zero, zero) + expected(shift, shift) - 2 * expected(zero, shift))


def naive(real: np.ndarray, drawn: np.ndarray, kernel) -> float:
    """Return the unbiased estimate, pair by pair."""

    def within(rows: np.ndarray) -> float:
        pairs = [kernel(rows[i : i + 1], rows[j : j + 1]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return float(np.mean(pairs))

    apart = np.mean([kernel(x[None], y[None]) for x in real for y in drawn])
    return within(real) + within(drawn) - 2 * float(apart)


@pytest.mark.parametrize(("figure", "kernel"), [(kid, polynomial_kernel), (cmmd, cmmd_kernel)])
def test_the_value_is_the_mean_over_pairs(figure, kernel):
    real, drawn = normal(0, 7), normal(1, 6, shift=0.5)
    assert figure(real, drawn).value == pytest.approx(1000 * naive(real, drawn, kernel), rel=1e-9)


def test_the_polynomial_kernel_is_kids():
    assert polynomial_kernel(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])) == pytest.approx((11 / 2 + 1) ** 3)


def test_the_kernel_of_cmmd_sees_directions_only():
    x = np.array([[3.0, 0.0], [0.0, 0.1]])
    assert cmmd_kernel(x, x) == pytest.approx(np.array([[1, np.exp(-2 / 200)], [np.exp(-2 / 200), 1]]))
    assert unit_length(np.zeros((1, 2))).tolist() == [[0, 0]]


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6])
def test_kid_of_gaussians_is_the_closed_form_on_average(shift):
    truth = gaussian_kid(np.full(8, shift))
    found = [kid(normal(2 * seed, 30), normal(2 * seed + 1, 20, shift=shift)).value for seed in range(36)]
    assert np.mean(found) == pytest.approx(truth, abs=3.5 * np.std(found) / 6)


def test_cmmd_of_points_is_the_closed_form():
    """Two sets of one direction each, at an angle: k is 1 within and exp((cos - 1) / 100) between."""
    angle = np.deg2rad(60)
    first, second = np.tile([2.0, 0], (6, 1)), np.tile([np.cos(angle), np.sin(angle)], (7, 1))
    assert cmmd(first, second).value == pytest.approx(CMMD_SCALE * 2 * (1 - np.exp((0.5 - 1) / 100)))


def test_a_set_is_not_apart_from_itself():
    """The same pictures in both sets: below 0 by what self-pairs add, not above."""
    real = normal(0, 60)
    assert kid(real, real).value < 0
    assert kid(real, normal(1, 60)).low < 0 < kid(real, normal(1, 60)).high


def test_figures_do_not_depend_on_the_order_and_are_the_same_again():
    real, drawn = normal(0, 20), normal(1, 15, shift=0.4)
    assert kid(real, drawn) == kid(real, drawn)
    assert kid(real[::-1], drawn[::-1]).value == pytest.approx(kid(real, drawn).value)


def test_several_pictures_of_a_prompt_count_as_one():
    """Copies of a picture under its prompt change nothing: neither the value nor how sure it is."""
    real, drawn = normal(0, 30), normal(1, 12, shift=0.4)
    once = kid(real, drawn)
    prompts = [f"prompt {number % 12}" for number in range(36)]
    thrice = kid(real, np.tile(drawn, (3, 1)), drawn_groups=prompts)
    assert thrice == pytest.approx(once)
    # by themselves, they look closer to each other than they are, and surer
    apart = kid(real, np.tile(drawn, (3, 1)))
    assert apart.value > once.value
    assert apart.high - apart.low < once.high - once.low


def test_a_difference_is_of_the_same_prompts():
    real, base = normal(0, 40), normal(1, 20, shift=0.6)
    noise = normal(2, 20)
    trained = base - 0.4 + 0.1 * noise
    found = kid_difference(real, base, trained)
    assert found.interval.value == pytest.approx(kid(real, trained).value - kid(real, base).value)
    assert found.interval.high < 0
    assert found.p < 0.01
    back = kid_difference(real, trained, base)
    assert back.interval.value == pytest.approx(-found.interval.value)
    assert back.p == pytest.approx(found.p, abs=0.01)
    # the pairs make it surer than two figures by themselves
    assert found.interval.high - found.interval.low < kid(real, base).high - kid(real, base).low


def test_equal_models_do_not_differ():
    real, base = normal(0, 40), normal(1, 20)
    for difference in (kid_difference, cmmd_difference):
        found = difference(real, base, base)
        assert found.interval == pytest.approx((0, 0, 0), abs=1e-9)
        assert found.p == 1


def test_prompts_of_a_difference_are_flipped_whole():
    real, base = normal(0, 20), normal(1, 18, shift=0.2)
    prompts = list(range(6)) * 3
    # all flips of six prompts
    assert kid_difference(real, base, base + 0.3, groups=prompts).p * 64 == pytest.approx(2)


def test_sets_that_are_too_small_or_no_pairs_are_refused():
    with pytest.raises(TooFewPictures, match="4 of the 5"):
        kid(normal(0, 20), normal(1, 4))
    with pytest.raises(TooFewPictures, match="3 of the 5"):
        kid(normal(0, 20), normal(1, 12), drawn_groups=[0, 1, 2] * 4)
    with pytest.raises(ValueError, match="no pairs"):
        kid_difference(normal(0, 20), normal(1, 12), normal(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "num_real", "num_drawn"), [(0.0, 50, 50), (0.2, 25, 25), (0.5, 60, 60)])
def test_intervals_cover_the_closed_form(shift, num_real, num_drawn):
    """95 % of them do where the sets differ; more where they do not, which errs on the careful side."""
    truth, num = gaussian_kid(np.full(16, shift)), 400
    found = [kid(normal(2 * seed, num_real, 16), normal(2 * seed + 1, num_drawn, 16, shift)) for seed in range(num)]
    share = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert share >= 0.925
    if shift == 0.5:
        assert share <= 0.98


@pytest.mark.slow
def test_p_of_a_difference_is_uniform_where_there_is_none():
    found = [
        kid_difference(normal(3 * seed, 40), normal(3 * seed + 1, 12), normal(3 * seed + 2, 12)).p
        for seed in range(300)
    ]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_any_kernel_is_taken():
    """The linear kernel's MMD is the distance of the means."""
    real, drawn = normal(0, 150), normal(1, 150, shift=0.5)
    assert mmd(real, drawn, lambda x, y: x @ y.T).value == pytest.approx(8 * 0.25, rel=0.25)
