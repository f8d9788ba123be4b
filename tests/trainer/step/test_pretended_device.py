"""Runs our GPU path where no GPU is, in processes whose torch has a CUDA device that is none (pretended_device.py)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.step.pretended_device import build

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA operators of its own"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    """A function that runs pytest in a process with such a device and returns (exit status, output)."""
    library = build(tmp_path_factory.mktemp("library"))

    def run(*arguments: str) -> tuple[int, str]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.trainer.step.pretended_device",
            "-p",
            "no:cacheprovider",
        ]
        environment = {**os.environ, "PRETENDED_DEVICE": str(library), "PYTEST_ADDOPTS": ""}
        found = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return found.returncode, found.stdout + found.stderr

    return run


def test_our_gpu_path(on_device):
    status, output = on_device("tests/trainer/step/pretended_cases.py")
    assert status == 0, output
    assert "skipped" not in output, output


def test_the_tests_for_a_gpu(on_device):
    """GPU tests without speed or kernels. Not Philox's: torch's square root differs on a CPU."""
    status, output = on_device("-m", "gpu", "tests/data/test_side_stream.py", "tests/trainer/step/test_step.py")
    assert status == 0, output
    assert "skipped" not in output, output
