"""Bounds the memory that all threads of this process together take to decode pictures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safelight.units import GIB

# decoding more at once gains nothing on any machine that has the cores for it
MAX_BUDGET_BYTES = 2 * GIB
# where less than twice that is left, pictures that take more are decoded one at a time
MIN_BUDGET_BYTES = GIB // 4
MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# how often a thread that waits for memory looks whether it shall stop
_POLL_S = 0.1


def available_bytes() -> int | None:
    """Return the memory that this process can allocate without swapping or being killed; None if nothing says so.

    That is what the system has available, or what the limits of the process's control groups leave.
    """
    amounts = [amount for amount in (_meminfo("MemAvailable:"), *_cgroup_bytes()) if amount is not None]
    return max(0, min(amounts)) if amounts else None


def swap_bytes() -> int:
    """Return the free swap space; 0 if there is none or the system does not report it."""
    return _meminfo("SwapFree:") or 0


def _meminfo(name: str) -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _cgroup_bytes() -> Iterator[int]:
    """Yield what each limited control group of this process leaves, of version 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # a container may see its own group as the root
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            amount = _left_in(group, *names)
            if amount is not None:
                yield amount
            if group == root:
                break


def _left_in(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = int((group / limit_name).read_text())
        usage = int((group / usage_name).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        # no such group, or the limit is "max"
        return None
    # cached files count as used, but give way
    cached = next((int(line.split()[1]) for line in lines if line.startswith(cache_name + " ")), 0)
    return limit - usage + cached


class Cancelled(Exception):
    """Raised in a thread whose result is no longer wanted."""


def end_if_set(stop: threading.Event | None) -> None:
    """Raise Cancelled if the event is set."""
    if stop is not None and stop.is_set():
        raise Cancelled


class MemoryBudget:
    """Bytes that threads reserve before they allocate them, and wait for if others hold them."""

    def __init__(self, num_bytes: int):
        self.num_bytes = self._num_free = num_bytes
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, num_bytes: int, stop: threading.Event | None = None) -> Iterator[None]:
        """Hold num_bytes within the block. A demand above the whole budget waits until nobody else holds any.

        stop: once it is set, nothing is given any more; raises Cancelled.
        """
        share = min(num_bytes, self.num_bytes)
        with self._changed:
            while True:
                end_if_set(stop)
                if self._num_free >= share:
                    break
                self._changed.wait(_POLL_S)
            self._num_free -= share
        try:
            yield
        finally:
            with self._changed:
                self._num_free += share
                self._changed.notify_all()


_making = threading.Lock()
_budget: MemoryBudget | None = None


def decode_budget() -> MemoryBudget:
    """Return the budget of this process: half of the memory available at the first call, within the limits above."""
    global _budget
    with _making:
        if _budget is None:
            available = available_bytes()
            half = MAX_BUDGET_BYTES if available is None else available // 2
            _budget = MemoryBudget(max(MIN_BUDGET_BYTES, min(MAX_BUDGET_BYTES, half)))
        return _budget
