"""What is going on with a run, and when its files changed: cheap enough to ask every few seconds."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from safelight.data.lock import is_held
from safelight.trainer.report.course import ending, planned_end
from safelight.trainer.report.facts import Ending, best_validation, format_epoch
from safelight.trainer.report.run_reader import RunFolder
from safelight.untrusted import is_link_out

# folders of a run whose content the report shows
FOLDERS = ("samples", "compare", "grids", "evaluation", "checkpoints", "find_lr")
# of the files at its top
SUFFIXES = (".json", ".jsonl", ".toml")
MAX_ENTRIES = 20_000
# a run on another computer counts as going on while its log is younger
YOUNG_S = 15 * 60.0

# a later time is no time, and not every system can write it
LATEST = 2.0**32

# name, time of last change in ns, size
Mark = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Summary:
    """A run in a few figures. best: lowest held-out loss and its epoch, None if none was measured.

    ended: when its last line was logged, in unix seconds; 0 if unknown.
    """

    title: str
    base: str
    ending: Ending
    last_step: int
    last_epoch: float
    num_epochs: float | None
    best: tuple[float, float] | None
    ended: float


@dataclass(frozen=True)
class State:
    """kind: running, finished, stopped, diverged, killed (ended before its time) or unknown. says: in a sentence."""

    kind: str
    says: str


def mark_of(run_dir: Path) -> Mark:
    """Return what changes whenever something that the report shows does, () if the folder is gone."""
    marks = _marks(run_dir, "", lambda name: name.endswith(SUFFIXES))
    for folder in FOLDERS:
        path = run_dir / folder
        if not is_link_out(path, run_dir):
            marks += _marks(path, folder, lambda name: True)
    return tuple(sorted(marks))


def changed_at(mark: Mark) -> float | None:
    """Return the time of the last change in unix seconds, None if there is nothing."""
    return max((ns for _, ns, _ in mark), default=0) / 1e9 or None


def summary_of(run: RunFolder) -> Summary:
    metrics = run.metrics
    best = best_validation(metrics.validation["held_out"])
    return Summary(
        title=run.title,
        base=run.base,
        ending=ending(run),
        last_step=metrics.last_step,
        last_epoch=metrics.last_epoch,
        num_epochs=planned_end(run)[1],
        best=best and (best.loss, best.epoch),
        ended=max((at for at, _ in metrics.times if 0 < at < LATEST), default=0.0),
    )


def state_of(run_dir: Path, summary: Summary, changed: float | None) -> State:
    """Return what is going on with a run, by its lock and by how its log ends.

    changed: when its files last did.
    """
    end, held = summary.ending, is_held(run_dir)
    is_young = changed is not None and time.time() - changed < YOUNG_S
    if held or (held is None and is_young and end.kind in ("open", "unknown")):
        return State("running", _progress(summary))
    said = {
        "finished": "Finished",
        "stopped": f"Stopped at {end.place}",
        "diverged": f"Diverged at {end.place}",
        "open": f"Ended before its time, at {end.place}",
    }
    if not summary.last_step:
        return State("unknown", "Not training; no step was logged")
    kind = "killed" if end.kind == "open" else end.kind
    when = f", {time.strftime('%Y-%m-%d %H:%M', time.localtime(summary.ended))}" if summary.ended else ""
    return State(kind, f"{said.get(end.kind, 'Not training')}{when}")


def _progress(summary: Summary) -> str:
    if not summary.last_step:
        return "Training starts: no step logged yet"
    of = f" of {format_epoch(summary.num_epochs)}" if summary.num_epochs else ""
    if summary.ending.kind == "finished":
        return f"Trained {format_epoch(summary.last_epoch)}{of} epochs; the last pictures are being drawn"
    return f"Training goes on: epoch {format_epoch(summary.last_epoch)}{of}, step {summary.last_step:,}"


def _marks(folder: Path, prefix: str, is_shown) -> list[tuple[str, int, int]]:
    marks = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_shown(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    # deleted since it was listed
                    continue
                marks.append((f"{prefix}/{entry.name}", status.st_mtime_ns, status.st_size))
                if len(marks) == MAX_ENTRIES:
                    break
    except OSError:
        return []
    return marks
