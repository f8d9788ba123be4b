"""Asynchronous checkpoints: the training loop only copies tensors to host memory, and a thread writes the files.

One save at a time: the next one waits for the previous one. The thread's errors (a full disk, a read-only folder) are
raised in the loop, at its next step or at the end. The thread syncs the metrics to disk, writes the checkpoint, then
deletes old ones, so a checkpoint on disk never depends on metrics that are not.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from safelight.data.decode_memory import available_bytes
from safelight.trainer.adapters.trained import Trained
from safelight.trainer.checkpoint.files import Position, prune, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.checkpoint.snapshot import Snapshot, SnapshotBuffers, num_bytes_of
from safelight.trainer.distributed.gather import forms_of_all
from safelight.trainer.distributed.sharded import is_cut, whole_of
from safelight.trainer.distributed.world import ALONE, World
from safelight.units import GIB

# buffers are kept between saves only if they leave this much host memory free
SPARE_BYTES = 2 * GIB
# waiting longer than this for the previous save prints a message
PATIENCE_S = 10.0
# keeps the names of trained tensors apart from those of the state within a snapshot
TRAINED = "trained/"


class _Abandoned(Exception):
    """Raised in the thread, between two files, after the checkpoint has been abandoned."""


@dataclass
class Saver:
    """Saves a run's checkpoints. A context manager: on exit the last save is complete, or its failure is reported.

    keep: save.keep of the saves that are requested from now on. say: prints a message. world: the processes of the run,
    of which only the main one writes. is_shared: whether each has a part of weights or state, which are put together
    while they are copied. saved_step: step of the newest complete checkpoint on disk. requested_step: step of the
    newest requested one. Both are -1 before the first. ruined: steps whose weights were ruined when they were saved.
    """

    run_dir: Path
    identity: Identity
    keep: int
    sync_metrics: Callable[[], None]
    say: Callable[[str], None]
    device: torch.device
    saved_step: int = -1
    world: World = ALONE
    is_shared: bool = False
    requested_step: int = field(init=False)
    ruined: set[int] = field(default_factory=set)
    _sound_step: int = field(init=False)
    _buffers: SnapshotBuffers = field(init=False)
    _is_kept: bool = False
    _in_flight: Future | None = None
    _thread: threading.Thread | None = None
    _what: str = ""
    _is_abandoned: bool = False

    def __post_init__(self):
        self.requested_step = self._sound_step = self.saved_step
        self._buffers = SnapshotBuffers(is_pinned=False)

    def reserve(self, trained: Trained, state: dict[str, Tensor]) -> None:
        """Start allocating buffers for saves of such tensors, which are kept for the whole run; pinned on a GPU.

        If host memory is scarce, print a message and keep none: each save then allocates and frees pageable memory,
        which takes longer.
        """
        weights = list(trained.tensors().values())
        if any(is_cut(x) for x in weights):
            # the forms of whole states are known only once they have been put together
            return
        whole = forms_of_all(self.world, state) if self.is_shared else state
        if not self.world.is_main:
            return
        tensors = [*weights, *whole.values()]
        needed, available = num_bytes_of(tensors), available_bytes()
        if available is None or available < needed + SPARE_BYTES:
            amount = "unknown" if available is None else f"{available / GIB:.1f} GiB"
            self.say(
                f"a checkpoint's copy in host memory takes {needed / GIB:.1f} GiB, available: {amount}; its memory is "
                "freed after each save, so saves interrupt training for longer"
            )
            return
        self._is_kept, self._buffers = True, SnapshotBuffers(is_pinned=self.device.type == "cuda")
        self._start("the host memory for checkpoints", lambda: self._reserve(tensors))

    def _reserve(self, tensors: list[Tensor]) -> None:
        try:
            self._buffers.reserve(tensors)
        except RuntimeError as error:
            self._is_kept, self._buffers = False, SnapshotBuffers(is_pinned=False)
            reason = str(error).splitlines()[0]
            self.say(f"host memory for checkpoints cannot be pinned, so saves interrupt training for longer ({reason})")

    def save(
        self,
        trained: Trained,
        state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        position: Position,
        is_ruined: bool = False,
    ) -> None:
        """Copy a checkpoint's tensors and start writing them. The tensors may change once this returns.

        Every process of the run must call it. state: if it is shared, pairs that come from all processes one by one.
        is_ruined: the newest checkpoint that is not ruined is kept beside it.
        """
        weights = ((f"{TRAINED}{name}", whole_of(x)) for name, x in trained.tensors().items())
        tensors = chain(weights, state.items() if isinstance(state, Mapping) else state)
        if not self.world.is_main:
            if self.is_shared:
                # they take part in putting each tensor together
                deque(tensors, maxlen=0)
            self.requested_step = self.saved_step = position.step
            return
        self.wait()
        snapshot = Snapshot(tensors, self._buffers)
        self.requested_step = position.step
        if is_ruined:
            self.ruined.add(position.step)
        # `keep` changes with the stage, possibly before the thread reads it
        write = partial(self._write, trained, snapshot, position, self.keep)
        self._start(f"the checkpoint of step {position.step}", write)

    def check(self) -> None:
        """Raise the error of a write that has failed. Does not block."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Block until no write is in flight. Raises its error, such as OSError or SafetensorError on a full disk."""
        if self._in_flight is None:
            return
        if not wait([self._in_flight], PATIENCE_S).done:
            self.say(f"waiting for {self._what}")
        self._join()
        finished, self._in_flight = self._in_flight, None
        finished.result()

    def _join(self) -> None:
        wait([self._in_flight])
        # the thread drops its last references after setting the result, and a daemon thread that frees tensors while
        # the interpreter shuts down aborts the process
        self._thread.join()

    def wait_and_report(self) -> None:
        """Block until no write is in flight, and report its error instead of raising it."""
        try:
            self.wait()
        except Exception as error:
            # of any type: the exception that is already propagating does not mention it
            self.say(f"{self._what} could not be saved: {error}")
            logging.getLogger(__name__).warning("%s could not be saved", self._what, exc_info=error)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            self.wait_and_report()
        elif self._in_flight is not None:
            # a second Ctrl-C: stop after the file being written, while the run folder is still locked
            self._is_abandoned = True
            self._join()

    def _start(self, what: str, work: Callable[[], None]) -> None:
        self._what, self._in_flight = what, Future()
        future = self._in_flight

        def run() -> None:
            try:
                work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        # a daemon, so that a third Ctrl-C does not wait for it
        self._thread = threading.Thread(target=run, name="save-checkpoint", daemon=True)
        self._thread.start()

    def _raise_if_abandoned(self) -> None:
        if self._is_abandoned:
            raise _Abandoned

    def _write(self, trained: Trained, snapshot: Snapshot, position: Position, keep: int) -> None:
        try:
            tensors = snapshot.wait_for_copies()
            self.sync_metrics()
            weights = {name.removeprefix(TRAINED): x for name, x in tensors.items() if name.startswith(TRAINED)}
            state = {name: x for name, x in tensors.items() if not name.startswith(TRAINED)}
            write = partial(trained.write, tensors=weights)
            save_checkpoint(self.run_dir, write, state, position, self.identity, self._raise_if_abandoned)
            self.saved_step = position.step
            if position.step not in self.ruined:
                self._sound_step = position.step
            prune(self.run_dir, keep, position.best_step, self._sound_step)
        finally:
            if not self._is_kept:
                self._buffers.release()
