"""Work between steps that all processes of a run do together, and stop together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safelight.trainer.distributed.world import World


class Stopped(Exception):
    """Raised inside validation or sampling when a stop is requested; a resumed run starts it again."""


@contextmanager
def together(world: World) -> Iterator[None]:
    """Run the block in all processes, and raise Stopped in all of them if it was raised in one.

    What the block does must not need an answer from another process.
    """
    stopped = False
    try:
        yield
    except Stopped:
        stopped = True
    if world.any(stopped):
        raise Stopped
