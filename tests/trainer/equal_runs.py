"""Compares two runs bit for bit, except for times."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from safelight.trainer.checkpoint.files import folder_of, list_checkpoints

CLOCK_FIELDS = {"time", "images_per_s", "memory_gib"}


def metrics(folder: Path) -> list[dict]:
    """Return the metrics without times, speed and memory, and without the events of a stop and a resume."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]
    return [row for row in rows if row.get("event") not in ("stopped", "resumed")]


def assert_equal_weights(one: Path, other: Path, trained: str = "unet/diffusion_pytorch_model.safetensors") -> None:
    """Assert that two runs have the same checkpoints, with equal tensors. trained: a checkpoint's weights."""
    steps = list_checkpoints(one)
    assert steps == list_checkpoints(other)
    for step in steps:
        for name in (trained, "state.safetensors"):
            a, b = (load_file(folder_of(folder, step) / name) for folder in (one, other))
            assert a.keys() == b.keys()
            unequal = [
                key
                for key in a
                if not torch.equal(a[key].view(-1).view(torch.uint8), b[key].view(-1).view(torch.uint8))
            ]
            assert not unequal, (step, name, unequal[:3])


def assert_equal_runs(one: Path, other: Path, trained: str = "unet/diffusion_pytorch_model.safetensors") -> None:
    """Assert that checkpoints, their tensors, metrics and sampled images are equal. trained: a checkpoint's weights."""
    assert_equal_weights(one, other, trained)
    assert metrics(one) == metrics(other)
    drawn = sorted(path.relative_to(one) for path in one.glob("samples/*/*"))
    assert drawn
    assert all((one / path).read_bytes() == (other / path).read_bytes() for path in drawn)
