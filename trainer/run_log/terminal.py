"""Shows progress on stderr: one live line in a terminal, separate lines elsewhere."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time

from safelight.text import printable


class _Stderr:
    """sys.stderr for rich, without its errors: a terminal that was closed must not end a run before it has saved."""

    @property
    def _file(self):
        # rich replaces sys.stderr while a bar is drawn, by an object that prints through rich
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    @property
    def encoding(self) -> str:
        return getattr(self._file, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._file is not None and self._file.isatty()

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()


class Terminal:
    """Progress on stderr: one live line in a terminal, a line at most every ten seconds elsewhere.

    Elsewhere means a file, a pipe, a dumb terminal, or a notebook cell. A notebook gives shell commands a stderr that
    claims to be a terminal, but sends every redraw to the browser and keeps it in the cell.
    """

    SECONDS_BETWEEN_LINES = 10.0
    REDRAWS_PER_SECOND = 4
    MAX_BAR_CELLS = 20
    MIN_BAR_CELLS = 6
    # set by Colab, Kaggle and Jupyter kernels for the commands that a cell starts
    NOTEBOOK_VARIABLES = ("COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID")

    def __init__(self):
        from rich.console import Console

        is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        in_notebook = any(os.environ.get(name) for name in self.NOTEBOOK_VARIABLES)
        self.is_live = sys.stderr.isatty() and not is_dumb and not in_notebook
        # forced: rich treats a file as a terminal if FORCE_COLOR is set, and writes HTML inside a Jupyter kernel
        self.console = Console(
            file=_Stderr(), highlight=False, emoji=False, force_terminal=self.is_live, force_jupyter=False
        )
        self._live = None
        self._phase: Phase | None = None
        self._printed_at = 0.0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception) -> None:
        # so that an error is printed below the bar, not into it
        self.pause()

    def say(self, text: str) -> None:
        """Print a line, with non-printable characters escaped and markup not interpreted."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done. note: values separated by two spaces, the most important first."""
        what, note = printable(what), printable(note)
        is_new = self._phase is None or self._phase.what != what
        if is_new:
            self.pause()
            self._phase = Phase(what, done)
        is_end = self._phase.done < total <= done
        self._phase.reach(done, total, printable(note))
        if self.is_live:
            self._draw()
        elif is_new or is_end or time.monotonic() - self._printed_at >= self.SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            self.say("  ".join(self._phase.parts()))

    def pause(self) -> None:
        """Finish the bar as it stands; the next update starts a new one."""
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self.pause)
            self._live = None
        self._phase = None

    def _draw(self) -> None:
        if self._live is not None:
            return
        from rich.live import Live

        # other output goes above the bar if stdout is a terminal, and is left alone if it is a pipe or a file
        self._live = Live(
            get_renderable=self._line,
            console=self.console,
            refresh_per_second=self.REDRAWS_PER_SECOND,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start(refresh=True)
        # restores the cursor if the command fails while the bar is drawn
        atexit.register(self.pause)

    def _line(self):
        """Return the bar and as much of the text as fits on one line; a redraw cannot erase a second one."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        phase = self._phase
        # the last column stays empty, because some terminals wrap as soon as it is written
        space = self.console.width - 1
        first, *more = phase.parts()
        while more and len("  ".join([first, *more])) > space:
            more.pop()
        text = "  ".join([first, *more])[:space]
        label, cells = f"{phase.what} ", min(self.MAX_BAR_CELLS, space - len(text) - 1)
        line = Table.grid()
        if cells < self.MIN_BAR_CELLS:
            line.add_row(Text(text, no_wrap=True))
        else:
            bar = ProgressBar(max(1, phase.total), min(phase.done, phase.total), width=cells)
            line.add_row(Text(label), bar, Text(f" {text.removeprefix(label)}", no_wrap=True))
        return line


class Phase:
    """A count that runs up to a total, with an estimate of the time left."""

    def __init__(self, what: str, done: int):
        self.what, self.done, self.total, self.note = what, done, 0, ""
        # the rate is measured from the first report: a resumed run starts in the middle, after loading and compiling
        self._began, self._done_at_start = time.monotonic(), done
        self._ends_at: float | None = None

    def reach(self, done: int, total: int, note: str) -> None:
        """Update the count and the estimate. The rate includes everything between two updates, also validation."""
        self.done, self.total, self.note = done, total, note
        now, advanced = time.monotonic(), done - self._done_at_start
        self._ends_at = now + (now - self._began) * (total - done) / advanced if advanced > 0 else None

    def parts(self) -> list[str]:
        """Return the count, the time left if known, and the note's values."""
        left = []
        if self._ends_at is not None and self.done < self.total:
            left = [f"{format_clock(self._ends_at - time.monotonic())} left"]
        return [f"{self.what} {self.done}/{self.total}", *left, *filter(None, self.note.split("  "))]


def format_clock(seconds: float) -> str:
    """Return a time span as 0:07, 12:04, 1:02:03 or, from two days on, 3 d 4 h."""
    total = max(0, round(seconds))
    minutes, hours = total // 60, total // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes % 60:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"
