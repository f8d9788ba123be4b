"""Checkpoints written behind the loop's back: it pays for a copy in host memory, a thread does the rest.

One at a time: the next save waits for the one before. What a write meets (a full disk, a folder that cannot be written to)
is raised in the loop, at its next step or at the end. Order: metrics on disk, then the checkpoint, then what is not kept
is deleted; so a checkpoint that is seen never counts on a line that is not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.trainer.checkpoint.files import Position, prune, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.checkpoint.snapshot import HostMemory, SavedUNet, Snapshot, available_bytes, num_bytes_of

GIB = 2**30
# host memory that keeping a snapshot's must leave to everything else
SPARE_BYTES = 2 * GIB
# a save that waits longer for the one before says so
PATIENCE_S = 10.0
UNET = "unet/"


class _Abandoned(Exception):
    """Raised in the thread between two files, once nobody waits for the checkpoint."""


@dataclass
class Saver:
    """Saves a run's checkpoints; a context, which ends when the last one is whole or its failure is told.

    saved_step: of the newest checkpoint that is whole on disk; asked_step: of the newest that was asked for; -1 before any.
    """

    run_dir: Path
    identity: Identity
    keep: int
    sync_metrics: Callable[[], None]
    say: Callable[[str], None]
    device: torch.device
    saved_step: int = -1
    asked_step: int = field(init=False)
    _memory: HostMemory = field(init=False)
    _is_kept: bool = False
    _under_way: Future | None = None
    _thread: threading.Thread | None = None
    _what: str = ""
    _is_abandoned: bool = False

    def __post_init__(self):
        self.asked_step = self.saved_step
        self._memory = HostMemory(pinned=False)

    def reserve(self, unet: nn.Module, state: dict[str, Tensor]) -> None:
        """Begin to take the memory of such saves, to keep it for the whole run; where it is scarce, tell that it is not kept.

        Kept, it is pinned on a GPU. Not kept, each save takes pageable memory and gives it back: that holds up training.
        """
        tensors = [*unet.state_dict().values(), *state.values()]
        needed, available = num_bytes_of(tensors), available_bytes()
        if available is None or available < needed + SPARE_BYTES:
            told = "unknown" if available is None else f"{available / GIB:.1f} GiB"
            self.say(
                f"a checkpoint's copy in host memory takes {needed / GIB:.1f} GiB, available: {told}; it is not kept "
                "between saves, and each save holds up training longer"
            )
            return
        self._is_kept, self._memory = True, HostMemory(pinned=self.device.type == "cuda")
        self._start("the host memory for checkpoints", lambda: self._reserve(tensors))

    def _reserve(self, tensors: list[Tensor]) -> None:
        try:
            self._memory.reserve(tensors)
        except RuntimeError as error:
            # of CUDA, which cannot pin as much
            self._is_kept, self._memory = False, HostMemory(pinned=False)
            reason = str(error).splitlines()[0]
            self.say(f"host memory for checkpoints cannot be pinned, each save holds up training longer ({reason})")

    def save(self, unet: nn.Module, state: dict[str, Tensor], position: Position) -> None:
        """Copy a checkpoint's tensors and begin to write them. state: as it is, it may change when this has returned."""
        self.wait()
        weights = {f"{UNET}{name}": x for name, x in unet.state_dict().items()}
        assert not weights.keys() & state.keys()
        snapshot = Snapshot({**weights, **state}, self._memory)
        self.asked_step = position.step
        self._start(f"the checkpoint of step {position.step}", lambda: self._write(unet, snapshot, position))

    def check(self) -> None:
        """Raise what a write has met, if it is over. Waits for nothing."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is under way. Raises what the write has met: OSError or SafetensorError of a full disk."""
        if self._under_way is None:
            return
        if not wait([self._under_way], PATIENCE_S).done:
            self.say(f"waiting for {self._what}")
        self._join()
        ended, self._under_way = self._under_way, None
        ended.result()

    def _join(self) -> None:
        wait([self._under_way])
        # its last references go after its result is there; a daemon that frees tensors while Python ends would abort it
        self._thread.join()

    def settle(self) -> None:
        """Return when nothing is under way; tell what the write has met. Where another failure is raised already."""
        try:
            self.wait()
        except Exception as error:
            # Report it here: the exception already propagating does not mention it. The traceback goes to libraries.log.
            self.say(f"{self._what} could not be saved: {error}")
            logging.getLogger(__name__).warning("%s could not be saved", self._what, exc_info=error)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            self.settle()
        elif self._under_way is not None:
            # asked twice to stop: what is under way ends with the file that it is at, while the folder is still locked
            self._is_abandoned = True
            self._join()

    def _start(self, what: str, work: Callable[[], None]) -> None:
        self._what, self._under_way = what, Future()
        future = self._under_way

        def run() -> None:
            try:
                work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        # a daemon: a third Ctrl-C need not wait either
        self._thread = threading.Thread(target=run, name="save-checkpoint", daemon=True)
        self._thread.start()

    def _go_on(self) -> None:
        if self._is_abandoned:
            raise _Abandoned

    def _write(self, unet: nn.Module, snapshot: Snapshot, position: Position) -> None:
        try:
            tensors = snapshot.settle()
            self.sync_metrics()
            weights = {name.removeprefix(UNET): x for name, x in tensors.items() if name.startswith(UNET)}
            state = {name: x for name, x in tensors.items() if not name.startswith(UNET)}
            save_checkpoint(self.run_dir, SavedUNet(unet, weights), state, position, self.identity, self._go_on)
            self.saved_step = position.step
            prune(self.run_dir, self.keep, position.best_step)
        finally:
            if not self._is_kept:
                self._memory.release()
