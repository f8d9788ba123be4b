"""The distributions of timesteps against closed forms, and the draws that their tables give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from safelight.errors import UserError
from safelight.kernels.ops.noising import draw_timesteps, key_words
from safelight.kernels.philox import Key, Purpose
from safelight.trainer.config.schema import Loss
from safelight.trainer.models.timesteps import timestep_cdf, timestep_range


def probabilities(loss: Loss, num: int = 1000) -> np.ndarray:
    table = timestep_cdf(loss, num)
    assert table.shape == (num,)
    assert table[-1] == 1 << 32
    return np.diff(table.double().numpy(), prepend=0) / 2.0**32


def test_all_timesteps_alike_need_no_table():
    assert timestep_cdf(Loss(), 1000) is None
    assert timestep_cdf(Loss(max_timestep=1000), 1000) is None


def test_a_range_is_uniform_inside_and_empty_outside():
    found = probabilities(Loss(min_timestep=250, max_timestep=600))
    expected = np.where((np.arange(1000) >= 250) & (np.arange(1000) < 600), 1 / 350, 0)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found[249] == found[600] == 0
    assert probabilities(Loss(min_timestep=999))[999] == 1


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (1.0, 0.5), (-0.7, 2.0)])
def test_logit_normal_is_the_integral_of_its_density(location, scale):
    """By the density of Esser et al. 2024, equation 19, integrated over each timestep."""
    loss = Loss(timesteps="logit_normal", timestep_location=location, timestep_scale=scale, min_timestep=100)
    found = probabilities(loss)
    middles = (np.arange(900 * 64) + 0.5) / (900 * 64)
    logits = np.log(middles / (1 - middles))
    density = np.exp(-((logits - location) ** 2) / (2 * scale**2)) / (
        scale * math.sqrt(2 * math.pi) * middles * (1 - middles)
    )
    np.testing.assert_allclose(found[100:], density.reshape(900, 64).mean(axis=1) / 900, rtol=2e-3, atol=2e-7)
    assert (found[:100] == 0).all()


def test_draws_follow_the_table_and_are_a_function_of_the_key():
    """Of 4,000 draws the logits have the mean and the deviation that were asked for, within five standard errors."""
    loss = Loss(timesteps="logit_normal", timestep_location=0.8, timestep_scale=0.6)
    keys = [Key(7, Purpose.NOISE, 1000 + i, i % 3, 0) for i in range(4000)]
    table = timestep_cdf(loss, 1000)
    drawn = draw_timesteps(key_words(keys), Purpose.TIMESTEP, 1000, table)
    x = (drawn.double() + 0.5) / 1000
    logits = torch.log(x / (1 - x))
    assert abs(logits.mean().item() - 0.8) < 5 * 0.6 / 4000**0.5
    assert abs(logits.std().item() - 0.6) < 5 * 0.6 / 8000**0.5
    assert torch.equal(draw_timesteps(key_words(keys[::-1]), Purpose.TIMESTEP, 1000, table), drawn.flip(0))


def test_ranges_that_the_base_lacks_are_refused():
    assert timestep_range(Loss(min_timestep=3), 10) == (3, 10)
    with pytest.raises(UserError, match=r"loss\.max_timestep 1000 is more than the 500 timesteps of the base"):
        timestep_range(Loss(max_timestep=1000), 500)
    with pytest.raises(UserError, match=r"loss\.min_timestep 500 leaves none of the timesteps 0 to 499"):
        timestep_range(Loss(min_timestep=500), 500)
