"""What each loss and weighting does: to the gradients of a step, to a run, and nothing to validation."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from safelight.kernels.ops import diffusion_loss as kernel
from safelight.trainer.config.schema import Loss
from safelight.trainer.config.toml import parse_config
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.registry.losses import KINDS, WEIGHTINGS
from safelight.trainer.step.step import accumulate, add_noise, upload
from safelight.trainer.train import train
from tests.small_base import small_base
from tests.trainer.equal_runs import metrics
from tests.trainer.step.test_step import CPU, SCALE, SCHEDULER, SEED, make_batch

NUM_SAMPLES = 8


def naive_gradients(unet, inputs, noisy, alphas_T, prediction: str, error, weight) -> list[torch.Tensor]:
    """Return the gradients in float64 of the loss as its paper writes it.

    error: a function of the difference. weight: a function of the SNR that applies to the squared epsilon error, which
    is SNR / (SNR + 1) of the squared v error.
    """
    unet = copy.deepcopy(unet).double()
    predicted = unet(noisy.noisy_BCHW.double(), noisy.timesteps_B, inputs.conditioning.text_BTD.double()).sample
    total = 0
    for b, timestep in enumerate(noisy.timesteps_B.tolist()):
        a = float(alphas_T[timestep])
        snr = a / (1 - a)
        difference = (predicted[b] - noisy.target_BCHW[b].double()).flatten()
        factor = weight(snr) * (snr / (snr + 1) if prediction == "v_prediction" and weight is not plain else 1)
        total = total + factor * sum(error(d) for d in difference) / len(difference)
    (total / NUM_SAMPLES).backward()
    return [p.grad for p in unet.parameters()]


def plain(snr: float) -> float:
    return 1.0


ERRORS = {
    "mse": (Loss(), lambda d: d**2),
    "huber": (Loss(kind="huber", huber_delta=0.3), lambda d: d**2 if abs(d) <= 0.3 else 0.3 * (2 * abs(d) - 0.3)),
}
WEIGHTS = {
    "none": (Loss(weighting="none"), plain),
    "min_snr": (Loss(weighting="min_snr", min_snr_gamma=0.5), lambda snr: min(snr, 0.5) / snr),
    "p2": (Loss(weighting="p2", p2_gamma=0.7), lambda snr: (1 + snr) ** -0.7),
    "debiased": (Loss(weighting="debiased"), lambda snr: min(snr, 1000.0) ** -0.5),
}


def gradients(unet, inputs, noisy, schedule, loss: Loss) -> list[torch.Tensor]:
    unet = copy.deepcopy(unet)
    accumulate(unet, noisy, inputs.conditioning, schedule, loss, NUM_SAMPLES, torch.tensor(1.0))
    return [p.grad for p in unet.parameters()]


def test_every_row_of_the_registry_has_a_formula_here_and_in_the_kernel():
    assert set(KINDS) == set(ERRORS) == set(kernel.KINDS)
    assert set(WEIGHTINGS) == set(WEIGHTS) == set(kernel.WEIGHTINGS)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "weighting"), list(itertools.product(ERRORS, WEIGHTS)))
def test_a_steps_gradients_are_the_formulas(small_unet, kind, weighting, prediction):
    schedule = make_schedule({**SCHEDULER, "prediction_type": prediction})
    inputs = upload(make_batch(5, 4), CPU, SEED, 0)
    noisy = add_noise(inputs, schedule, SCALE)
    (of_kind, error), (of_weighting, weight) = ERRORS[kind], WEIGHTS[weighting]
    loss = of_weighting.model_copy(update={"kind": of_kind.kind, "huber_delta": of_kind.huber_delta})
    expected = naive_gradients(small_unet, inputs, noisy, schedule.alphas_cumprod_T, prediction, error, weight)
    found = gradients(small_unet, inputs, noisy, schedule, loss)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item() + 1e-9)
    if (kind, weighting) != ("mse", "none"):
        before = gradients(small_unet, inputs, noisy, schedule, Loss())
        moved = sum((a - b).square().sum() for a, b in zip(found, before, strict=True)).sqrt()
        assert moved > 0.05 * sum(b.square().sum() for b in before).sqrt(), "the setting changes next to nothing"


def test_a_config_from_before_there_was_a_choice_trains_as_it_did(small_unet):
    """min_snr_gamma alone is min-SNR, as the same named outright; without it, no weighting."""
    schedule = make_schedule(SCHEDULER)
    inputs = upload(make_batch(6, 4), CPU, SEED, 0)
    noisy = add_noise(inputs, schedule, SCALE)
    for old, new in (
        (Loss(min_snr_gamma=5.0), Loss(weighting="min_snr", min_snr_gamma=5.0)),
        (Loss(), Loss(weighting="none")),
    ):
        pairs = zip(
            gradients(small_unet, inputs, noisy, schedule, old),
            gradients(small_unet, inputs, noisy, schedule, new),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def settings_of(folder, dataset, loss: dict, **train_settings) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base()},
        "data": {"path": str(dataset), "resolution": 64},
        "train": {"batch_size": 4, **train_settings},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "stage": [{"epochs": 1}],
        "loss": loss,
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 0},
        "validate": {"timesteps": 2},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def test_a_run_with_another_loss_resumes_and_is_validated_by_the_plain_error(tiny_dataset, tmp_path):
    loss = {"kind": "huber", "huber_delta": 0.2, "weighting": "p2"}

    def run(name: str, loss: dict, resume: bool = False, **train_settings):
        folder = tmp_path / name
        train(parse_config(settings_of(folder, tiny_dataset, loss, **train_settings), "test"), resume=resume)
        return metrics(folder)

    whole = run("whole", loss)
    run("halved", loss, max_steps=2)
    assert run("halved", loss, resume=True)[-1] == whole[-1]
    with pytest.raises(ValueError, match=r"loss\.huber_delta is 0\.5, but 0\.2 in the checkpoint"):
        run("halved", {**loss, "huber_delta": 0.5}, resume=True)
    plain = run("plain", {})

    def first(rows: list[dict], kind: str) -> float:
        return next(row["loss"] for row in rows if row["kind"] == kind)

    # before the first step both runs have the same weights
    assert first(whole, "validation") == first(plain, "validation")
    assert first(whole, "train") < first(plain, "train")
