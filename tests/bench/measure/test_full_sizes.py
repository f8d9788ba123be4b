"""Counts of SD2.1 and SDXL at full size on meta tensors; steps and training of small models of their architecture."""

import dataclasses
import json

import pytest
import torch

from safelight.bench.measure import count, gate
from safelight.bench.measure.memory import measure_on_cpu
from safelight.bench.recipes.other_trainers import ALL_RECIPES
from safelight.bench.recipes.suite import measure, variants
from safelight.bench.recipes.workload import Workload, initial_unet
from safelight.trainer.families.registry import family_of
from safelight.trainer.models.architectures import RANDOM_MODELS
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_texts, meta_unet
from safelight.trainer.train import train
from tests.called import call
from tests.trainer.families.small_sdxl import write_small_sdxl

SMALL = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": [2, 4, 4],
    "norm_num_groups": 8,
}


@pytest.fixture
def small_sdxl(monkeypatch):
    """A base with SDXL's architecture and conditioning, but few channels."""
    unet = {
        **RANDOM_MODELS["sdxl"]["unet"],
        **SMALL,
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 48,
    }
    monkeypatch.setitem(RANDOM_MODELS, "small-xl", {**RANDOM_MODELS["sdxl"], "unet": unet})
    return "random:small-xl"


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"), [("sd21", 865_910_724, 686), ("sdxl", 2_567_463_684, 1_680)]
)
def test_random_bases_have_the_published_numbers_of_parameters(name, parameters, tensors):
    sizes = [p.numel() for p in meta_unet(resolve_base(f"random:{name}")).parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)


# (patched, checkpointing) -> MiB saved by SDXL at 128x128 latents, counted independently of this code
SDXL_SAVED = {(False, "none"): 6570, (True, "none"): 3794, (False, "full"): 560}


def count_within_golden(base: str, patched: bool, checkpointing: str) -> dict:
    """Count a base's step, check that no figure is above its golden line, and return the figures."""
    (golden,) = (
        g
        for g in gate.goldens(base=base)
        if g["config"].get("patched", False) == patched and g["config"]["checkpointing"] == checkpointing
    )
    config = {**golden["config"]}
    figures = count.figures(count.trace(resolve_base(config.pop("base")), **config))
    assert gate.differences(golden["figures"], figures)[0] == []
    return figures


@pytest.mark.slow
def test_counts_of_sdxl_agree_with_independent_counts():
    figures = count_within_golden("random:sdxl", False, "none")
    assert round(figures["forward_gflop"]) == 6761
    assert figures["step_gflop"] == pytest.approx(20_600, rel=0.002)
    assert round(figures["saved_mib"]) == SDXL_SAVED[False, "none"]


@pytest.mark.slow
@pytest.mark.parametrize(("patched", "checkpointing"), [(True, "none"), (False, "full")])
def test_saved_bytes_of_a_patched_or_checkpointed_sdxl(patched, checkpointing):
    figures = count_within_golden("random:sdxl", patched, checkpointing)
    # the patch also saves the text's keys and values, which the independent count left out
    assert figures["saved_mib"] == pytest.approx(SDXL_SAVED[patched, checkpointing], rel=0.002)
    assert round(figures["forward_gflop"]) == 6761


@pytest.mark.slow
def test_launches_and_saved_bytes_of_a_patched_and_checkpointed_sdxl_do_not_rise():
    figures = count_within_golden("random:sdxl", True, "full")
    assert figures["saved_mib"] < SDXL_SAVED[False, "full"]


@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True])
def test_counts_of_sd21_agree_with_independent_counts(patched):
    figures = count_within_golden("random:sd21", patched, "none")
    assert round(figures["forward_gflop"]) == 804
    assert figures["step_gflop"] == pytest.approx(2470, rel=0.002)


def test_stand_in_conditioning_is_that_of_an_uncropped_image(small_sdxl):
    unet, seen = initial_unet(small_sdxl, torch.device("cpu")), []
    unet.add_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    rows, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    conditioning = family_of(unet.config).stand_in_conditioning(unet.config, text, (16, 16))
    assert conditioning.sizes_B6.tolist() == [[128, 128, 0, 0, 128, 128]] * 2
    assert conditioning.pooled_BP.shape == (2, 32)
    assert conditioning.pooled_BP.std() == pytest.approx(1, abs=0.3)
    unet(rows, torch.tensor([5, 6]), **conditioning.unet_arguments(torch.float32))
    assert seen[0].shape == (2, 32 + 6 * 8)


@pytest.mark.slow
def test_every_other_recipe_takes_steps_of_an_sdxl_folder(compiled, tmp_path):
    """All but everydream's, which refuses it; `bench count` and a loop of our own take the folder, too."""
    folder = str(write_small_sdxl(tmp_path / "sdxl"))
    work = Workload(folder, batch_size=1, device="cpu", latent_size=8)
    recipes = [name for name in ALL_RECIPES if name != "everydream"]
    records = list(measure(variants(recipes, (1,), work), repeats=1))
    assert [r["config"]["recipe"] for r in records] == recipes
    refused = call("bench", "baseline", "everydream", "--base", folder, "--device", "cpu")
    refused.assert_refused(
        "bench", f"recipe everydream has no SDXL, as EveryDream2 has none; use random:sd21, not {folder}"
    )
    counted = call("bench", "count", "--base", folder, "--json")
    assert json.loads(counted.out)["figures"]["launches"] > 0
    small = ["--base", folder, "--device", "cpu", "--photographs", 2, "--batch-size", 1, "--epochs", 3, "--json"]
    looped = call("bench", "loop", *small)
    assert [json.loads(line)["config"]["recipe"] for line in looped.out.splitlines()] == ["safelight"]
    assert "only our own loop: recipe everydream has no SDXL" in looped.err


@pytest.mark.slow
def test_sdxl_steps_with_and_without_our_kernels_and_as_a_recipe(small_sdxl):
    work = Workload(small_sdxl, device="cpu", checkpointing="full")
    recipes = ("safelight", "safelight-unpatched", "diffusers")
    records = list(measure(variants(recipes, (2,), work), repeats=1))
    assert [r["config"]["recipe"] for r in records] == list(recipes)
    assert all(r["figures"]["images_per_s"][1] > 0 for r in records)
    assert measure_on_cpu(dataclasses.replace(work, batch_size=1).resolved())["step_mib"] > 0


def test_a_patched_sdxl_has_the_same_flops_and_saves_less(small_sdxl):
    base = resolve_base(small_sdxl)
    plain, patched = (count.trace(base, layout="channels_last", patched=patched) for patched in (False, True))
    assert patched.flops_forward == plain.flops_forward > 0
    assert patched.saved_bytes < plain.saved_bytes


def test_sd21_trains(make_config, monkeypatch):
    """A small model with its architecture: heads as a list, linear projections, GELU text encoder, v-prediction."""
    parts = RANDOM_MODELS["sd21"]
    assert parts["text_encoder"]["hidden_size"] == parts["unet"]["cross_attention_dim"] == 1024
    unet = {**parts["unet"], **SMALL, "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"]}
    unet["up_block_types"] = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2
    text = {**parts["text_encoder"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text["num_attention_heads"] = 4
    vae = {**parts["vae"], "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    monkeypatch.setitem(RANDOM_MODELS, "sd21", {**parts, "unet": unet, "vae": vae, "text_encoder": text})
    assert load_texts(resolve_base("random:sd21"), "", 0)[0][1].config.hidden_act == "gelu"
    config = make_config(model={"base": "random:sd21"}, train={"max_steps": 2}, sample={"every_epochs": 0})
    result = train(config)
    assert result.position.step == 2
    assert json.loads((result.run_dir / "model.json").read_text())["prediction_type"] == "v_prediction"
