"""Runs on our kernels: stopped and resumed with them, without them, and the other way round."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.train import train
from tests.small_base import small_base


def settings_of(folder: Path, dataset: Path, kernels: str, **train) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 4, "device": "cpu"},
        "model": {"base": small_base()},
        "data": {"path": str(dataset), "resolution": 64},
        "train": {"batch_size": 4, "max_steps": 4, "kernels": kernels, **train},
        # without a large eps Adam's first steps are signs, of gradients that are nothing but rounding too
        "optimizer": {"name": "adamw", "lr": 1e-2, "eps": 0.01},
        "stage": [{"epochs": 2}],
        "sample": {"every_epochs": 0, "steps": 1, "num_prompts": 1},
        "validate": {"timesteps": 1, "every_epochs": 0},
        "save": {"every_steps": 2, "keep": 3},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder_of(run, step) / "unet" / "diffusion_pytorch_model.safetensors")


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def travelled(a: dict, b: dict) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def test_runs_with_and_without_kernels_resume_from_each_other(tiny_dataset, tmp_path):
    def train_run(folder: Path, kernels: str, resume: bool = False) -> None:
        train(parse_config(settings_of(folder, tiny_dataset, kernels), "test"), resume=resume)

    alone = {}
    for kernels in ("off", "on"):
        train_run(tmp_path / kernels, kernels)
        assert list_checkpoints(tmp_path / kernels) == [2, 4]
        alone[kernels] = weights(tmp_path / kernels, 4)
    way = travelled(alone["off"], weights(tmp_path / "off", 2))
    # other kernels round differently: not the same bits, but nearly the same weights
    assert 0 < travelled(alone["on"], alone["off"]) < 1e-4 * way
    notes = json.loads((tmp_path / "on" / "model.json").read_text())["notes"]
    assert any(note.startswith("kernels in") for note in notes)
    for begun, resumed in (("on", "off"), ("off", "on"), ("on", "on")):
        # the run as it was at step 2; later lines of its metrics are dropped on resuming
        folder = Path(shutil.copytree(tmp_path / begun, tmp_path / f"{begun} then {resumed}"))
        shutil.rmtree(folder_of(folder, 4))
        train_run(folder, resumed, resume=True)
        assert travelled(weights(folder, 4), alone["off"]) < 1e-4 * way
        assert losses(folder) == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    same = weights(tmp_path / "on then on", 4)
    assert all(torch.equal(x, alone["on"][name]) for name, x in same.items())


@pytest.mark.slow
def test_checkpointing_on_kernels_trains_the_same_bits(tiny_dataset, tmp_path):
    """With 16-bit weights, which an optimizer moves after the patch laid them side by side."""
    found = {}
    for how in ("none", "selective", "full"):
        settings = settings_of(tmp_path / how, tiny_dataset, "on", checkpointing=how)
        settings["model"]["precision"] = "bf16"
        settings["train"]["max_steps"] = 2
        train(parse_config(settings, "test"))
        found[how] = weights(tmp_path / how, 2)
    for name, x in found["none"].items():
        assert torch.equal(x, found["selective"][name])
        assert torch.equal(x, found["full"][name])
