"""Fixtures: runs in forked processes, a small UNet, the tiny base, a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from safelight.trainer.models.base import Base, resolve_base, tiny_folder
from tests.trainer.checkpoints import make_unet

# of one run: it is killed by the test, or ends by itself
RUN_TIMEOUT_S = 1800.0


@pytest.fixture(scope="session")
def run(processes):
    """A function that runs a job of killed_runs.py and returns its exit code, or minus the signal that ended it."""
    from tests.trainer import killed_runs

    def run(settings: dict | None = None, **job) -> int:
        job |= {"settings": settings} if settings is not None else {}
        return processes(killed_runs.run, num=1, timeout_s=RUN_TIMEOUT_S, **job)[0]

    return run


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
