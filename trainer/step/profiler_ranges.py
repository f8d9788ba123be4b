"""Named stretches of a training step: load, noise, forward, loss, backward, optimizer. For whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_NOTHING = nullcontext()
_listeners: list[Callable[[str], AbstractContextManager]] = []


def named(name: str) -> AbstractContextManager:
    """Return what to enter for a stretch; nothing at all while nobody listens."""
    return _listeners[-1](name) if _listeners else _NOTHING


@contextmanager
def told_to(listener: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Enter `listener(name)` around every stretch within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
