"""Work for processes of their own; no torch, which takes a process seconds to import."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from safelight.errors import UserError

TELLS_ITS_PID = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"


def endless(file: Path) -> Iterator[int]:
    """Begin a process that writes its number, and say nothing more."""
    import subprocess

    yield os.getpid()
    process = subprocess.Popen([sys.executable, "-c", TELLS_ITS_PID, str(file)])
    try:
        process.wait()
    finally:
        process.kill()
        process.wait()


def refused() -> Iterator[int]:
    yield 1
    raise UserError("size 3 is no power of two; use 4")
