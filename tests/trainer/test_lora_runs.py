"""Runs that train a LoRA: checkpoints, kills and resumes, pictures, and the files that other programs read."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.export import export
from tests.trainer.equal_runs import assert_equal_runs
from tests.trainer.families.small_sdxl import write_small_sdxl
from tests.trainer.test_resume import settings_of

ADAPTER = {"kind": "lora", "rank": 4, "target": ["attention", "feed-forward", "*conv1", "*.time_emb_proj"]}
WEIGHTS = "adapter/pytorch_lora_weights.safetensors"


def lora_settings(folder: Path, dataset: Path, adapter: dict | None = None, **more) -> dict:
    more = copy.deepcopy(more)
    more["optimizer"] = {"lr": 1e-2, **more.get("optimizer", {})}
    more["stage"] = [{"epochs": 1}, {"epochs": 1, "lr": 5e-3, "batch_size": 3, "accumulate": 1}]
    return settings_of(folder, dataset, adapter={**ADAPTER, **(adapter or {})}, **more)


KILLED = {
    # a moving average, 16-bit weights with remainders, dropout's masks, magnitudes
    "average": ({}, {"train": {"ema_decay": 0.9}}),
    "bf16, dropout, DoRA": ({"dropout": 0.3, "dora": True}, {"model": {"precision": "bf16"}}),
    "kernels": ({}, {"train": {"kernels": "on", "checkpointing": "full"}}),
    "adamw": ({"rslora": True}, {"optimizer": {"name": "adamw"}}),
}


@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=[] if name in list(KILLED)[:2] else pytest.mark.slow) for name in KILLED]
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(run, tiny_dataset, tmp_path, what):
    adapter, more = KILLED[what]
    assert run(lora_settings(tmp_path / "alone", tiny_dataset, adapter, **more)) == 0
    killed = lora_settings(tmp_path / "killed", tiny_dataset, adapter, **more)
    assert run(killed, point="step", count=4) == -signal.SIGKILL
    assert run(killed, resume=True, point="checkpoint file", count=1) == -signal.SIGKILL
    assert run(killed, resume=True) == 0
    assert_equal_runs(tmp_path / "alone", tmp_path / "killed")


@pytest.fixture(scope="module")
def finished(run, tiny_dataset, tmp_path_factory) -> dict[str, Path]:
    """Finished runs by the kind of their base."""
    folder = tmp_path_factory.mktemp("lora")
    runs = {name: folder / name for name in ("tiny", "sdxl")}
    for name, base in (("tiny", "tiny"), ("sdxl", str(write_small_sdxl(folder / "base")))):
        adapter = {"target": ["linear", "convolution"], "dora": name == "sdxl", "rslora": name == "tiny", "alpha": 3.0}
        settings = lora_settings(runs[name], tiny_dataset, adapter, model={"base": base}, train={"ema_decay": 0.5})
        settings["stage"] = [{"epochs": 1}]
        assert run(settings) == 0
    return runs


def test_a_checkpoint_holds_the_adapter_only(finished):
    folder = folder_of(finished["tiny"], list_checkpoints(finished["tiny"])[-1])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {WEIGHTS, "state.safetensors", "state.json"}
    weights = load_file(folder / WEIGHTS)
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in weights)
    trained = sum(x.numel() for x in weights.values())
    state = load_file(folder / "state.safetensors")
    assert sum(x.numel() for name, x in state.items() if name.startswith("ema/")) == trained
    assert not [
        name
        for name in state
        if "/" in name and name.partition("/")[0] in ("state1", "state2", "ema") and ".adapter." not in name
    ]
    model = json.loads((finished["tiny"] / "model.json").read_text())
    assert model["trained_parameters"] == trained
    assert any("rank 4" in note and f"{trained:,} parameters" in note for note in model["notes"])


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipeline("a red circle", height=64, width=64, num_inference_steps=3, generator=generator, output_type="pt")
    return images.images[0]


@pytest.mark.parametrize("name", ["tiny", "sdxl"])
def test_exports_draw_the_same_picture_in_diffusers(finished, tmp_path, name):
    """The LoRA's own file in both layouts, read by diffusers into the base, and the merged model."""
    from diffusers import DiffusionPipeline

    run = finished[name]
    export(run, tmp_path / "merged", dtype="fp32", merge=True)
    merged = draw(DiffusionPipeline.from_pretrained(tmp_path / "merged"))
    base = open_run(run).base.folder
    plain = draw(DiffusionPipeline.from_pretrained(base, safety_checker=None))
    assert (merged - plain).abs().max() > 0.05
    for layout in ("diffusers", "kohya"):
        file = tmp_path / f"{layout}.safetensors"
        done = export(run, file, dtype="fp32", layout=layout)
        assert done.layout == layout
        pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
        if layout == "kohya" and name == "sdxl":
            # diffusers reads no dora_scale of kohya's
            continue
        pipeline.load_lora_weights(file)
        assert (draw(pipeline) - merged).abs().max() < 2e-3, layout
