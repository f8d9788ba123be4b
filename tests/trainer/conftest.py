"""Fixtures: runs in forked processes, a small UNet, the tiny base, a finished run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from safelight.trainer.models.base import Base, resolve_base, tiny_folder
from tests.trainer.checkpoints import make_unet


@pytest.fixture(scope="session")
def run():
    """A function that runs a child of fork_runs.py and returns its exit code, or minus the signal that ended it.

    One server for all test files of a process: its imports take seconds.
    """
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


@pytest.fixture(scope="module")
def small_unet() -> UNet2DConditionModel:
    """A UNet of two widths with every kind of block. Copy it before changing it."""
    return make_unet()


@pytest.fixture(scope="session")
def tiny() -> Base:
    return resolve_base("tiny")


@pytest.fixture
def base_folder(tmp_path) -> Path:
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(tiny_folder(), tmp_path / "base"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a run of the tiny base with one checkpoint. Read only."""
    from tests.trainer.inference.exported_runs import make_run

    return make_run(tmp_path_factory.mktemp("tiny") / "run")
