"""Each published recipe against a plain training loop, and against our step for the same inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0

from safelight.bench.recipes.baselines import RECIPES, Baseline
from safelight.bench.recipes.suite import measure, variants
from safelight.bench.recipes.workload import LR, SEED, Ours, Workload, cached_batches, random_batches
from safelight.kernels.ops.noising import Noised
from safelight.kernels.unet.attention import AttendProcessor, attention_modules
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_unet
from safelight.trainer.step.step import sample_losses

pytestmark = pytest.mark.usefixtures("compiled")
WORK = Workload(batch_size=2, optimizer="adamw", device="cpu", precision="fp32").resolved()


@pytest.fixture(scope="module")
def plain(inputs) -> tuple[list[float], dict]:
    """Return the losses and final weights of a minimal training loop in fp32."""
    unet = load_unet(resolve_base("tiny"), SEED).train()
    scheduler = DDPMScheduler.from_config(resolve_base("tiny").config_of("scheduler"))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=0.01)
    losses = []
    for latents, noise, timesteps, text in inputs:
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text.text_BTD).sample
        loss = F.mse_loss(predicted, noise)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, unet.state_dict()


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp32_equals_a_plain_loop(recipe, inputs, plain, compiled):
    baseline, losses = Baseline(RECIPES[recipe], WORK), []
    for batch in inputs:
        loss = baseline.loss(*batch)
        losses.append(loss.item())
        baseline.update(loss)
    assert losses == pytest.approx(plain[0], rel=1e-5)
    assert compiled == ([baseline.unet] if RECIPES[recipe].compile else [])
    is_channels_last = baseline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert is_channels_last == RECIPES[recipe].channels_last
    for name, value in baseline.unet.state_dict().items():
        # three steps move a weight by at most 3 lr; channels-last convolutions differ in the last bits, which Adam
        # amplifies to a whole step where the gradient is near 0
        assert (value - plain[1][name]).abs().max() < LR
        assert (value - plain[1][name]).abs().mean() < 0.02 * LR


@pytest.mark.parametrize("recipe", ["diffusers", "diffusers-16bit"])
def test_the_bf16_loss_is_the_plain_loss_to_bf16_precision(recipe, inputs, plain):
    baseline = Baseline(
        RECIPES[recipe], Workload(batch_size=2, optimizer="adamw", device="cpu", precision="bf16").resolved()
    )
    weights = next(iter(baseline.parameters)).dtype
    assert weights == (torch.bfloat16 if RECIPES[recipe].weights_16bit else torch.float32)
    loss = baseline.loss(*inputs[0])
    assert loss.item() == pytest.approx(plain[0][0], rel=0.01)
    assert loss.item() != plain[0][0]


def test_a_v_prediction_model_is_trained_on_velocities(inputs):
    baseline = Baseline(RECIPES["diffusers"], WORK)
    scheduler = baseline.scheduler
    latents, noise, timesteps, text = inputs[0]
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        predicted = baseline.unet(noisy, timesteps, text.text_BTD).sample
        for kind, target in (("epsilon", noise), ("v_prediction", scheduler.get_velocity(latents, noise, timesteps))):
            scheduler.register_to_config(prediction_type=kind)
            expected = F.mse_loss(predicted, target).item()
            assert baseline.loss(*inputs[0]).item() == pytest.approx(expected, rel=1e-5)


def test_a_step_samples_latents_from_the_cached_posterior(monkeypatch):
    baseline, (batch,) = Baseline(RECIPES["diffusers"], WORK), random_batches(1, WORK)
    calls = []
    monkeypatch.setattr(baseline, "step_from", lambda latents, text: calls.append((latents, text)))
    torch.manual_seed(4)
    baseline.step(batch)
    torch.manual_seed(4)
    latents = batch.mean_BCHW + (batch.logvar_BCHW / 2).exp() * torch.randn(batch.mean_BCHW.shape)
    torch.testing.assert_close(calls[0][0], latents)
    assert torch.equal(calls[0][1].text_BTD, batch.conditioning.text_BTD)


def test_our_step_has_the_baselines_loss_for_the_same_inputs(inputs):
    baseline, ours = Baseline(RECIPES["diffusers"], WORK), Ours(WORK)
    latents, noise, timesteps, text = inputs[0]
    noisy = baseline.scheduler.add_noise(latents, noise, timesteps)
    loss = sample_losses(ours.unet, Noised(noisy, noise, timesteps), text).mean()
    assert loss.item() == pytest.approx(baseline.loss(*inputs[0]).item(), rel=1e-6)


def test_full_fp16_unscales_its_gradients(inputs):
    """torch refuses to unscale fp16 gradients; full-fp16 trainers patch it, and so does this recipe."""
    baseline = Baseline(
        RECIPES["diffusers-16bit"], Workload(optimizer="adamw", device="cpu", precision="fp16").resolved()
    )
    assert baseline.scaler.is_enabled()
    before = copy.deepcopy(baseline.parameters[0].detach())
    latents, noise, timesteps = (x[:1] for x in inputs[0][:3])
    text = inputs[0][3][:1]
    loss = baseline.loss(latents, noise, timesteps, text)
    baseline.scaler.scale(loss).backward()
    scaled = baseline.parameters[0].grad.clone()
    baseline.scaler.unscale_(baseline.optimizer)
    torch.testing.assert_close(baseline.parameters[0].grad * baseline.scaler.get_scale(), scaled, rtol=0.02, atol=1.0)
    assert torch.equal(before, baseline.parameters[0])


def test_the_baseline_has_fused_attention_and_the_same_checkpointing_and_optimizer():
    work = Workload(device="cpu", checkpointing="full").resolved()
    baseline, ours = Baseline(RECIPES["diffusers"], work), Ours(work)
    kinds = [{type(m.processor) for m in attention_modules(t.unet)} for t in (baseline, ours)]
    # diffusers' own processor over SDPA, which is a fused kernel too
    assert kinds == [{AttnProcessor2_0}, {AttendProcessor}]
    assert "AttnProcessor2_0" in baseline.notes
    assert "sdpa for head dim" in ours.notes
    assert baseline.unet.is_gradient_checkpointing
    assert ours.unet.is_gradient_checkpointing
    # the same algorithm with the same states: theirs by bitsandbytes, ours by our kernel
    theirs = type(baseline.optimizer)
    assert (theirs.__module__.partition(".")[0], theirs.__name__) == ("bitsandbytes", "AdamW8bit")
    assert ours.optimizer.spec.name == "adamw8bit"


def test_steps_reading_from_a_cache_are_measured_for_every_recipe_and_batch_size():
    works = variants(("safelight", "diffusers"), (1, 2), Workload(device="cpu"))
    records = list(measure(works, repeats=1, loader=True))
    assert [(r["config"]["recipe"], r["config"]["batch_size"]) for r in records] == [
        ("safelight", 1),
        ("safelight", 2),
        ("diffusers", 1),
        ("diffusers", 2),
    ]
    for record in records:
        (low, middle, high) = record["figures"]["images_per_s"]
        assert 0 < low <= middle <= high
        assert record["config"]["loader"]
        assert middle == pytest.approx(record["config"]["batch_size"] / record["figures"]["step_ms"][1] * 1e3, rel=0.01)
        # on a CPU there is only the peak of the whole process
        assert record["figures"]["peak_gib"] is None


def test_cached_batches_are_full_and_in_a_new_order_each_epoch():
    work = Workload(batch_size=2, device="cpu").resolved()
    with cached_batches(work, 5) as batches:
        seen = [next(batches) for _ in range(4)]
    assert all(batch.mean_BCHW.shape == (2, 4, 16, 16) and len(set(batch.sample_ids)) == 2 for batch in seen)
    assert len({batch.sample_ids for batch in seen}) > 1
