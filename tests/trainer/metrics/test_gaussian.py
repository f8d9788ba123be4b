"""Gaussian KL and MMD against closed forms, against scikit-learn's Ledoit-Wolf, and against what is true."""

from __future__ import annotations

import math

import numpy as np
import pytest

from safelight.trainer.metrics.gaussian import gaussian_kl, median_mmd


def one(statistic, first, second) -> float:
    is_first = np.arange(len(first) + len(second)) < len(first)
    return float(statistic(np.concatenate([first, second]), is_first[None], ~is_first[None])[0])


def exact_kl(mean0, cov0, mean1, cov1) -> float:
    inverse, shift = np.linalg.inv(cov1), mean1 - mean0
    logs = np.linalg.slogdet(cov1)[1] - np.linalg.slogdet(cov0)[1]
    return 0.5 * (np.trace(inverse @ cov0) + shift @ inverse @ shift - len(shift) + logs)


def maximum_likelihood_kl(first, second) -> float:
    return exact_kl(first.mean(0), np.cov(first.T, ddof=0), second.mean(0), np.cov(second.T, ddof=0))


@pytest.mark.parametrize("d", [1, 3, 8])
def test_many_vectors_give_the_closed_form(d):
    rng = np.random.default_rng(0)
    scales, shift = np.linspace(0.5, 2, d), np.linspace(0.3, 1, d)
    first, second = rng.normal(size=(40_000, d)), rng.normal(size=(30_000, d)) * scales + shift
    exact = exact_kl(np.zeros(d), np.eye(d), shift, np.diag(scales**2))
    assert one(gaussian_kl, first, second) == pytest.approx(exact, rel=0.05)
    # it is not symmetric
    back = exact_kl(shift, np.diag(scales**2), np.zeros(d), np.eye(d))
    assert one(gaussian_kl, second, first) == pytest.approx(back, rel=0.05)


def test_it_equals_whitening_and_shrinking_with_scikit_learn():
    covariance = pytest.importorskip("sklearn.covariance", reason="scikit-learn is not installed")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 6)) @ rng.normal(size=(6, 6)) + 5
    for num_first in (20, 45, 60):
        is_first = rng.permutation(90) < num_first
        first, second = x[is_first], x[~is_first]
        centred = np.concatenate([first - first.mean(0), second - second.mean(0)])
        pooled = covariance.LedoitWolf(assume_centered=True).fit(centred).covariance_
        whiten = np.linalg.inv(np.linalg.cholesky(pooled)).T
        first, second = first @ whiten, second @ whiten
        covariances = [covariance.LedoitWolf().fit(part).covariance_ for part in (first, second)]
        expected = exact_kl(first.mean(0), covariances[0], second.mean(0), covariances[1])
        assert gaussian_kl(x, is_first[None], ~is_first[None])[0] == pytest.approx(expected, rel=1e-4)


def test_the_whitened_estimate_is_nearer_the_truth_than_maximum_likelihood():
    """Fifty vectors of eight numbers: sets that differ by 0.5 and 0.47 nats, and one distribution twice."""
    rng, exact_scale = np.random.default_rng(2), 4 * (1 / 1.69 - 1 + math.log(1.69))
    for exact, shift, scale in ((0.5, 1.0, 1.0), (exact_scale, 0.0, 1.3), (0.0, 0.0, 1.0)):
        ours, plain = [], []
        for _ in range(60):
            first, second = rng.normal(size=(50, 8)), rng.normal(size=(50, 8)) * scale
            second[:, 0] += shift
            ours.append(one(gaussian_kl, first, second))
            plain.append(maximum_likelihood_kl(first, second))
        assert exact < np.mean(ours) < exact + 0.3
        assert np.mean(plain) > np.mean(ours) + 0.3


def test_moving_turning_and_scaling_change_nothing():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(60, 4)), rng.normal(size=(50, 4)) + 0.5
    turn = 1e6 * np.linalg.qr(rng.normal(size=(4, 4)))[0]
    for statistic in (gaussian_kl, median_mmd):
        expected = one(statistic, first, second)
        assert one(statistic, first @ turn + 1e7, second @ turn + 1e7) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("statistic", [gaussian_kl, median_mmd])
def test_many_divisions_at_once_give_what_each_gives_alone(statistic, monkeypatch):
    monkeypatch.setattr("safelight.trainer.metrics.gaussian._CHUNK", 500)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(70, 5))
    is_first = np.stack([rng.permutation(70) < 30 for _ in range(25)])
    alone = [one(statistic, x[row], x[~row]) for row in is_first]
    assert statistic(x, is_first, ~is_first) == pytest.approx(np.array(alone), rel=1e-9, abs=1e-12)


def test_vectors_that_do_not_vary_give_finite_figures():
    same = np.ones((20, 3))
    assert one(gaussian_kl, same, same) == pytest.approx(0, abs=1e-9)
    assert 1 < one(gaussian_kl, same, same + 1) < 1e15
    flat = np.random.default_rng(5).normal(size=(20, 3)) * [1, 1, 0]
    assert math.isfinite(one(gaussian_kl, flat, flat[::-1] + 1))
    assert one(median_mmd, same, same) == 0
    equal = np.full((20, 3), 0.1)
    assert one(median_mmd, equal, equal * (1 + 1e-15)) == pytest.approx(0, abs=1e-6)


def test_mmd_is_unbiased_and_equals_its_definition():
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=(12, 2)), rng.normal(size=(9, 2)) + 1
    x = np.concatenate([first, second])
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    kernel = np.exp(-squared / (2 * np.median(squared[np.triu_indices(21, 1)])))
    xx, yy, xy = kernel[:12, :12], kernel[12:, 12:], kernel[:12, 12:]
    expected = (xx.sum() - 12) / 132 + (yy.sum() - 9) / 72 - 2 * xy.mean()
    assert one(median_mmd, first, second) == pytest.approx(expected)
    nothing = [one(median_mmd, *np.split(rng.normal(size=(40, 3)), 2)) for _ in range(300)]
    assert abs(np.mean(nothing)) < 3 * np.std(nothing) / math.sqrt(300)
