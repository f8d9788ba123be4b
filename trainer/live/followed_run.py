"""The report of a run that may be training: what changes with it, and what it shows now."""

from __future__ import annotations

from pathlib import Path

from safelight.data.lock import is_held
from safelight.errors import UserError
from safelight.trainer.live.live_page import Reading
from safelight.trainer.live.run_state import Mark, changed_at, mark_of, state_of, summary_of
from safelight.trainer.report.build import content_of
from safelight.trainer.report.pictures import Known, Work
from safelight.trainer.report.run_reader import read_run_folder


class FollowedRun:
    """A run folder that is read again and again. Pictures that have not changed since the last time are kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._pictures: Known = {}

    def mark(self) -> tuple[Mark, bool | None]:
        return mark_of(self.folder), is_held(self.folder)

    def read(self) -> Reading:
        """Return the report. Raises UserError if it is no run any more."""
        if not (self.folder / "config.toml").is_file():
            raise UserError(f"{self.folder} is no longer there")
        mark, is_training = self.mark()
        work = Work(before=self._pictures)
        run = read_run_folder(self.folder, work, is_training)
        content, summary, changed = content_of(run), summary_of(run), changed_at(mark)
        self._pictures = work.known
        return Reading(content, changed, lambda: state_of(self.folder, summary, changed))
