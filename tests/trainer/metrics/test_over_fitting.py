"""When a stage has stopped learning: on curves whose turn is known, and how often noise alone is taken for one."""

import numpy as np
import pytest
from scipy.stats import linregress

from safelight.trainer.metrics.over_fitting import (
    CONFIDENCE,
    FALSE_ALARMS,
    Curve,
    _slope,
    allowance,
    doubt,
    due_tests,
    improbability,
    is_over_fitting,
    matters,
    noise,
    over_fitting,
    single_look,
    smoothed,
    wait_of,
)
from tools.over_fitting import KINDS, SCATTERS, SHAPES, detection, first_alarms, scatter_of

NUM_BANDS = 4
# the loss of a range with much noise is small: each must count
LEVELS = np.array([0.5, 0.2, 0.1, 0.02])


def curve(held_out: np.ndarray, subset: np.ndarray, scatter: float = 0.0, seed: int = 0) -> Curve:
    """Return a curve from the relative losses of every epoch, (N,) or (N, bands), with independent noise."""
    rng = np.random.default_rng(seed)
    both = []
    for values in (held_out, subset):
        bands = np.broadcast_to(values[:, None], (len(values), NUM_BANDS)) if values.ndim == 1 else values
        both.append(LEVELS * bands * (1 + scatter * rng.standard_normal(bands.shape)))
    return Curve(np.arange(len(held_out), dtype=np.float64), *both)


def turning(num: int, turn: int, fall: float = 0.01, rise: float = 0.01) -> Curve:
    """Held-out loss falls until an epoch and rises from then on, while that of training photographs falls all along."""
    epochs = np.arange(num)
    held_out = 1 - fall * np.minimum(epochs, turn) + rise * np.maximum(0, epochs - turn)
    return curve(held_out, 1 - fall * epochs)


@pytest.mark.parametrize("turn", [3, 6, 10])
def test_the_epoch_at_which_the_gap_opened_is_found(turn):
    found = over_fitting(turning(20, turn))
    assert found.epoch == turn
    assert found.between == (turn, turn)
    assert found.gap_now > 0.001 > abs(found.gap_then)
    assert found.bands == (0, 1, 2, 3)
    assert 0 < found.rise < 0.2


def test_no_over_fitting_is_found_where_there_is_none():
    assert over_fitting(turning(20, 20)) is None, "both fall"
    assert over_fitting(turning(20, 6, rise=0.0)) is None, (
        "held-out loss stays level: the gap widens, but nothing is lost"
    )
    epochs = np.arange(20)
    rising = 1 + 0.01 * np.maximum(0, epochs - 6)
    assert over_fitting(curve(rising, rising)) is None, "both rise: that is a rate that is too high"
    assert over_fitting(turning(4, 1)) is None, "too few validations"
    broken = turning(20, 6)
    broken.held_out[4, 0] = np.nan
    assert over_fitting(broken) is None


def test_the_ranges_in_which_it_happens_are_named():
    epochs = np.arange(20)
    held_out = np.ones((20, NUM_BANDS))
    held_out[:, 3] += 0.05 * np.maximum(0, epochs - 8)
    found = over_fitting(curve(held_out, np.ones(20)))
    assert found.bands == (3,)
    assert found.epoch <= 8


def test_a_range_with_a_small_loss_counts_as_much_as_one_with_a_large_loss():
    """The mean of the plain losses would hide it: 1 % of the last range is a four-hundredth of one of the first."""
    epochs = np.arange(16)
    held_out = np.ones((16, NUM_BANDS))
    held_out[:, 3] += 0.02 * np.maximum(0, epochs - 4)
    one = curve(held_out, np.ones(16))
    assert (one.held_out.mean(axis=1)[-1] / one.held_out.mean(axis=1)[0] - 1) < 0.01
    assert over_fitting(one).rise > 0.04


def test_noise_is_estimated_about_any_straight_line():
    rng = np.random.default_rng(1)
    values = 3 - 0.1 * np.arange(4000)[:, None] + 0.02 * rng.standard_normal((4000, 2))
    assert noise(values) == pytest.approx(0.02, rel=0.05)
    assert np.isinf(noise(values[:4])).all()


def test_smoothing_is_the_mean_of_the_last_three():
    values = np.array([1.0, 2.0, 6.0, 4.0])
    assert smoothed(values).tolist() == [1.0, 1.5, 3.0, 4.0]


def test_a_range_that_scatters_widely_does_not_hide_the_others():
    epochs, rng = np.arange(16), np.random.default_rng(3)
    held_out = np.ones((16, NUM_BANDS)) + 0.02 * np.maximum(0, epochs - 5)[:, None]
    held_out[:, 3] = 1 + 0.3 * rng.standard_normal(16)
    assert over_fitting(curve(held_out, np.ones(16))).rise == pytest.approx(0.2, abs=0.05)


def test_epochs_without_a_gain_are_counted_from_the_last_one():
    falling = 1 - 0.02 * np.minimum(np.arange(16), 6)
    one = curve(falling, falling)
    # the mean of three validations still falls two validations after the last of them
    wait = wait_of(one, 1.0)
    assert (wait.epochs, wait.num_validations, wait.since, wait.change) == (15 - 8, 7, 8, pytest.approx(0))
    assert wait_of(one.upto(9), 1.0).epochs == 0
    assert wait_of(one.upto(4), 1.0) is None
    every_fifth = Curve(one.epochs * 5, one.held_out, one.subset)
    assert wait_of(every_fifth, 1.0).epochs == 5 * 7
    rising = 1 - 0.02 * np.minimum(np.arange(16), 6) + 0.01 * np.maximum(0, np.arange(16) - 8)
    assert wait_of(curve(rising, rising), 1.0).change == pytest.approx(0.06 / 0.88)


def test_half_of_the_ranges_that_gain_keep_a_stage_going():
    epochs = np.arange(16)
    held_out = np.ones((16, NUM_BANDS)) + 0.01 * epochs[:, None]
    held_out[:, :2] = 1 - 0.005 * epochs[:, None]
    # the mean does not gain
    assert wait_of(curve(held_out, held_out), 1.0).epochs == 0
    held_out[:, 1] = 1.0
    assert wait_of(curve(held_out, held_out), 1.0).epochs > 10


def test_a_gain_must_be_larger_than_its_share_of_the_noise():
    falling = 1 - 0.0005 * np.arange(24)
    one = curve(falling, falling, scatter=0.001, seed=2)
    waits = [wait_of(one, gain).epochs for gain in (0.0, 1.0, 50.0)]
    assert waits == sorted(waits)
    assert waits[0] < waits[2] == 23


@pytest.mark.parametrize("scatter", SCATTERS)
def test_noise_alone_is_taken_for_over_fitting_in_less_than_one_run_of_a_hundred(scatter):
    """Curves that fall, stay level or fall ever more slowly: the whole course of each is watched, as a run is."""
    rng, epochs, alarms = np.random.default_rng(5), np.arange(40, dtype=np.float64), []
    for shape in SHAPES.values():
        means = np.stack([shape(epochs), 1 - 0.3 * epochs / (epochs + 30)])
        drawn = means[:, None, :, None] * (1 + scatter * scatter_of("independent", 150, len(epochs), rng))
        alarms.append(np.mean(first_alarms(epochs, *drawn) <= len(epochs)))
    assert np.mean(alarms) < FALSE_ALARMS


@pytest.mark.parametrize("kind", KINDS[1:])
def test_scatter_that_is_shared_or_carries_over_keeps_within_the_bound_too(kind):
    rng, epochs = np.random.default_rng(6), np.arange(30, dtype=np.float64)
    means = np.stack([np.ones_like(epochs), 1 - 0.01 * epochs])
    drawn = means[:, None, :, None] * (1 + 0.01 * scatter_of(kind, 500, len(epochs), rng))
    assert np.mean(first_alarms(epochs, *drawn) <= len(epochs)) < FALSE_ALARMS


def test_the_shares_of_all_tests_sum_to_the_bound():
    total = sum(error for num in range(20_000) for _, error in due_tests(num))
    assert FALSE_ALARMS * 0.96 < total <= FALSE_ALARMS
    assert [length for length, _ in due_tests(8)] == [4, 5, 6, 7]
    # those of 12 and 16 are tested at every other validation
    assert [length for length, _ in due_tests(21)] == [4, 5, 6, 7, 9, 21]
    assert sum(share for _, share in single_look(20)) == pytest.approx(1)
    assert [length for length, _ in single_look(20)] == [4, 5, 6, 7, 9, 12, 16]


def test_a_slope_is_tested_as_scipy_does_if_nothing_carries_over(monkeypatch):
    monkeypatch.setattr("safelight.trainer.metrics.over_fitting.CARRIED", 0.0)
    allowance.cache_clear()
    rng = np.random.default_rng(4)
    for num in (4, 7, 20):
        assert allowance(num) == pytest.approx((1.0, num - 2))
        x, y = np.sort(rng.random(num)), rng.random(num)
        slope, t = _slope(x, y)
        expected = linregress(x, y, alternative="greater")
        assert (slope, improbability(t, num)) == pytest.approx((expected.slope, expected.pvalue))
    allowance.cache_clear()


def test_a_slope_of_scatter_that_carries_over_varies_as_is_allowed_for():
    rng, num = np.random.default_rng(8), 12
    values = scatter_of("carries over", 20_000, 60, rng)[0, :, -num:, 0]
    _, t = _slope(np.arange(num, dtype=np.float64), values)
    for level in (0.05, 0.01):
        assert np.mean(improbability(t, num) < level) == pytest.approx(level, rel=0.25)


def test_over_fitting_is_found_soon_in_noise_and_its_turn_lies_in_the_interval():
    """Rises of 0.5 % a validation: as soon as can be at a tenth of that, within 16 validations at twice as much."""
    for scatter, soon in ((0.0005, 5), (0.002, 9), (0.01, 16)):
        row = detection(0.005, scatter, 60, np.random.default_rng(9))
        assert row["found_share"] == 1.0
        assert row["early_alarm_share"] <= 0.02
        assert row["validations_to_alarm_p50_p90"][1] <= soon
        assert row["error_of_epoch_p50_p90"][1] <= 3
        assert row["turn_in_interval_share"] >= CONFIDENCE - 0.1


def test_how_sure_a_single_look_is_holds_for_curves_that_do_not_rise():
    """Of level curves with scatter of which half carries over, at most a tenth are thought over-fitting with 90 %."""
    rng, epochs = np.random.default_rng(12), np.arange(24, dtype=np.float64)
    means = np.stack([np.ones_like(epochs), 1 - 0.01 * epochs])[:, None, :, None]
    drawn = means * (1 + 0.03 * scatter_of("carries over", 400, len(epochs), rng))
    doubts = np.array([doubt(Curve(epochs, *drawn[:, run])) for run in range(400)])
    assert np.mean(doubts < 0.1) <= 0.1
    assert np.mean(doubts < 0.5) > 0.05, "it is no empty statement"
    assert doubt(turning(20, 6)) < 1e-6
    assert doubt(turning(20, 20)) == doubt(turning(3, 1)) == 1


def test_what_rise_matters_depends_on_the_gain():
    assert matters(0.003, 1.0, 0.0), "more than a quarter of a per cent"
    assert not matters(0.002, 1.0, 0.0)
    assert not matters(0.004, 0.95, 0.05), "less than a tenth of the gain"
    assert matters(0.006, 0.95, 0.05)
    assert matters(0.004, 0.3, 0.7), "a hundredth of the loss, from scratch"
    assert is_over_fitting(0.1, 0.009)
    assert not is_over_fitting(0.1, 0.011)


def test_it_is_found_however_far_apart_validations_are():
    one = turning(20, 6)
    every_eighth = Curve(one.epochs * 8, one.held_out, one.subset)
    assert over_fitting(every_eighth).epoch == 48
    epochs = np.square(one.epochs)
    held_out = 1 - 0.001 * np.minimum(epochs, 36) + 0.001 * np.maximum(0, epochs - 36)
    uneven = curve(held_out, 1 - 0.001 * epochs)
    assert over_fitting(Curve(epochs, uneven.held_out, uneven.subset)).between == (36, 36)
