"""What all processes of a run do together between steps: it ends in all of them, or fails in all of them.

Caching and drawing take far longer than distributed.timeout_s, and some processes end before others. So while they
work, a thread of each tells the others twice a second that it lives, how far it has come, and whether it has failed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from safelight.errors import UserError
from safelight.trainer.distributed.fault import PeerFailed
from safelight.trainer.distributed.world import World

PULSE_S = 0.5
# of an error's text that the other processes are told
MAX_TEXT = 4000


class Stopped(Exception):
    """Raised inside validation or sampling when a stop is requested; a resumed run starts it again."""


class Others:
    """What a process knows of the others while they work together. The same calls do nothing in a single process."""

    def __init__(self, world: World):
        self._world = world
        self._own = self._own_then = self._whole_then = 0
        self._has_failed, self._finished = False, threading.Event()
        self._is_over, self._lost = False, None
        # a daemon: a second Ctrl-C waits for nobody
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def whole(self, done: int) -> int:
        """Return how much all processes have done, as far as this one knows. done: by this one."""
        self._own = done
        return self._whole_then - self._own_then + done

    def check(self) -> None:
        """Raise Stopped if another process has failed, been stopped, or cannot be reached."""
        if self._is_over:
            raise Stopped

    def begin(self) -> None:
        """Begin to tell the others about this process."""
        self._thread.start()

    def wait(self, failure: Exception | None) -> bool:
        """Wait until all have finished; return whether one has failed. Raises torch's error if one is gone."""
        self._has_failed = failure is not None
        self._finished.set()
        self._thread.join()
        if self._lost is not None:
            # with Stopped, `check` has ended the work
            raise self._lost if failure is None or isinstance(failure, Stopped) else failure
        return self._is_over

    def _beat(self) -> None:
        try:
            is_working = True
            while is_working:
                is_done, own = self._finished.wait(PULSE_S), self._own
                state = torch.tensor([int(not is_done), int(is_done and self._has_failed), own])
                dist.all_reduce(state, group=self._world.pulse)
                num_working, num_failed, whole = state.tolist()
                self._own_then, self._whole_then = own, whole
                self._is_over = num_failed > 0
                is_working = num_working > 0
        except RuntimeError as error:
            self._lost, self._is_over = error, True


@contextmanager
def together(world: World, *kinds: type[UserError]) -> Iterator[Others]:
    """Run the block in all processes, and wait until it is through in all of them, however long that takes.

    If it fails in one it fails in all: with Stopped, an out-of-memory error, a UserError or an OSError as in that one,
    a bug elsewhere as PeerFailed. kinds: subclasses of UserError that are raised as themselves, not as UserError.
    What the block does must not need an answer from another process.
    """
    others, failure = Others(world), None
    if world.size == 1:
        yield others
        return
    others.begin()
    try:
        yield others
    except Exception as error:
        failure = error
    if not others.wait(failure):
        return
    found = [_Failure(rank, *values) for rank, values in enumerate(world.gather(_told(failure))) if values]
    worst = min(found, key=lambda one: one.order)
    if worst.rank == world.rank:
        raise failure
    raise worst.again(kinds) from failure


def _told(failure: Exception | None) -> list:
    """Return what the others are told of a failure: its text, what OSErrors have, and its classes up to Exception."""
    if failure is None:
        return []
    names = [kind.__name__ for kind in type(failure).__mro__]
    parts = [failure.errno, failure.strerror, failure.filename] if isinstance(failure, OSError) else []
    return [str(failure)[:MAX_TEXT], [part if isinstance(part, int) else str(part) for part in parts], names]


class _Failure:
    """A failure of a process, as it tells the others."""

    def __init__(self, rank: int, text: str, parts: Sequence, names: Sequence[str]):
        self.rank, self._text, self._parts, self._names = rank, text, parts, names

    @property
    def order(self) -> tuple[int, int]:
        """Smaller for what all processes raise if there are several: bugs first, requests to stop last."""
        known = (OUT_OF_MEMORY, OSError.__name__, UserError.__name__, Stopped.__name__)
        places = [place for place, name in enumerate(known, 1) if name in self._names]
        return places[0] if places else 0, self.rank

    def again(self, kinds: Sequence[type[UserError]]) -> Exception:
        """Return the failure as another process raises it."""
        if Stopped.__name__ in self._names:
            return Stopped()
        if OUT_OF_MEMORY in self._names:
            return torch.OutOfMemoryError(self._text)
        if OSError.__name__ in self._names:
            return OSError(*self._parts)
        for kind in kinds:
            if kind.__name__ in self._names:
                return kind(self._text)
        if UserError.__name__ in self._names:
            return UserError(*self._text.splitlines())
        return PeerFailed(f"rank {self.rank} has failed: {self._names[0]}: {self._text[:200]}")


OUT_OF_MEMORY = torch.OutOfMemoryError.__name__
