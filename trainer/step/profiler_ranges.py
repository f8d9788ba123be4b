"""Named ranges of a training step (load, noise, forward, loss, backward, optimizer) for profilers and counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_NO_RANGE = nullcontext()
_listeners: list[Callable[[str], AbstractContextManager]] = []


def profiler_range(name: str) -> AbstractContextManager:
    """Return a context manager that marks a range; it does nothing unless something listens."""
    return _listeners[-1](name) if _listeners else _NO_RANGE


@contextmanager
def listen_to_ranges(listener: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Inside the block, enter `listener(name)` around every range."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
