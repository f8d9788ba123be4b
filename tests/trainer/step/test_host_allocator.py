"""Memory that a step frees stays with the process: the next one causes no page faults."""

import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from safelight.trainer.step.host_allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.full((12 * 2**20,), 1.0) for _ in range(2)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
by_default = faults()
assert keep_freed_memory()
faults()
print(by_default, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    command = [sys.executable, "-c", STEPS]
    by_default, kept = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    # ten times 96 MiB are 245,760 pages of 4 KiB
    assert by_default > 10_000
    assert kept < 100
