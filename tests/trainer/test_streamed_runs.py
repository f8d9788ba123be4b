"""Runs whose weights stream from host memory: samples, validation, text encoder, kill -9 and resume, equal to paged."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.train import train
from tests.small_base import small_base
from tests.trainer.equal_runs import assert_equal_runs

TEXT = {"train": True, "lr": 1e-3, "epochs": 1}


def settings_of(folder: Path, dataset: Path, memory: str, **tables) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base(), "precision": "bf16"},
        "data": {"path": str(dataset), "resolution": 64, "validation_fraction": 0.5, "caption_dropout": 0.2},
        "train": {"batch_size": 4, "accumulate": 2, "epochs": 2, "checkpointing": "full"},
        "optimizer": {"lr": 1e-3, "memory": memory, "fused_backward": True},
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 1, "cfg": 2.0},
        "validate": {"timesteps": 1, "max_images": 4},
        "save": {"every_steps": 1, "keep": 20},
        "log": {"every_steps": 2, "tensorboard": False},
        **tables,
    }


@pytest.mark.slow
@pytest.mark.parametrize("text", [{}, TEXT], ids=["unet", "text encoder"])
def test_a_streamed_run_has_the_bits_of_paged_though_killed(run, tiny_dataset, tmp_path, text):
    """Weights, optimizer state, losses, validation and samples, after kill -9 in a step and in a checkpoint's files."""
    paged, streamed = (
        settings_of(tmp_path / memory, tiny_dataset, memory, text_encoder=text) for memory in ("paged", "streamed")
    )
    assert run(paged) == 0
    assert run(streamed, point="step", count=2) == -signal.SIGKILL
    assert run(streamed, resume=True, point="checkpoint file", count=3) == -signal.SIGKILL
    assert run(streamed, resume=True) == 0
    assert_equal_runs(tmp_path / "paged", tmp_path / "streamed")
    for step in list_checkpoints(tmp_path / "paged"):
        one, other = (
            sorted(folder_of(tmp_path / name, step).glob("text_encoder*/*")) for name in ("paged", "streamed")
        )
        assert [path.name for path in one] == [path.name for path in other]
        assert bool(one) == bool(text)
        for a, b in zip(map(load_file, one), map(load_file, other), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_validation_and_sampling_take_the_blocks_of_a_run(tiny_dataset, tmp_path, monkeypatch):
    taken, take = [], StreamedWeights.take

    def spy(self, block):
        taken.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        take(self, block)

    monkeypatch.setattr(StreamedWeights, "take", spy)
    settings = settings_of(tmp_path / "run", tiny_dataset, "streamed")
    settings["train"] |= {"max_steps": 1}
    train(parse_config(settings, "here"))
    of_steps = sum(is_training for is_training, _ in taken)
    assert 0 < of_steps < len(taken)
    settings |= {"run": {**settings["run"], "dir": str(tmp_path / "other")}, "sample": {"every_epochs": 0}}
    del taken[:]
    train(parse_config(settings, "here"))
    assert of_steps < len(taken), "validated"
