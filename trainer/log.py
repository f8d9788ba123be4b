"""metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from safelight.data.atomic import atomic_write_bytes, naming

GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak so far: reserved by torch on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    import resource

    # ru_maxrss is in KiB on Linux and bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak on a GPU, so that encoding is not taken for training; a process's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Metrics:
    """An append-only metrics.jsonl, cut back to the step a run resumes from, and its TensorBoard twin.

    num_unreadable: damaged lines of an earlier start that are left out.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool):
        self.path = run_dir / "metrics.jsonl"
        self.num_unreadable = 0
        kept = []
        if self.path.exists():
            lines = self.path.read_bytes().split(b"\n")
            for number, line in enumerate(lines):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    # the last line may be one that a kill cut short; any other is damage, and worth a word
                    self.num_unreadable += bool(line) and number < len(lines) - 1
            atomic_write_bytes(self.path, b"".join(kept))
        self.file = self.path.open("a")
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)

    def write(self, kind: str, step: int, **values) -> None:
        row = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        with naming(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.board is not None:
            suffix = f"/{values['split']}" if "split" in values else ""
            for name, value in values.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{kind}/{name}{suffix}", value, step)

    def sync(self) -> None:
        """Make what is written survive a power cut; before a checkpoint that counts on it."""
        with naming(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        with naming(self.path):
            self.file.close()
        if self.board is not None:
            self.board.close()


class Terminal:
    """Progress on stderr: one live line in a terminal, a line at most every ten seconds elsewhere."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self):
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self._progress = None
        self._tasks: dict[str, int] = {}
        self._printed_at: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line of ours, text as it is."""
        self.console.print(text, markup=False, soft_wrap=True)

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done."""
        if not self.console.is_terminal:
            now = time.monotonic()
            if done < total and now - self._printed_at.get(what, 0.0) < self.SECONDS_BETWEEN_LINES:
                return
            self._printed_at[what] = now
            self.say(f"{what} {done}/{total}" + (f"  {note}" if note else ""))
            return
        if self._progress is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=self.console,
            )  # fmt: skip
            self._progress.start()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._tasks[what], completed=done, total=total, note=note)

    def pause(self) -> None:
        """Leave the bars as they stand; the next update begins new ones."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()
