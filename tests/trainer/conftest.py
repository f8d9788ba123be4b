"""Runs in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def run():
    """A function that runs a child of fork_runs.py and returns its exit code, or minus the signal that ended it."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_runs.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(settings: dict | None = None, **job) -> int:
        job |= {"settings": settings} if settings is not None else {}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait(30)
