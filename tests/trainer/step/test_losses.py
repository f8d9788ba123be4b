"""What each loss and weighting does: to the gradients of a step, to a run, and nothing to validation."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from safelight.kernels.ops import diffusion_loss as kernel
from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.timesteps import CUMULATIVE
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.registry.losses import HUBER_SCHEDULES, KINDS, TIMESTEPS, WEIGHTINGS
from safelight.trainer.step.step import StepContext, accumulate, add_noise, micro_step, upload
from safelight.trainer.train import train
from tests.small_base import small_base
from tests.trainer.equal_runs import metrics
from tests.trainer.step.test_step import CPU, SCALE, SCHEDULER, SEED, make_batch

NUM_SAMPLES = 8


def naive_gradients(unet, inputs, noisy, alphas_T, prediction: str, error, weight) -> list[torch.Tensor]:
    """Return the gradients in float64 of the loss as its paper writes it.

    error: a function of the difference and of the timestep as a fraction of all. weight: a function of the SNR that
    applies to the squared epsilon error, which is SNR / (SNR + 1) of the squared v error.
    """
    unet = copy.deepcopy(unet).double()
    predicted = unet(noisy.noisy_BCHW.double(), noisy.timesteps_B, inputs.conditioning.text_BTD.double()).sample
    total = 0
    for b, timestep in enumerate(noisy.timesteps_B.tolist()):
        a = float(alphas_T[timestep])
        snr = a / (1 - a)
        difference = (predicted[b] - noisy.target_BCHW[b].double()).flatten()
        factor = weight(snr) * (snr / (snr + 1) if prediction == "v_prediction" and weight is not plain else 1)
        total = total + factor * sum(error(d, timestep / len(alphas_T)) for d in difference) / len(difference)
    (total / NUM_SAMPLES).backward()
    return [p.grad for p in unet.parameters()]


def plain(snr: float) -> float:
    return 1.0


def huber(d, delta: float = 0.3):
    return d**2 if abs(d) <= delta else delta * (2 * abs(d) - delta)


ERRORS = {
    "mse": ({"kind": "mse"}, lambda d, u: d**2),
    "huber": ({"kind": "huber", "huber_delta": 0.3}, lambda d, u: huber(d)),
    "pseudo_huber": (
        {"kind": "pseudo_huber", "huber_delta": 0.3},
        lambda d, u: 0.6 * ((d**2 + 0.09) ** 0.5 - 0.3),
    ),
    "mse_huber": ({"kind": "mse_huber", "huber_delta": 0.3}, lambda d, u: u * d**2 + (1 - u) * huber(d)),
    "huber_mse": ({"kind": "huber_mse", "huber_delta": 0.3}, lambda d, u: (1 - u) * d**2 + u * huber(d)),
    "huber, scheduled": (
        {"kind": "huber", "huber_delta": 0.1, "huber_schedule": "exponential"},
        lambda d, u: huber(d, 0.1**u),
    ),
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
    assert set(KINDS) == {values["kind"] for values, _ in ERRORS.values()} == set(kernel.KINDS)
    assert set(HUBER_SCHEDULES) == set(kernel.DELTA_SCHEDULES)
    assert set(TIMESTEPS) == set(CUMULATIVE)
    assert set(WEIGHTINGS) == set(WEIGHTS) == set(kernel.WEIGHTINGS)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "weighting"), list(itertools.product(ERRORS, WEIGHTS)))
def test_a_steps_gradients_are_the_formulas(small_unet, kind, weighting, prediction):
    schedule = make_schedule({**SCHEDULER, "prediction_type": prediction})
    inputs = upload(make_batch(5, 4), CPU, SEED, 0)
    noisy = add_noise(inputs, schedule, SCALE)
    (of_kind, error), (of_weighting, weight) = ERRORS[kind], WEIGHTS[weighting]
    loss = of_weighting.model_copy(update=of_kind)
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


NOISE = {"offset_noise": 0.1, "pyramid_noise": 0.3, "input_perturbation": 0.1}
DRAWN = {"timesteps": "logit_normal", "timestep_location": 0.5, "min_timestep": 100, "max_timestep": 900}


def test_a_run_with_every_kind_of_noise_and_drawn_timesteps_resumes(tiny_dataset, tmp_path):
    loss = {**NOISE, **DRAWN, "kind": "pseudo_huber", "huber_delta": 0.1, "huber_schedule": "snr"}

    def run(name: str, loss: dict, resume: bool = False, **train_settings):
        folder = tmp_path / name
        train(parse_config(settings_of(folder, tiny_dataset, loss, **train_settings), "test"), resume=resume)
        return metrics(folder)

    whole = run("whole", loss)
    run("halved", loss, max_steps=2)
    assert run("halved", loss, resume=True)[-1] == whole[-1]
    for name, value in (("pyramid_noise", 0.2), ("min_timestep", 50), ("timestep_location", 0.0)):
        with pytest.raises(ValueError, match=rf"loss\.{name} is .*, but .* in the checkpoint"):
            run("halved", {**loss, name: value}, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"offset_noise": 0.2},
        {"pyramid_noise": 0.2},
        {"pyramid_noise": 0.3, "pyramid_octaves": 2},
        {"input_perturbation": 0.2},
        {"timesteps": "logit_normal"},
        {"timesteps": "logit_normal", "timestep_location": 1.0},
        {"timesteps": "logit_normal", "timestep_scale": 0.5},
        {"min_timestep": 500},
        {"max_timestep": 500},
        {"kind": "huber", "huber_delta": 0.1, "huber_schedule": "snr"},
    ],
)
def test_every_setting_of_noise_and_timesteps_changes_a_step(small_unet, change):
    """Against the same settings without the last one."""
    before = dict(list(change.items())[:-1])
    if "huber_schedule" not in change:
        before.pop("pyramid_octaves", None)
    losses = []
    for values in (before, change):
        unet = copy.deepcopy(small_unet)
        optimizer = make_optimizer(unet, Optimizer(name="adamw", lr=1e-3))
        optimizer.set_hyper(1e-3, 0.0, 1.0)
        context = StepContext(unet, optimizer, make_schedule(SCHEDULER), SCALE, Loss(**values))
        losses.append(micro_step(context, upload(make_batch(5, 4), CPU, SEED, 0), 4).losses_B)
    assert not torch.equal(*losses)


def test_validation_does_not_depend_on_how_training_draws_timesteps_and_noise(tiny_dataset, tmp_path):
    first = []
    for name, loss in (("plain", {}), ("drawn", {**NOISE, **DRAWN})):
        train(parse_config(settings_of(tmp_path / name, tiny_dataset, loss, max_steps=1), "test"))
        first.append(next(row["loss"] for row in metrics(tmp_path / name) if row["kind"] == "validation"))
    assert first[0] == first[1]
