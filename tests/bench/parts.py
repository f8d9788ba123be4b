"""Parts of `bench all` that end, block or spoil the process that they run in."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from safelight.bench.all.run_all import Session, told


def line(session: Session, name: str) -> dict:
    return session.record(name, {}, {"pid": os.getpid()})


def good(session: Session) -> Iterator[dict]:
    yield line(session, "good")


def crash(session: Session) -> Iterator[dict]:
    yield line(session, "crash")
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(session: Session) -> Iterator[dict]:
    yield line(session, "hang")
    time.sleep(600)


def spoil(session: Session) -> Iterator[dict]:
    """As after an illegal address: whatever touches the device from here on fails, the clean-up too."""

    def fails(*_) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    torch.zeros = fails
    fails()
    yield {}


def needs_the_device(session: Session) -> Iterator[dict]:
    torch.zeros(1)
    yield line(session, "needs_the_device")


def as_on_a_gpu(parts, out: Path, work, end: float) -> Iterator:
    """Tell as a GPU's process would: a part that fails is the last one."""
    Session.is_gpu = True
    yield from told(parts, out, work, end)
