"""Runs that train a word: equal to plain torch, stopped by kill -9 and resumed, sampled, exported and loaded again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.config.toml import parse_config
from safelight.trainer.train import train
from tests.small_base import small_base


def settings_for(folder: Path, dataset: Path, embedding: dict | None = None, **tables) -> dict:
    return {
        "run": {"dir": str(folder), "seed": 9, "device": "cpu"},
        "model": {"base": small_base()},
        "data": {"path": str(dataset), "resolution": 64, "caption_dropout": 0.2, "validation_fraction": 0.5},
        "train": {"batch_size": 4, "accumulate": 2, "epochs": 3},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
        "adapter": {"kind": "embedding"},
        "embedding": {"word": "<look>", "initial_text": "a square", "vectors": 3, **(embedding or {})},
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 1, "compare_at_end": False},
        "validate": {"timesteps": 1, "max_images": 4},
        "save": {"every_steps": 1, "keep": 20},
        "log": {"every_steps": 2, "tensorboard": False},
        **tables,
    }


def test_only_the_vectors_change(tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    train(parse_config(settings_for(folder, tiny_dataset), "here"))
    steps = list_checkpoints(folder)
    words = [load_file(folder_of(folder, step) / "embedding" / "learned_embeds.safetensors") for step in steps]
    assert all(list(word) == ["<look>"] and word["<look>"].shape == (3, 128) for word in words)
    assert not any(torch.equal(a["<look>"], b["<look>"]) for a, b in itertools.pairwise(words))
    for step in steps:
        checkpoint = folder_of(folder, step)
        files = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*.*"))
        assert files == ["embedding/learned_embeds.safetensors", "state.json", "state.safetensors"]
        assert sum(x.numel() for x in load_file(folder_of(folder, step) / "state.safetensors").values()) < 4000
