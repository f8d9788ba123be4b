"""The runs below a folder, and the page that lists them."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import safelight
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.live.live_page import Reading
from safelight.trainer.live.run_state import Mark, State, Summary, changed_at, mark_of, state_of, summary_of
from safelight.trainer.report.build import Content
from safelight.trainer.report.facts import format_epoch
from safelight.trainer.report.markup import empty_state, shorten, table, tag
from safelight.trainer.report.run_reader import read_run_folder
from safelight.untrusted import is_inside

MAX_DEPTH = 4
MAX_FOLDERS = 20_000
MAX_RUNS = 300
# what training writes beside config.toml; any of them makes a folder a run's
OWN_NAMES = ("metrics.jsonl", "environment.json", "model.json", "checkpoints")
KINDS = {
    "running": "training",
    "finished": "finished",
    "stopped": "stopped",
    "diverged": "diverged",
    "killed": "ended early",
    "unknown": "not training",
}


@dataclass(frozen=True)
class ListedRun:
    """A run below the folder. key: its name in addresses, which depends on its place alone."""

    folder: Path
    name: str

    @property
    def key(self) -> str:
        return hashlib.sha256(os.fsencode(self.name)).hexdigest()[:12]


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: it holds the settings, and something that training wrote."""
    return (folder / "config.toml").is_file() and any(os.path.lexists(folder / name) for name in OWN_NAMES)


def find_runs(root: Path) -> list[ListedRun]:
    """Return the runs at most MAX_DEPTH folders below a folder, by name. No link is followed, no run looked into."""
    runs, num_seen = [], 0
    pending = [(root, "", 0)]
    while pending and num_seen < MAX_FOLDERS and len(runs) < MAX_RUNS:
        folder, name, depth = pending.pop(0)
        num_seen += 1
        if depth and is_run(folder):
            runs.append(ListedRun(folder, name))
            continue
        if depth == MAX_DEPTH:
            continue
        try:
            with os.scandir(folder) as entries:
                below = sorted(
                    entry.name
                    for entry in entries
                    if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
                )
        except OSError:
            continue
        pending += [(folder / one, f"{name}/{one}" if name else one, depth + 1) for one in below]
    return sorted(runs, key=lambda run: run.name)


class RunList:
    """What the page that lists runs shows. A run is read again only when its files have changed."""

    def __init__(self, root: Path):
        self.root = root
        self._summaries: dict[str, tuple[Mark, Summary]] = {}

    def mark(self) -> tuple:
        """Return what changes with any of the runs: their files, and whether they are training."""
        marked = []
        for run in find_runs(self.root):
            mark, known = mark_of(run.folder), self._summaries.get(run.name)
            state = state_of(run.folder, known[1], changed_at(mark)).kind if known else ""
            marked.append((run.name, mark, state))
        return tuple(marked)

    def read(self) -> Reading:
        """Return the list. Raises UserError if the folder is gone."""
        if not self.root.is_dir():
            raise UserError(f"{self.root} is no longer there")
        listed, num_training = [], 0
        for run in find_runs(self.root):
            # what was found may have been replaced by a link
            if not is_inside(run.folder, self.root):
                continue
            mark = mark_of(run.folder)
            known = self._summaries.get(run.name)
            try:
                summary = known[1] if known and known[0] == mark else summary_of(read_run_folder(run.folder))
            except (UserError, OSError):
                # deleted since it was found
                continue
            self._summaries[run.name] = (mark, summary)
            changed = changed_at(mark) or 0.0
            state = state_of(run.folder, summary, changed)
            num_training += state.kind == "running"
            listed.append((state.kind != "running", -changed, run, summary, state, changed))
        listed.sort(key=lambda one: one[:2])
        rows = [_row(run, summary, state, changed) for _, _, run, summary, state, changed in listed]
        newest = max((changed for *_, changed in listed), default=None)
        says = f"{counted(len(listed), 'run')}, {num_training} training" if listed else "No run yet"
        state = State("running" if num_training else "unknown", says)
        return Reading(_content(self.root, rows), newest, lambda: state)


def _content(root: Path, rows: list) -> Content:
    header = tag(
        "header",
        tag("div", "Safelight · runs", class_="mark"),
        tag("h1", shorten(root.resolve().name or "/", 200), dir="auto"),
        tag("p", tag("code", shorten(root, 300)), class_="sub"),
    )
    if rows:
        head = ["run", "state", "epoch", "step", "lowest held-out loss", "base", "changed"]
        body = table(head, rows, class_="listed")
    else:
        body = empty_state("No run lies in this folder yet, or up to four folders below it.")
    beside = tag("p", "Several side by side: ", tag("code", "safelight report RUN1 RUN2"), class_="note")
    section = tag("section", tag("h2", "Runs"), body, beside if len(rows) > 1 else None, id="runs")
    footer = tag("footer", f"Safelight {safelight.__version__}. Read-only; served to this computer alone.")
    return Content(f"Runs in {shorten(root.resolve().name or '/', 200)}", header, {"runs": section}, footer)


def _row(run: ListedRun, summary: Summary, state: State, changed: float) -> list:
    of = f" of {format_epoch(summary.num_epochs)}" if summary.num_epochs else ""
    best = f"{summary.best[0]:.4f} (epoch {format_epoch(summary.best[1])})" if summary.best else "–"
    place = tag("span", shorten(run.name, 200), class_="meta", dir="auto") if summary.title != run.name else None
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
    return [
        [tag("a", shorten(summary.title, 120), href=f"runs/{run.key}/", dir="auto"), place],
        tag("span", KINDS[state.kind], class_=f"kind {state.kind}"),
        f"{format_epoch(summary.last_epoch)}{of}",
        f"{summary.last_step:,}",
        best,
        tag("bdi", shorten(summary.base, 60)),
        tag("time", when, data_at=f"{changed:.0f}"),
    ]
