"""Parts of `bench all` that crash, hang or break the process they run in."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from safelight.bench.all.parts import BenchContext
from safelight.bench.all.run_all import part_events


def line(context: BenchContext, name: str) -> dict:
    return context.make_record(name, {}, {"pid": os.getpid()})


def good(context: BenchContext) -> Iterator[dict]:
    yield line(context, "good")


def crash(context: BenchContext) -> Iterator[dict]:
    yield line(context, "crash")
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(context: BenchContext) -> Iterator[dict]:
    yield line(context, "hang")
    time.sleep(600)


def spoil(context: BenchContext) -> Iterator[dict]:
    """Fail as after an illegal memory access: every later use of the device fails too, including the clean-up."""

    def fails(*_) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    torch.zeros = fails
    fails()
    yield {}


def needs_the_device(context: BenchContext) -> Iterator[dict]:
    torch.zeros(1)
    yield line(context, "needs_the_device")


def as_on_a_gpu(parts, out: Path, work, end: float) -> Iterator:
    """Yield the events that a GPU's process would: a part that fails is the last one."""
    BenchContext.is_gpu = True
    yield from part_events(parts, out, work, end)
