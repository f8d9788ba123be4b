"""Writes metrics to metrics.jsonl and the boards, and measures peak memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from safelight.data.atomic import atomic_writer, naming
from safelight.trainer.run_log.boards import Board
from safelight.trainer.run_log.names import sample_tag, scalars_of
from safelight.units import GIB
from safelight.untrusted import open_append, parse_json, path_in, read_lines

# a million training lines have 200 MB
MAX_BYTES = 2**28
# a validation has at most 64 losses by timestep; the rest is room for the commas in an event's text
MAX_LINE_VALUES = 2**11


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: reserved by torch on a GPU, the process's resident set on a CPU; NaN where the
    system does not tell it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    try:
        import resource
    except ImportError:
        # Windows
        return math.nan
    # ru_maxrss is in KiB on Linux and bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak on a GPU, so that training's does not include encoding. On a CPU it cannot be reset."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def held_out_losses(run_dir: Path) -> dict[int, float]:
    """Return the held-out loss at each step of a run's recorded validations; lines that cannot be read are left out."""
    losses = {}
    path = path_in(run_dir, "metrics.jsonl")
    for line in read_lines(path, MAX_BYTES) if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = parse_json(line or b"", allow_nan=True, max_values=MAX_LINE_VALUES)
            is_held_out = row["kind"] == "validation" and row.get("split") == "held_out"
            if is_held_out and type(row["step"]) is int and math.isfinite(row["loss"]):
                losses[row["step"]] = float(row["loss"])
    return losses


class Metrics:
    """An append-only metrics.jsonl, truncated to the step a run resumes from, and boards that show the same.

    boards: written to after the file; they are closed with it. is_writer: False in all processes of a run but one,
    which only know what the lines say.
    num_unreadable: damaged lines that were dropped on opening. held_out: step -> held-out loss of the validations so
    far, those before a resume included. by_band: the same of each split by range of timesteps. epochs: step -> epochs
    trained at a validation. logged_step: of the newest line about training, -1 if there is none.
    """

    def __init__(self, run_dir: Path, step: int, boards: Sequence[Board] = (), is_writer: bool = True):
        self.path = run_dir / "metrics.jsonl"
        self.num_unreadable = 0
        self.held_out: dict[int, float] = {}
        self.by_band: dict[str, dict[int, tuple[float, ...]]] = {"held_out": {}, "train_subset": {}}
        self.epochs: dict[int, float] = {}
        self.logged_step = -1
        self._is_writer = is_writer
        if not is_writer and self.path.exists():
            for line in read_lines(self.path, MAX_BYTES):
                self._belongs_up_to(step, line)
        elif self.path.exists():
            # line by line into the new file: the lines in memory would take several times the log's size
            with atomic_writer(self.path) as kept:
                for line in read_lines(self.path, MAX_BYTES):
                    if self._belongs_up_to(step, line):
                        kept.write(line.removesuffix(b"\n") + b"\n")
        self.file = open_append(self.path) if is_writer else None
        # times that never jump: the wall clock may be set while the run goes on
        self._clock_offset = time.time() - time.monotonic()
        self._boards = tuple(boards)

    def _belongs_up_to(self, step: int, line: bytes | None) -> bool:
        """Return whether a line is sound and of this step or an earlier one; note what it says."""
        try:
            row = parse_json(line or b"", allow_nan=True, max_values=MAX_LINE_VALUES)
            if type(row["step"]) is not int:
                raise ValueError("a step is a whole number")
            if row["step"] <= step:
                self._note(row)
            return row["step"] <= step
        except (ValueError, KeyError, TypeError):
            # a kill may have cut the last line short; any other unreadable line is damage to be reported
            self.num_unreadable += line is None or (line != b"\n" and line.endswith(b"\n"))
            return False

    def has_validation(self, step: int) -> bool:
        """Return whether the log already holds the validation of a step, from before a resume."""
        return step in self.held_out

    def _note(self, row: dict) -> None:
        if row["kind"] == "train":
            self.logged_step = row["step"]
        if row["kind"] != "validation" or row.get("split") not in self.by_band:
            return
        if row["split"] == "held_out":
            self.held_out[row["step"]] = float(row["loss"])
        bands = row.get("loss_by_timestep")
        if isinstance(bands, list):
            self.by_band[row["split"]][row["step"]] = tuple(map(float, bands))
            self.epochs[row["step"]] = float(row.get("epoch", 0.0))

    def write(self, kind: str, step: int, **values) -> None:
        """Append a line. The boards get its numbers, under the names of names.py."""
        row = {"kind": kind, "step": step, **values, "time": round(time.monotonic() + self._clock_offset, 3)}
        if self._is_writer:
            with naming(self.path):
                self.file.write(json.dumps(row).encode() + b"\n")
                self.file.flush()
        self._note(row)
        for board in self._boards:
            board.write(step, scalars_of({"kind": kind, **values}))

    def write_images(self, step: int, pictures: Sequence[tuple[int, str, str, Image.Image]]) -> None:
        """Show sampled pictures on the boards: (number of the prompt, stem, prompt, image), as of SampledPicture."""
        named = [(sample_tag(number, stem, prompt), prompt, image) for number, stem, prompt, image in pictures]
        for board in self._boards:
            board.write_images(step, named)

    def sync(self) -> None:
        """Sync the file to disk, before a checkpoint that depends on it."""
        # safe in another thread while a line is being written: `write` flushes every line itself
        if self._is_writer:
            with naming(self.path):
                os.fsync(self.file.fileno())
        for board in self._boards:
            board.flush()

    def close(self) -> None:
        if self._is_writer:
            with naming(self.path):
                self.file.close()
        for board in self._boards:
            board.close()
