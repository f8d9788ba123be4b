"""The noise schedule against diffusers' schedulers and against mathematical identities."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from safelight.kernels.ops.diffusion_loss import LossOptions, loss_weights
from safelight.kernels.ops.noising import Noised, key_words, noising
from safelight.kernels.philox import Key, Purpose, normals_torch
from safelight.trainer.models.noise_schedule import (
    NoiseSchedule,
    make_schedule,
    mse_per_sample,
    rescale_zero_terminal_snr,
)

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


KEYS = [Key(3, Purpose.NOISE, sample_id) for sample_id in range(5)]


def noised(schedule: NoiseSchedule, latents: Tensor, timesteps: Tensor) -> Noised:
    return noising(
        latents,
        None,
        key_words(KEYS[: len(latents)]),
        schedule.alphas_cumprod_T,
        timesteps_B=timesteps,
        prediction_type=schedule.prediction_type,
        scaling_factor=1.0,
    )


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_noising_and_targets_equal_diffusers(kind, prediction, zero_snr):
    config = {**CONFIG, "beta_schedule": kind, "prediction_type": prediction}
    ours = make_schedule(config, zero_terminal_snr=zero_snr)
    theirs = DDPMScheduler(**config, rescale_betas_zero_snr=zero_snr)
    torch.testing.assert_close(ours.alphas_cumprod_T, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    latents, noise = torch.randn(5, 4, 3, 3), normals_torch(KEYS, (4, 3, 3), "cpu")
    timesteps = torch.tensor([0, 10, 500, 998, 999])
    actual = noised(ours, latents, timesteps)
    torch.testing.assert_close(actual.noisy_BCHW, theirs.add_noise(latents, noise, timesteps), rtol=1e-4, atol=1e-5)
    expected = noise if prediction == "epsilon" else theirs.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(actual.target_BCHW, expected, rtol=1e-4, atol=1e-5)


def test_zero_terminal_snr_keeps_the_start_and_ends_in_pure_noise():
    a = make_schedule(CONFIG).alphas_cumprod_T
    rescaled = rescale_zero_terminal_snr(a)
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(a[0].item(), rel=1e-6)
    assert (rescaled[1:] < rescaled[:-1]).all()


def test_zero_terminal_snr_requires_v_prediction():
    with pytest.raises(ValueError, match="v_prediction"):
        make_schedule({**CONFIG, "prediction_type": "epsilon"}, zero_terminal_snr=True)


def test_min_snr_weights_follow_the_paper():
    """With the SNR from diffusers. For v-prediction the divisor is SNR + 1."""
    theirs = DDPMScheduler(**CONFIG)
    timesteps = torch.tensor([1, 100, 400, 700, 999])
    snr = compute_snr(theirs, timesteps)
    for prediction, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        ours = make_schedule({**CONFIG, "prediction_type": prediction})
        expected = torch.minimum(snr, torch.tensor(5.0)) / divisor
        options = LossOptions(weighting="min_snr", gamma=5.0, prediction_type=prediction)
        weights = loss_weights(ours.alphas_cumprod_T, timesteps, options)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


def test_min_snr_uses_the_rescaled_schedule():
    """Another trainer computes the SNR before rescaling. At the last timestep our weight is finite: zero."""
    schedule = make_schedule({**CONFIG, "prediction_type": "v_prediction"}, zero_terminal_snr=True)
    options = LossOptions(weighting="min_snr", gamma=5.0, prediction_type="v_prediction")
    assert loss_weights(schedule.alphas_cumprod_T, torch.tensor([999]), options).item() == 0.0
    timesteps = torch.tensor([1, 100, 400, 700, 998])
    snr = compute_snr(DDPMScheduler(**CONFIG, rescale_betas_zero_snr=True), timesteps)
    weights = loss_weights(schedule.alphas_cumprod_T, timesteps, options)
    torch.testing.assert_close(weights, snr.clamp(max=5.0) / (snr + 1), rtol=1e-3, atol=1e-6)
    before = loss_weights(
        make_schedule({**CONFIG, "prediction_type": "v_prediction"}).alphas_cumprod_T, timesteps, options
    )
    assert not torch.allclose(weights[3:], before[3:], rtol=1e-1)


def test_latents_and_noise_can_be_computed_from_noisy_latents_and_v():
    schedule = NoiseSchedule(make_schedule(CONFIG).alphas_cumprod_T, "v_prediction")
    latents, noise = torch.randn(3, 4, 2, 2), normals_torch(KEYS[:3], (4, 2, 2), "cpu")
    timesteps = torch.tensor([5, 300, 900])
    z, v, _ = noised(schedule, latents, timesteps)
    a = schedule.alphas_cumprod_T[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(a.sqrt() * z - (1 - a).sqrt() * v, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((1 - a).sqrt() * z + a.sqrt() * v, noise, rtol=1e-4, atol=1e-5)


def test_losses_are_per_sample_and_in_fp32():
    predicted, target = torch.zeros(2, 1, 2, 2, dtype=torch.float16), torch.tensor([300.0, 2.0]).view(2, 1, 1, 1)
    # 300^2 exceeds the largest fp16
    assert mse_per_sample(predicted, target.expand(2, 1, 2, 2)).tolist() == [90000.0, 4.0]


@pytest.mark.parametrize(
    ("change", "match"),
    [({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"), ({"prediction_type": "sample"}, "prediction type")],
)
def test_an_unsupported_scheduler_config_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        make_schedule({**CONFIG, **change})
