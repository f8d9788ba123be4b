"""Where the lines of a process go that is not the run's main one: to RUN/logs/rank-N.log, whatever prints them.

Until the run folder is known to be the run's, they wait in a file without a name.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from safelight.text import printable_lines
from safelight.trainer.distributed import started
from safelight.untrusted import open_append

FOLDER = "logs"
# a copy of the error stream that this process was started with
_terminal: int | None = None


def log_name() -> str:
    return f"rank-{started.rank()}.log"


def hold_back() -> None:
    """From here on, let nothing that this process prints reach the terminal."""
    global _terminal
    if _terminal is not None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _terminal = os.dup(2)
    with tempfile.TemporaryFile() as file:
        _redirect(file.fileno())


def write_to(folder: Path) -> None:
    """Write what this process has printed and will print to FOLDER/rank-N.log. Call `hold_back` first."""
    sys.stdout.flush()
    sys.stderr.flush()
    size = os.fstat(2).st_size
    printed = os.pread(2, size, 0)
    with open_append(folder / log_name()) as file:
        where = f"rank {started.rank()} of {started.world_size()} on {started.host()}, process {os.getpid()}"
        file.write(f"# {datetime.now():%Y-%m-%d %H:%M:%S}, {where}\n".encode() + printed)
        file.flush()
        _redirect(file.fileno())


def _redirect(file: int) -> None:
    os.dup2(file, 1)
    os.dup2(file, 2)
    for stream in (sys.stdout, sys.stderr):
        # a file's would be flushed when the process ends
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)


def say_on_terminal(text: str) -> None:
    """Print lines on the terminal that this process was started from."""
    with suppress(OSError):
        os.write(2 if _terminal is None else _terminal, f"{printable_lines(text)}\n".encode(errors="backslashreplace"))
