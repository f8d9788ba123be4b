"""Generators to run in a subprocess; without torch, which takes seconds to import."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from safelight.errors import UserError

WRITES_ITS_PID = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"


def endless(file: Path) -> Iterator[int]:
    """Yield this process's id, then wait for a child that writes its own id to the file and sleeps."""
    import subprocess

    yield os.getpid()
    process = subprocess.Popen([sys.executable, "-c", WRITES_ITS_PID, str(file)])
    try:
        process.wait()
    finally:
        process.kill()
        process.wait()


def refused() -> Iterator[int]:
    yield 1
    raise UserError("size 3 is not a power of two; use 4")
