"""The steps of other trainers against plain training loops."""

import copy
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from transformers.optimization import Adafactor

from safelight.bench.core.arguments import RecipeName
from safelight.bench.recipes import other_trainers
from safelight.bench.recipes.baselines import RECIPES, Baseline
from safelight.bench.recipes.other_trainers import ALL_RECIPES, STYLES, EveryDream, make_baseline, read_photograph
from safelight.bench.recipes.suite import OURS, measure, variants
from safelight.bench.recipes.workload import LR, SEED, WEIGHT_DECAY, Workload, random_batches
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_unet

pytestmark = pytest.mark.usefixtures("compiled")
WORK = Workload(batch_size=2, optimizer="adamw", device="cpu", precision="fp32").resolved()


class Plain:
    """A minimal training loop."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.unet = load_unet(resolve_base("tiny"), SEED, dtype).train()
        self.scheduler = DDPMScheduler.from_config(resolve_base("tiny").config_of("scheduler"))

    def loss(self, latents, noise, timesteps, text):
        dtype = self.unet.dtype
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return F.mse_loss(self.unet(noisy.to(dtype), timesteps, text.text_BTD.to(dtype)).sample.float(), noise)


def adafactor(parameters) -> Adafactor:
    return Adafactor(parameters, lr=LR, weight_decay=WEIGHT_DECAY, scale_parameter=False, relative_step=False)


def difference(baseline: Baseline, plain: Plain) -> tuple[float, float]:
    """Return the largest and the mean difference of weights, in learning rates."""
    pairs = zip(baseline.parameters, plain.unet.parameters(), strict=True)
    gaps = torch.cat([(a.detach().float() - b.detach().float()).abs().flatten() for a, b in pairs]) / LR
    return gaps.max().item(), gaps.mean().item()


def test_every_recipe_is_an_argument_of_the_command_line_and_explained():
    assert set(get_args(RecipeName)) == set(ALL_RECIPES) == {*RECIPES, *STYLES}
    assert all(len(recipe.description) > 40 for recipe in ALL_RECIPES.values())
    with pytest.raises(ValueError, match="unknown recipe 'nobody'; use safelight, "):
        list(measure(variants(("nobody",), (1,), WORK), repeats=1))


@pytest.mark.parametrize("name", ["kohya", "kohya-fused"])
def test_kohya_in_fp32_is_plain_adafactor(name, inputs):
    baseline, plain = make_baseline(name, WORK), Plain()
    optimizer = adafactor(plain.unet.parameters())
    for batch in inputs:
        loss, expected = baseline.loss(*batch), plain.loss(*batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        baseline.update(loss)
        expected.backward()
        parts = [[p] for p in plain.unet.parameters()] if name == "kohya-fused" else [plain.unet.parameters()]
        for part in parts:
            torch.nn.utils.clip_grad_norm_(part, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in baseline.parameters)
    largest, mean = difference(baseline, plain)
    assert largest < 1
    assert mean < 0.02
    # the weights did move
    assert difference(baseline, Plain())[1] > 0.5


def test_kohya_in_bf16_has_no_fp32_weight_and_no_autocast(inputs):
    work = Workload(batch_size=2, device="cpu", precision="bf16").resolved()
    baseline = make_baseline("kohya", work)
    assert {p.dtype for p in baseline.parameters} == {torch.bfloat16}
    assert not baseline.uses_autocast
    loss = baseline.loss(*inputs[0])
    assert loss.item() == pytest.approx(Plain(torch.bfloat16).loss(*inputs[0]).item(), rel=1e-3)
    with pytest.raises(ValueError, match="kohya-fused needs bf16 or fp32"):
        make_baseline("kohya-fused", Workload(device="cpu", precision="fp16").resolved())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.long
def test_mlperf_is_plain_adamw_on_fp32_masters_without_clipping(precision, inputs, compiled):
    work = Workload(batch_size=2, device="cpu", precision=precision).resolved()
    baseline, plain = make_baseline("mlperf", work), Plain(work.dtype)
    assert compiled == [baseline.unet]
    assert baseline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert baseline.optimizer.defaults["fused"]
    masters = [p.detach().float().clone().requires_grad_() for p in plain.unet.parameters()]
    optimizer = torch.optim.AdamW(masters, LR, weight_decay=WEIGHT_DECAY)
    scale = 65536.0 if precision == "fp16" else 1.0
    for batch in inputs:
        loss, expected = baseline.loss(*batch), plain.loss(*batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if precision == "fp32" else 0.01)
        baseline.update(loss)
        (expected * scale).backward()
        for master, p in zip(masters, plain.unet.parameters(), strict=True):
            master.grad, p.grad = p.grad.float() / scale, None
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, plain.unet.parameters(), strict=True):
                p.copy_(master)
    gaps = torch.cat([(a - b.detach()).abs().flatten() for a, b in zip(baseline.masters, masters, strict=True)]) / LR
    # 16-bit gradients differ in their last bits by the memory layout, and Adam takes a whole step by their sign
    assert gaps.mean() < (0.02 if precision == "fp32" else 0.3)
    pairs = zip(baseline.parameters, baseline.masters, strict=True)
    assert all(torch.equal(p.detach(), master.to(p.dtype)) for p, master in pairs)


def test_mlperf_is_not_compiled_without_a_compiler(monkeypatch, compiled):
    monkeypatch.setattr(other_trainers.shutil, "which", lambda name: None)
    assert "not compiled: no compiler found" in make_baseline("mlperf", WORK).notes
    assert compiled == []


@pytest.fixture(scope="module")
def everydream() -> EveryDream:
    return make_baseline("everydream", WORK)


def test_everydream_decodes_and_encodes_its_photographs_in_order(everydream):
    photographs = everydream.photographs
    pixels, captions = photographs.take(2)
    assert pixels.shape == (2, 3, photographs.side_px, photographs.side_px)
    assert np.array_equal(pixels[1].numpy(), read_photograph(photographs.files[1], photographs.side_px))
    assert -1 <= pixels.min() < -0.5 < 0.5 < pixels.max() <= 1
    assert captions == photographs.captions[:2]
    torch.manual_seed(5)
    latents, text = everydream.encode(pixels, captions)
    torch.manual_seed(5)
    posterior = everydream.vae.encode(pixels).latent_dist
    expected = posterior.mean + posterior.std * torch.randn(posterior.mean.shape)
    torch.testing.assert_close(latents, expected * everydream.vae.config.scaling_factor)
    ids = everydream.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(text.text_BTD, everydream.text_encoder(ids)[0])
    # the next call continues with the third photograph
    assert photographs.take(1)[1] == [photographs.captions[2]]


def test_everydreams_step_equals_a_plain_loops(everydream):
    baseline, plain = copy.copy(everydream), Plain()
    baseline.photographs._pending.clear()
    baseline.photographs._next = 0
    torch.manual_seed(6)
    loss = baseline.step(random_batches(1, WORK)[0])
    torch.manual_seed(6)
    pixels = torch.stack(
        [torch.from_numpy(read_photograph(f, baseline.photographs.side_px)) for f in baseline.photographs.files[:2]]
    )
    latents, text = baseline.encode(pixels, baseline.photographs.captions[:2])
    noise = torch.randn_like(latents)
    expected = plain.loss(latents, noise, torch.randint(0, 1000, (2,)), text)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    torch.nn.utils.clip_grad_norm_(plain.unet.parameters(), 1.0)
    optimizer = torch.optim.AdamW(plain.unet.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    optimizer.step()
    assert difference(baseline, plain)[1] < 0.02


def test_everydream_uses_fp16_for_bf16_and_refuses_sdxl(inputs):
    baseline = make_baseline("everydream", Workload(batch_size=2, device="cpu", precision="bf16").resolved())
    assert (baseline.dtype, baseline.scaler.get_scale()) == (torch.float16, 2**17.5)
    assert {p.dtype for p in baseline.parameters} == {torch.float32}
    assert type(baseline.optimizer).__name__ == "AdamW8bit"
    seen = set()
    linear = next(m for m in baseline.text_encoder.modules() if isinstance(m, torch.nn.Linear))
    for module in (baseline.vae.encoder.conv_in, linear):
        module.register_forward_hook(lambda module, args, output: seen.add((module.weight.dtype, output.dtype)))
    latents, conditioning = baseline.encode(*baseline.photographs.take(1))
    # fp32 weights under fp16 autocast, and fp32 outputs
    assert seen == {(torch.float32, torch.float16)}
    assert latents.dtype == conditioning.text_BTD.dtype == torch.float32
    assert baseline.loss(*inputs[0]).item() == pytest.approx(Plain().loss(*inputs[0]).item(), rel=0.01)
    with pytest.raises(ValueError, match=r"recipe everydream has no SDXL, .*; use random:sd21, not random:sdxl"):
        make_baseline("everydream", Workload("random:sdxl", device="cpu").resolved())


@pytest.mark.long
def test_all_trainers_are_measured_interleaved_with_ours():
    names = (OURS, *STYLES)
    records = list(measure(variants(names, (1,), Workload(device="cpu")), repeats=1))
    assert [r["config"]["recipe"] for r in records] == list(names)
    assert all(r["figures"]["images_per_s"][1] > 0 for r in records)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mlperfs_graph_trains_on_the_batch_it_is_replayed_with():
    baseline = make_baseline("mlperf", Workload(batch_size=2, precision="bf16", device="cuda").resolved())
    batches, before = random_batches(2, WORK), baseline.masters[0].clone()
    losses = [baseline.step(batch).item() for batch in batches * 2]
    assert len(baseline.graphs) == 1
    assert len(set(losses)) == 4
    assert not torch.equal(before, baseline.masters[0])
