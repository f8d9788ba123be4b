"""Checkpoints that are whole or not there: `checkpoints/step-00000300/{unet/, state.safetensors, state.json}`.

A checkpoint is written beside its place, synced to disk and renamed. state.json is written last and holds the SHA-256 of
every other file: a folder without it does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.data.atomic import atomic_write_text, sync_folder

FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where a run stands. step: optimizer steps taken. epoch: 0-based, over all stages. step_in_epoch: steps taken of it.

    best_step, best_loss: the best validation so far, -1 and infinity before any.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    stage: int = 0
    best_step: int = -1
    best_loss: float = float("inf")


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run_dir.glob("checkpoints/step-*/state.json"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def save_checkpoint(run_dir: Path, unet: nn.Module, state: dict[str, Tensor], position: Position, run_key: str) -> Path:
    """Write a checkpoint and return its folder. run_key: what a resuming run must agree on (see train.run_key)."""
    place = folder_of(run_dir, position.step)
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    unet.save_pretrained(partial / "unet", safe_serialization=True)
    save_file(state, partial / "state.safetensors")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync_file(path)
    record = {
        "format": FORMAT,
        "run_key": run_key,
        "position": asdict(position),
        "sha256": {path.relative_to(partial).as_posix(): _digest(path) for path in files},
    }
    atomic_write_text(partial / "state.json", json.dumps(record, indent=1))
    for folder in (partial / "unet", partial):
        sync_folder(folder)
    if place.exists():
        # the same step again, after a resume from before it
        replaced = place.with_name(f".{place.name}.replaced.partial")
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    partial.rename(place)
    sync_folder(place.parent)
    return place


def check_files(folder: Path) -> dict:
    """Return a checkpoint's record after checking every checksum. Raises ValueError naming a damaged file."""
    record = json.loads((folder / "state.json").read_text())
    for name, digest in record["sha256"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise ValueError(
                f"checkpoint {folder} is damaged: {name} is missing or its checksum differs; "
                f"delete that folder to resume from the one before"
            )
    return record


def load_checkpoint(
    run_dir: Path, step: int, unet: nn.Module, run_key: Callable[[int], str]
) -> tuple[dict[str, Tensor], Position]:
    """Load the UNet's weights and return (optimizer state, position).

    run_key: the resuming run's key as a function of the stage reached. Raises ValueError for damage or another run's.
    """
    folder = folder_of(run_dir, step)
    record = check_files(folder)
    if record["run_key"] != run_key(record["position"]["stage"]):
        raise ValueError(
            f"checkpoint {folder} belongs to other settings (model, data, seed, stages or optimizer changed); "
            f"restore them from {run_dir / 'config.toml'} or start a new run with --run.dir"
        )
    load_unet_weights(folder, unet)
    return load_file(folder / "state.safetensors"), Position(**record["position"])


def load_unet_weights(folder: Path, unet: nn.Module) -> None:
    """Load a checkpoint's UNet weights into a UNet of the same architecture."""
    weights: dict[str, Tensor] = {}
    for path in sorted((folder / "unet").glob("*.safetensors")):
        weights.update(load_file(path))
    unet.load_state_dict(weights, strict=True)


def prune(run_dir: Path, keep: int, best_step: int) -> None:
    """Delete all checkpoints but the last `keep` and the best, and what a kill left half-written."""
    steps = list_checkpoints(run_dir)
    for step in set(steps[:-keep]) - {best_step}:
        folder = folder_of(run_dir, step)
        # state.json first: a kill in between leaves no folder that seems complete
        (folder / "state.json").unlink()
        shutil.rmtree(folder)
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if not (folder / "state.json").exists():
            shutil.rmtree(folder)
    for folder in (run_dir / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(folder)
