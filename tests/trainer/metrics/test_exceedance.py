"""Limits from a reference, and the exact probability that as many values exceed them by chance."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from safelight.trainer.metrics.exceedance import Limit, exceedance_p, share_interval, sign_p, upper_limit


@pytest.mark.parametrize(
    ("num", "chance", "value", "num_above"),
    [(39, 0.025, 38, 0), (40, 0.025, 39, 0), (79, 0.025, 77, 1), (10, 0.025, 9, 0), (999, 0.001, 998, 0)],
)
def test_the_limit_is_the_smallest_that_is_exceeded_with_no_more_than_the_chance(num, chance, value, num_above):
    limit = upper_limit(np.random.Generator(np.random.Philox(key=1)).permutation(num).astype(float), chance)
    assert (limit.value, limit.num, limit.num_above) == (value, num, num_above)
    assert limit.chance == (num_above + 1) / (num + 1)
    assert limit.chance <= chance + 1e-12 or num_above == 0
    # the next lower value would be exceeded more often
    assert (num_above + 2) / (num + 1) > chance


def test_no_values_give_no_limit():
    with pytest.raises(ValueError, match="no values"):
        upper_limit(np.array([]), 0.1)


@pytest.mark.parametrize("num_above", [0, 1, 2])
def test_the_probability_is_that_of_all_orders(num_above):
    num_reference, num = 5, 4
    limit = Limit(0.0, num_reference, num_above)
    for num_over in range(num + 1):
        hits = 0
        # which places of the sorted values are the judged ones
        for places in combinations(range(num_reference + num), num):
            reference = sorted(set(range(num_reference + num)) - set(places))
            hits += sum(place > reference[-1 - num_above] for place in places) >= num_over
        expected = hits / comb(num_reference + num, num)
        assert exceedance_p(num_over, num, limit) == pytest.approx(expected, abs=1e-12)


def test_many_values_do_not_overflow():
    assert exceedance_p(1000, 5000, Limit(0.0, 100_000, 99)) < 1e-12
    assert exceedance_p(5, 5000, Limit(0.0, 100_000, 99)) == pytest.approx(0.56, abs=0.05)


def test_the_interval_of_a_share():
    # Clopper and Pearson's for 8 of 10, and the rule of three for none of 100
    assert share_interval(8, 10) == pytest.approx((0.8, 0.4439, 0.9748), abs=1e-4)
    assert share_interval(0, 100) == pytest.approx((0, 0, 0.0362), abs=1e-4)
    assert share_interval(100, 100) == pytest.approx((1, 0.9638, 1), abs=1e-4)


def test_the_sign_test_is_that_of_a_fair_coin():
    assert sign_p(0, 0) == 1
    assert sign_p(3, 3) == 0.125
    assert sign_p(4, 5) == pytest.approx(6 / 32)
    assert sign_p(0, 2000) == 1
