"""Runs on our kernels: killed and resumed with them, without them, and the other way round."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.trainer.checkpoint.files import folder_of, list_checkpoints


def settings_of(folder: Path, dataset: Path, kernels: str, **train) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 4, "device": "cpu"},
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


def test_runs_with_and_without_kernels_resume_from_each_other(run, tiny_dataset, tmp_path):
    alone = {}
    for kernels in ("off", "on"):
        assert run(settings_of(tmp_path / kernels, tiny_dataset, kernels)) == 0
        alone[kernels] = weights(tmp_path / kernels, 4)
    first = weights(tmp_path / "off", 2)
    assert list_checkpoints(tmp_path / "on") == [2, 4]
    way = travelled(alone["off"], first)
    # other kernels, other roundings: not the same bits, but the same way
    assert 0 < travelled(alone["on"], alone["off"]) < 1e-4 * way
    notes = json.loads((tmp_path / "on" / "model.json").read_text())["notes"]
    assert any(note.startswith("kernels in") for note in notes)
    for begun, resumed in (("on", "off"), ("off", "on"), ("on", "on")):
        folder = tmp_path / f"{begun} then {resumed}"
        assert run(settings_of(folder, tiny_dataset, begun), point="step", count=3) == -signal.SIGKILL
        assert list_checkpoints(folder) == [2]
        # what was saved is what the other run saved at this step
        saved = weights(folder, 2)
        assert all(torch.equal(x, weights(tmp_path / begun, 2)[name]) for name, x in saved.items())
        assert run(settings_of(folder, tiny_dataset, resumed), resume=True) == 0
        assert travelled(weights(folder, 4), alone["off"]) < 1e-4 * way
        assert losses(folder) == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    same = weights(tmp_path / "on then on", 4)
    assert all(torch.equal(x, alone["on"][name]) for name, x in same.items())


@pytest.mark.slow
def test_checkpointing_on_kernels_trains_the_same_bits(run, tiny_dataset, tmp_path):
    """With 16-bit weights, which an optimizer moves after the patch laid them side by side."""
    found = {}
    for how in ("none", "selective", "full"):
        settings = settings_of(tmp_path / how, tiny_dataset, "on", checkpointing=how)
        settings["model"] = {"precision": "bf16"}
        settings["train"]["max_steps"] = 2
        assert run(settings) == 0
        found[how] = weights(tmp_path / how, 2)
    for name, x in found["none"].items():
        assert torch.equal(x, found["selective"][name])
        assert torch.equal(x, found["full"][name])
