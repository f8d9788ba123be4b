"""Fill a cache with the rows that it lacks: several processes share the work, each in a pipeline of three stages.

Threads load batches ahead (decoding and resizing release the interpreter's lock), the caller's thread encodes one after
another, and a thread writes what is encoded. A few batches are in flight, so memory is bounded, and a kill loses no
more than these. The work is cut into parts of several batches. A process claims a part, looks which of its rows are
still missing, and gives the claim up once they are written; at the end it waits for the parts of others, and does
those whose process was killed.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from safelight.data.claims import Claims, Patience
from safelight.data.shards import Cache

T = TypeVar("T")
L = TypeVar("L")
Progress = Callable[[int, int], None]

# small, so that nobody waits long for the last part of another process
BATCHES_PER_PART = 8
# encoded batches that wait to be written
_NUM_TO_WRITE = 2
MAX_THREADS = 16
# the rows of others are counted for progress at most this often, and in at most this part of the time
COUNT_S, COUNT_SHARE = 1.0, 0.02


class _Writer:
    """Appends rows to a cache in a thread. An error there is raised by the next call, or on exit."""

    def __init__(self, cache: Cache, kind: str):
        self._cache, self._kind = cache, kind
        self._queue: queue.Queue = queue.Queue(_NUM_TO_WRITE)
        self._error: BaseException | None = None
        self.num_added = self.num_written = 0
        self._thread = threading.Thread(target=self._run, name="write-rows")

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            keys, rows, then = item
            try:
                if self._error is None:
                    self.num_added += self._cache.append(self._kind, keys, rows)
                    self.num_written += len(keys)
                    then()
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def put(self, keys: list[str], rows: np.ndarray, then: Callable[[], None]) -> None:
        """Write rows soon, then call `then`. Waits while others are still to be written."""
        self._raise()
        self._queue.put((keys, rows, then))

    def flush(self) -> None:
        """Wait until everything is written."""
        self._queue.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        # also after an error or Ctrl-C: what is encoded is kept
        self._queue.put(None)
        self._thread.join()
        if exception[0] is None:
            self._raise()


def num_threads() -> int:
    """Return how many threads load batches: one for each processor that this process may use."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)


def fill(
    cache: Cache,
    kind: str,
    groups: Sequence[Mapping[str, T]],
    batch_size: int,
    start_loading: Callable[[Executor, threading.Event, list[T]], Callable[[], L]],
    encode: Callable[[L, list[T]], np.ndarray],
    progress: Progress | None = None,
) -> int:
    """Store the rows that the cache lacks and return how many this process added; the cache has all of them then.

    groups: rows of one shape each, by key, with what the two functions need of them; no batch has rows of two groups.
    start_loading: loads a batch on the threads and returns a function that waits for it; the event is set once nobody
    wants it any more. encode: returns the rows of a loaded batch.
    progress(rows done, rows that were missing), by this process and others.
    """
    missing = set(cache.missing([key for group in groups for key in group]))
    # cut from all rows, not from the missing ones, which are not the same to a process that starts later
    parts = [part for group in groups for part in _cut(list(group), batch_size * BATCHES_PER_PART)]
    parts = [part for part in parts if not missing.isdisjoint(part)]
    if not parts:
        return 0
    jobs = {key: job for group in groups for key, job in group.items() if key in missing}
    threads, stop = num_threads(), threading.Event()
    executor = ThreadPoolExecutor(threads, thread_name_prefix="load-rows")
    num_ahead = 2 + threads // batch_size
    ahead: deque[tuple[list[str], Callable[[], L], Callable[[], None]]] = deque()
    count = _Count(cache, list(jobs))

    def encode_next() -> None:
        keys, wait, then = ahead.popleft()
        writer.put(keys, encode(wait(), [jobs[key] for key in keys]), then)
        if progress is not None:
            progress(count.of_all(writer.num_written), len(jobs))

    try:
        with Claims(cache.path) as claims, _Writer(cache, kind) as writer:
            patience = Patience()
            while parts:
                claimed_by_others = []
                for part in parts:
                    if not claims.take(part[0]) and not patience.is_over:
                        claimed_by_others.append(part)
                        count.is_shared = True
                        continue
                    wanted = [key for key in part if key in missing]
                    todo = cache.missing(wanted)
                    count.is_shared |= len(todo) < len(wanted)
                    missing.difference_update(wanted)
                    then = partial(claims.give_up, part[0])
                    if not todo:
                        then()
                    for keys in _cut(todo, batch_size):
                        loading = start_loading(executor, stop, [jobs[key] for key in keys])
                        ahead.append((keys, loading, then if keys[-1] == todo[-1] else _nothing))
                        if len(ahead) > num_ahead:
                            encode_next()
                while ahead:
                    encode_next()
                # nobody waits for others with a claim of its own
                writer.flush()
                parts = claimed_by_others
                num_left = len(cache.missing(list(missing)))
                if progress is not None:
                    progress(len(jobs) - num_left, len(jobs))
                if parts:
                    patience.wait(num_left)
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)
    return writer.num_added


class _Count:
    """Counts the rows that this process and others have written. is_shared: whether there are others."""

    def __init__(self, cache: Cache, keys: list[str]):
        self._cache, self._keys, self.is_shared = cache, keys, False
        self._num_of_others, self._next = 0, 0.0

    def of_all(self, num_own: int) -> int:
        """Return how many rows are written. num_own: by this process."""
        began = time.monotonic()
        if self.is_shared and began >= self._next:
            self._num_of_others = len(self._keys) - len(self._cache.missing(self._keys)) - num_own
            self._next = time.monotonic() + max(COUNT_S, (time.monotonic() - began) / COUNT_SHARE)
        return min(self._num_of_others + num_own, len(self._keys))


def loads_nothing(executor: Executor, stop: threading.Event, items: list) -> Callable[[], None]:
    """Load nothing: for rows that are encoded from what the caller has."""
    return _nothing


def _nothing() -> None:
    pass


def _cut(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
