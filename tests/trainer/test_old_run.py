"""A run begun before the source tree was rearranged (commit 8a4ec79) resumes: the same state, the same losses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.toml import load_config
from safelight.trainer.models.base import tiny_folder
from safelight.trainer.train import train
from tests.trainer.equal_runs import metrics

OLD = Path(__file__).with_name("run_before_rooms")
# two processors' float32 sums differ by this much after four steps, at most
RELATIVE = 2e-3


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    """A copy of the old run with its dataset and base; text encoder and autoencoder come from the bundled tiny base."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        source = Path(tiny_folder()) / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "base" / part)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def losses(folder: Path) -> list[tuple]:
    return [(row["kind"], row["step"], row.get("split"), row["loss"]) for row in metrics(folder) if "loss" in row]


def final_hashes(run_dir: Path) -> dict[str, str]:
    folder = run_dir / "checkpoints" / "step-00000012"
    names = ("state.safetensors", "unet/diffusion_pytorch_model.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_a_run_from_before_the_move_goes_on_as_it_would_have(old_run):
    before, expected = losses(old_run), json.loads((OLD / "expected.json").read_text())
    assert list_checkpoints(old_run) == [8]
    train(load_config(old_run / "config.toml"), resume=True)
    after = losses(old_run)
    assert [row[:3] for row in after] == [row[:3] for row in before]
    assert after[-1][1] == expected["step"]
    torch.testing.assert_close(
        torch.tensor([row[3] for row in after]), torch.tensor([row[3] for row in before]), rtol=RELATIVE, atol=0
    )
    if os.environ.get("SAFELIGHT_SAME_CPU"):
        # equal bits are promised on equal processors and versions alone; expected.json names both
        assert final_hashes(old_run) == expected["sha256"]
