"""Optimizer state in host memory, which streams past a device while a backward pass runs.

A page is the state of some tensors, one after the other in one flat stretch of bytes: 16-bit remainders, codes and absmaxes
of both moments, each piece aligned to 16 bytes. All pages lie in pinned host memory; a ring of slots on the device, each
as large as the largest page, holds the few that are stepped next. Three streams work on it: the one that computes, one
that brings pages in and one that takes them out, so that both directions of the bus are busy at once.

    begin   outward waits for compute, inward for outward; the first pages of the step before's order are brought in
    take    compute waits for the page's arrival
    put     outward waits for what compute has done by now, copies the page home; the next page may come in:
            inward waits for that copy, then overwrites the slot
    end     compute waits for both others

So a slot is never overwritten before it is home, a kernel never reads what has not arrived, a page is never read from the
host before its last copy home, and between two steps, or at the end of a captured graph, nothing is under way that
compute does not wait for. The host waits for nothing; `synchronize` is for whoever reads or writes pages on it. A page
that is taken without having been foreseen (all of them in the first step) comes in on demand.

Pinned memory is one block, registered with CUDA. torch's pinned allocator rounds every block up to a power of two
(`PowerOf2Ceil` in aten/src/ATen/core/CachingHostAllocator.h): up to twice the memory. Where there is no CUDA device, memory
is ordinary, no stream is there, and the rest is the same; meta tensors have the ring alone.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.kernels.moment_blocks import BLOCK_SIZE
from safelight.kernels.triton.jit import cdiv

ALIGNMENT = 16
# one is computed on while another comes in or goes out; a third would cost its bytes and hide no more of a steady stream
NUM_SLOTS = 2
COMPUTE, INWARD, OUTWARD = "compute", "inward", "outward"
# a tensor's pieces, in their order: name -> dtype
PIECES = {
    "remainder": torch.int16,
    "state1": torch.uint8,
    "state2": torch.uint8,
    "absmax1": torch.float32,
    "absmax2": torch.float32,
}


class NoStreams:
    """Of a device without streams: what the program asks for first is done first."""

    def record(self, stream: str) -> object:
        """Return an event: all that a stream was asked so far."""

    def wait(self, stream: str, event: object) -> None:
        """Let what a stream is asked from now on wait for an event."""

    def on(self, stream: str) -> contextlib.AbstractContextManager:
        """Ask a stream for what is done within the block."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Wait on the host for all streams."""


class CudaStreams(NoStreams):
    """Of a CUDA device: two of its own; compute is the stream that is current when it is asked for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._own = {name: torch.cuda.Stream(device) for name in (INWARD, OUTWARD)}

    def _stream(self, name: str) -> torch.cuda.Stream:
        return self._own.get(name) or torch.cuda.current_stream(self._device)

    def record(self, stream: str) -> torch.cuda.Event:
        return self._stream(stream).record_event()

    def wait(self, stream: str, event: torch.cuda.Event) -> None:
        self._stream(stream).wait_event(event)

    def on(self, stream: str) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self._stream(stream))

    def synchronize(self) -> None:
        # a replayed graph ran on a stream that is not known here
        torch.cuda.synchronize(self._device)


def _pinned(num_bytes: int) -> Tensor:
    """Return bytes of host memory, zeros, that CUDA copies from and to without the host."""
    gib = f"optimizer.memory paged keeps {num_bytes / 2**30:.2f} GiB in host memory"
    try:
        host = torch.zeros(num_bytes, dtype=torch.uint8)
    except RuntimeError:
        raise ValueError(f"{gib}, which this machine does not have; use near or rounded") from None
    code = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), num_bytes, 0))
    if code != 0:
        raise ValueError(f"{gib}, which CUDA cannot pin (error {code}): free memory, or use near or rounded")
    return host


def _unpin(host: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())


@dataclass(frozen=True)
class _Place:
    """Where a tensor's pieces begin within its page, in bytes, by name."""

    page: int
    shape: torch.Size
    strides: tuple[int, ...]
    offsets: dict[str, int]


def state_bytes(numel: int) -> dict[str, int]:
    """Return the bytes of a tensor's pieces by name, without what aligns them."""
    blocks = cdiv(numel, BLOCK_SIZE)
    return {name: dtype.itemsize * (blocks if name.startswith("absmax") else numel) for name, dtype in PIECES.items()}


def _aligned(num_bytes: int) -> int:
    return cdiv(num_bytes, ALIGNMENT) * ALIGNMENT


class Pages:
    """The state of some tensors, zeros to begin with.

    tensors: index -> parameter, dense, whose memory order its state has; all on one device. groups: indices that are
    stepped together, every tensor in one of them. A group larger than the largest tensor makes several pages. device: where
    they are stepped, if the tensors are not there yet.

    page_of: index -> page. ring: NUM_SLOTS flat uint8 tensors on the device. host: all pages, flat uint8, None for meta
    tensors. Raises ValueError where the host has not the memory.
    """

    def __init__(
        self,
        tensors: dict[int, Tensor],
        groups: Sequence[Sequence[int]],
        streams: NoStreams | None = None,
        device: torch.device | None = None,
    ):
        device = device or next(iter(tensors.values())).device
        sizes = {i: sum(map(_aligned, state_bytes(p.numel()).values())) for i, p in tensors.items()}
        largest = max(sizes.values())
        self._places: dict[int, _Place] = {}
        self._sizes: list[int] = []
        for group in groups:
            room = -1
            for index in group:
                if sizes[index] > room:
                    self._sizes.append(0)
                    room = largest
                self._places[index] = self._lay(tensors[index])
                room -= sizes[index]
        assert self._places.keys() == tensors.keys()
        self._starts = [0, *itertools.accumulate(self._sizes)]
        self.page_of = {index: place.page for index, place in self._places.items()}
        self.ring = [torch.zeros(max(self._sizes), dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self.host: Tensor | None = None
        if device.type == "cuda":
            self.host = _pinned(self.num_bytes)
            weakref.finalize(self, _unpin, self.host).atexit = False
        elif device.type != "meta":
            self.host = torch.zeros(self.num_bytes, dtype=torch.uint8)
        if streams is None:
            streams = CudaStreams(device) if device.type == "cuda" else NoStreams()
        self._streams = streams
        # in which order the pages were taken in the step before, and in this one
        self._before: list[int] = []
        self._taken: list[int] = []
        self._coming: deque[int] = deque()
        # of this step: page in each slot, when it arrived and, once it is no longer there, when it was home
        self._slots: list[int | None] = [None] * NUM_SLOTS
        self._arrived: dict[int, object] = {}
        self._home: dict[int, object] = {}
        self._freed: list[object] = [None] * NUM_SLOTS

    def _lay(self, p: Tensor) -> _Place:
        """Return a place at the end of the last page, which grows."""
        offsets = {}
        for name, num_bytes in state_bytes(p.numel()).items():
            offsets[name] = self._sizes[-1]
            self._sizes[-1] += _aligned(num_bytes)
        return _Place(len(self._sizes) - 1, p.shape, p.stride(), offsets)

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def _views(self, index: int, flat: Tensor) -> dict[str, Tensor]:
        """Return a tensor's pieces within the bytes of its page: remainder and codes in its shape and memory order."""
        place, found = self._places[index], {}
        for name, num_bytes in state_bytes(place.shape.numel()).items():
            piece = flat[place.offsets[name] :][:num_bytes].view(PIECES[name])
            if not name.startswith("absmax"):
                piece = piece.as_strided(place.shape, place.strides, piece.storage_offset())
            found[name] = piece
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages: host memory, which of meta tensors is not there."""
        return sum(self._sizes)

    def _page(self, page: int) -> Tensor:
        return self.host[self._starts[page] :][: self._sizes[page]]

    def at_home(self, index: int) -> dict[str, Tensor]:
        """Return a tensor's pieces in host memory, by name, as views; of meta tensors the ring's, which hold nothing."""
        return self._views(index, self.ring[0] if self.host is None else self._page(self.page_of[index]))

    def in_slot(self, index: int, slot: int) -> dict[str, Tensor]:
        """Return a tensor's pieces where they are while its page is in a slot, by name, as views."""
        return self._views(index, self.ring[slot])

    def begin(self) -> None:
        """Begin a step: every page is at home, and may be taken once more."""
        self._taken.clear(), self._arrived.clear(), self._home.clear()
        self._coming = deque(self._before)
        self._slots, self._freed = [None] * NUM_SLOTS, [None] * NUM_SLOTS
        # through outward, where a step that failed may have left copies under way
        self._streams.wait(OUTWARD, self._streams.record(COMPUTE))
        self._streams.wait(INWARD, self._streams.record(OUTWARD))
        self._fill()

    def _fill(self) -> None:
        """Bring in what comes next, as far as slots are free."""
        while self._coming and None in self._slots:
            page = self._coming.popleft()
            if page not in self._taken and page not in self._slots:
                self._bring(page, self._slots.index(None))

    def _bring(self, page: int, slot: int) -> None:
        # what was in the slot, and a page that is taken a second time, must be home before
        for event in (self._freed[slot], self._home.get(page)):
            if event is not None:
                self._streams.wait(INWARD, event)
        with self._streams.on(INWARD):
            self._copy(page, slot, True)
        self._slots[slot] = page
        self._arrived[page] = self._streams.record(INWARD)

    def _copy(self, page: int, slot: int, is_inward: bool) -> None:
        if self.host is None:
            return
        here, there = self._page(page), self.ring[slot][: self._sizes[page]]
        there.copy_(here, non_blocking=True) if is_inward else here.copy_(there, non_blocking=True)

    def take(self, page: int) -> int:
        """Return the slot that a page is in, for what compute is asked from now on until `put`."""
        if page not in self._slots:
            self._bring(page, self._slots.index(None) if None in self._slots else self._evicted())
        self._streams.wait(COMPUTE, self._arrived[page])
        self._taken.append(page)
        return self._slots.index(page)

    def _evicted(self) -> int:
        """Return the slot of the page that would be taken last, which nobody has changed, and let it come in again."""
        slot = max(range(NUM_SLOTS), key=lambda s: self._before.index(self._slots[s]))
        self._coming.appendleft(self._slots[slot])
        return slot

    def put(self, page: int) -> None:
        """Let a page that was taken go home, and the next one come in."""
        slot = self._slots.index(page)
        self._streams.wait(OUTWARD, self._streams.record(COMPUTE))
        with self._streams.on(OUTWARD):
            self._copy(page, slot, False)
        self._home[page] = self._freed[slot] = self._streams.record(OUTWARD)
        self._slots[slot] = None
        self._fill()

    def end(self) -> None:
        """End a step."""
        for stream in (INWARD, OUTWARD):
            self._streams.wait(COMPUTE, self._streams.record(stream))
        self._before = list(dict.fromkeys(self._taken))

    def synchronize(self) -> None:
        """Wait until every page is at home as the last step left it. Then `at_home` may be read and written to."""
        self._streams.synchronize()
