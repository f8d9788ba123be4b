"""Checkpoints that are whole or not there: `checkpoints/step-00000300/{unet/, state.safetensors, state.json}`.

A checkpoint is written beside its place, synced to disk and renamed. state.json is written last and holds the SHA-256 of
every other file: a folder without it does not count. Names other than `step-` and eight digits are nobody's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.data.atomic import atomic_write_text, sync_folder
from safelight.trainer.identity import Identity

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Position:
    """Where a run stands. step: optimizer steps taken. epoch: 0-based, over all stages. step_in_epoch: steps taken of it.

    best_step, best_loss: the best validation so far, -1 and None before any.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    stage: int = 0
    best_step: int = -1
    best_loss: float | None = None


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether it is there or not."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _step_folders(run_dir: Path) -> dict[int, Path]:
    found = ((_NAME.fullmatch(path.name), path) for path in (run_dir / "checkpoints").glob("step-*"))
    return {int(match[1]): path for match, path in found if match}


def list_checkpoints(run_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    return sorted(step for step, path in _step_folders(run_dir).items() if (path / "state.json").is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove_unfinished(run_dir: Path) -> None:
    """Delete what a kill or a full disk left half-written or half-deleted."""
    for folder in (run_dir / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(folder)
    for folder in _step_folders(run_dir).values():
        if not (folder / "state.json").is_file():
            shutil.rmtree(folder)


def save_checkpoint(
    run_dir: Path, unet: nn.Module, state: dict[str, Tensor], position: Position, identity: Identity
) -> Path:
    """Write a checkpoint and return its folder. A step is written once: the caller does not save it again."""
    place = folder_of(run_dir, position.step)
    partial = place.with_name(f".{place.name}.partial")
    # they must take neither the room nor the name of the new one
    _remove_unfinished(run_dir)
    assert not place.exists(), f"{place} is written a second time"
    partial.mkdir(parents=True)
    unet.save_pretrained(partial / "unet", safe_serialization=True)
    save_file(state, partial / "state.safetensors")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync_file(path)
    record = {
        "format": FORMAT,
        "position": asdict(position),
        "identity": asdict(identity),
        "sha256": {path.relative_to(partial).as_posix(): _digest(path) for path in files},
    }
    atomic_write_text(partial / "state.json", json.dumps(record, indent=1))
    for folder in (partial / "unet", partial):
        sync_folder(folder)
    partial.rename(place)
    for folder in (place.parent, run_dir):
        sync_folder(folder)
    return place


def read_record(folder: Path) -> dict:
    """Return a checkpoint's state.json. Raises ValueError for a damaged one and one of another version."""
    try:
        record = json.loads((folder / "state.json").read_bytes())
    except ValueError as error:
        raise ValueError(
            f"checkpoint {folder} is damaged: state.json is not readable ({error}); "
            f"delete that folder to resume from the one before"
        ) from None
    if record.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {folder} has format {record.get('format')}, this version reads {FORMAT}; use the version that wrote it"
        )
    return record


def read_identity(run_dir: Path, step: int) -> tuple[Identity, int]:
    """Return what a checkpoint was trained by, and the stage it stands in."""
    record = read_record(folder_of(run_dir, step))
    return Identity(**record["identity"]), record["position"]["stage"]


def check_files(folder: Path) -> dict:
    """Return a checkpoint's record after checking every checksum. Raises ValueError naming a damaged file."""
    record = read_record(folder)
    for name, digest in record["sha256"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise ValueError(
                f"checkpoint {folder} is damaged: {name} is missing or its checksum differs; "
                f"delete that folder to resume from the one before"
            )
    return record


def load_checkpoint(run_dir: Path, step: int, unet: nn.Module) -> tuple[dict[str, Tensor], Position]:
    """Load the UNet's weights and return (optimizer state, position). Raises ValueError for a damaged checkpoint."""
    folder = folder_of(run_dir, step)
    record = check_files(folder)
    load_unet_weights(folder, unet)
    return load_file(folder / "state.safetensors"), Position(**record["position"])


def load_unet_weights(folder: Path, unet: nn.Module) -> None:
    """Load a checkpoint's UNet weights into a UNet of the same architecture."""
    weights: dict[str, Tensor] = {}
    for path in sorted((folder / "unet").glob("*.safetensors")):
        weights.update(load_file(path))
    unet.load_state_dict(weights, strict=True)


def prune(run_dir: Path, keep: int, best_step: int) -> None:
    """Delete all checkpoints but the last `keep` and the best, and what is left of unfinished ones."""
    steps = list_checkpoints(run_dir)
    for step in set(steps[:-keep]) - {best_step}:
        # state.json first: a kill in between leaves no folder that seems complete
        (folder_of(run_dir, step) / "state.json").unlink()
    _remove_unfinished(run_dir)
