"""Means and paired differences: arithmetic, prompts as units, exact p, coverage of the intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import ndtr, stdtrit

from safelight.trainer.metrics import resampling
from safelight.trainer.metrics.clip_score import clip_score
from safelight.trainer.metrics.diversity import diversity, seed_diversity
from safelight.trainer.metrics.paired import paired_difference
from safelight.trainer.metrics.resampling import TooFewPictures, blocks, halves, mean_interval, units_of


def test_a_difference_counts_prompts_and_their_means():
    base = np.array([1.0, 3.0, 5.0, 2.0, 2.0, 4.0, 4.0])
    trained = np.array([2.0, 4.0, 5.0, 1.0, 9.0, 4.0, 5.0])
    prompts = ["a", "a", "b", "c", "d", "e", "e"]
    found = paired_difference(base, trained, prompts)
    # a: 1, b: 0, c: -1, d: 7, e: 0.5
    assert found.interval.value == pytest.approx(1.5)
    assert (found.wins, found.ties, found.losses) == (3, 1, 1)
    other = paired_difference(base, trained, prompts, better="lower")
    assert (other.wins, other.ties, other.losses) == (1, 1, 3)
    assert other.interval == found.interval


def test_p_is_over_all_flips_of_few_prompts():
    differences = np.array([1.0, 2.0, -0.5, 3.0, 0.25, 1.5, 1.0])
    flips = [np.dot(signs, differences) for signs in itertools.product([1, -1], repeat=7)]
    expected = np.mean(np.abs(flips) >= differences.sum() - 1e-12)
    assert paired_difference(np.zeros(7), differences).p == expected
    # the least that seven prompts can give
    assert paired_difference(np.zeros(7), np.ones(7)).p == 2 / 2**7


def test_p_of_many_prompts_is_that_of_the_normal_approximation():
    differences = np.random.default_rng(0).normal(0.15, 1, 100)
    z = differences.sum() / np.sqrt((differences**2).sum())
    assert paired_difference(np.zeros(100), differences).p == pytest.approx(2 * ndtr(-abs(z)), abs=0.015)


def test_equal_models_tie():
    values = np.random.default_rng(1).normal(size=9)
    assert paired_difference(values, values + 1e-15) == ((0, 0, 0), 1.0, 0, 9, 0)


def test_an_interval_is_students_for_normal_values():
    values = np.random.default_rng(2).normal(5, 2, 40)
    found = mean_interval(values)
    half = stdtrit(39, 0.975) * values.std(ddof=1) / 40**0.5
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), abs=0.06
    )


def test_intervals_of_few_prompts_cover_the_mean(monkeypatch):
    monkeypatch.setattr(resampling, "NUM_DRAWS", 500)
    draws = np.random.default_rng(3)
    found = [mean_interval(draws.normal(size=8)) for _ in range(300)]
    assert np.mean([interval.low <= 0 <= interval.high for interval in found]) >= 0.91


@pytest.mark.slow
@pytest.mark.parametrize(("num", "least"), [(8, 0.925), (30, 0.935), (100, 0.935)])
def test_intervals_cover_the_mean(num, least, monkeypatch):
    monkeypatch.setattr(resampling, "NUM_DRAWS", 1000)
    draws = np.random.default_rng(4)
    found = [paired_difference(draws.normal(size=num), draws.normal(size=num)).interval for _ in range(2000)]
    assert least <= np.mean([interval.low <= 0 <= interval.high for interval in found]) <= 0.965


@pytest.mark.slow
def test_pictures_of_a_prompt_counted_by_themselves_would_cover_too_little(monkeypatch):
    """Why prompts are the units: four pictures a prompt, whose values share the prompt's part."""
    monkeypatch.setattr(resampling, "NUM_DRAWS", 1000)
    draws, prompts = np.random.default_rng(5), np.repeat(np.arange(20), 4).tolist()
    found = [np.repeat(draws.normal(size=20), 4) + 0.5 * draws.normal(size=80) for _ in range(500)]
    shares = [
        np.mean([interval.low <= 0 <= interval.high for interval in (mean_interval(one, groups) for one in found)])
        for groups in (prompts, None)
    ]
    assert shares[0] >= 0.925
    assert shares[1] < 0.8


def test_clip_scores_are_a_hundred_cosines():
    images = np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, 0.0]])
    texts = np.array([[1.0, 0.0], [0.0, 5.0], [2.0, 0.0], [1.0, 0.0]])
    assert clip_score(images, texts) == pytest.approx([100, 100, 100 / 2**0.5, 0])


def test_diversity_is_the_mean_over_pairs():
    distances = np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))
    found = diversity(distances)
    assert found.value == pytest.approx(distances.sum() / 30)
    assert found.low < found.value < found.high
    # a draw of the same picture twice makes no less diverse set
    assert diversity(1 - np.eye(8)) == pytest.approx((1, 1, 1))
    with pytest.raises(TooFewPictures, match="4 of the 5"):
        diversity(np.zeros((4, 4)))


def test_diversity_of_seeds_is_within_prompts():
    distances = np.array([[0, 1, 9, 9, 9], [1, 0, 9, 9, 9], [9, 9, 0, 2, 4], [9, 9, 2, 0, 6], [9, 9, 4, 6, 0.0]])
    assert seed_diversity(distances, ["a", "a", "b", "b", "b"]) == pytest.approx([1, 4])
    assert seed_diversity(distances, list("abcde")).tolist() == []


def test_halves_share_no_unit_and_are_the_same_again():
    groups = [number // 3 for number in range(30)]
    first, second = halves(30, groups)
    assert sorted([*first, *second]) == list(range(30))
    assert len(first) == len(second) == 15
    assert {groups[place] for place in first}.isdisjoint({groups[place] for place in second})
    assert [part.tolist() for part in halves(30, groups)] == [first.tolist(), second.tolist()]
    assert halves(30, groups, "again")[0].tolist() != first.tolist()


def test_units_are_groups_and_are_left_out_in_blocks():
    unit, num = units_of(["x", "y", "x", "z"], 4, least=3)
    assert (unit.tolist(), num) == ([0, 1, 0, 2], 3)
    assert [kept.tolist() for kept in blocks(unit, num)] == [[0, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]]
    kept = blocks(np.arange(250), 250)
    assert len(kept) == 50
    assert sorted(np.concatenate([np.flatnonzero(~one) for one in kept])) == list(range(250))
    with pytest.raises(ValueError, match="3 groups for 4 rows"):
        units_of(["x", "y", "z"], 4)
