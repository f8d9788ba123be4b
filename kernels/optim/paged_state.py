"""Optimizer state in pinned host memory, streamed through the device during the backward pass.

A page is the state of some tensors, back to back in one flat byte buffer: 16-bit remainders, codes and absmaxes of
both moments, each piece aligned to 16 bytes. All pages live in pinned host memory. A ring of slots on the device, each
as large as the largest page, holds the few pages that are stepped next. Three streams are used: compute, one that
copies pages in and one that copies them out, so that both directions of the bus are busy at once.

    begin   outward waits for compute, inward for outward; the first pages, in the previous step's order, are copied in
    take    compute waits for the page's arrival
    put     outward waits for what compute has done so far and copies the page out; inward waits for that copy, then
            overwrites the slot with the next page
    end     compute waits for both others

So a slot is never overwritten before its page is back in host memory, a kernel never reads a page that has not
arrived, a page is never copied in before its last copy out has finished, and between steps, or at the end of a captured
graph, no copy is in flight that compute does not wait for. The host never waits; call `synchronize` before reading or
writing pages on the host. A page that was not prefetched (all of them in the first step) is copied in on demand.

Without a CUDA device memory is ordinary, there are no streams, and the rest is the same. For meta tensors only the ring
exists.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.kernels.host_memory import pinned_block, unpin
from safelight.kernels.moment_blocks import BLOCK_SIZE
from safelight.kernels.streams import COMPUTE, streams_for
from safelight.kernels.triton.jit import cdiv
from safelight.units import GIB

ALIGNMENT = 16
# one is computed on while the other is copied; a third would cost its bytes and hide no more of a steady stream
NUM_SLOTS = 2
INWARD, OUTWARD = "inward", "outward"
# a tensor's pieces in their order within a page, by the value of optimizer.moments: name -> dtype
_SCALES = {"absmax1": torch.float32, "absmax2": torch.float32}
PIECES = {
    "8bit": {"remainder": torch.int16, "state1": torch.uint8, "state2": torch.uint8, **_SCALES},
    "4bit": {"remainder": torch.int16, "packed": torch.uint8, **_SCALES},
}


def _pinned(num_bytes: int) -> Tensor:
    try:
        return pinned_block(num_bytes)
    except RuntimeError as error:
        raise UserError(
            f"optimizer.memory paged keeps {num_bytes / GIB:.2f} GiB in pinned host memory, which cannot be allocated "
            f"({str(error).splitlines()[0][:80]}); free memory, or use near or rounded"
        ) from None


@dataclass(frozen=True)
class _Place:
    """Where a tensor's pieces begin within its page: offsets in bytes, by name."""

    page: int
    shape: torch.Size
    strides: tuple[int, ...]
    offsets: dict[str, int]


def state_bytes(numel: int, moments: str) -> dict[str, int]:
    """Return the bytes of a tensor's pieces by name, without padding. moments: 8bit | 4bit."""
    blocks = cdiv(numel, BLOCK_SIZE)
    return {
        name: dtype.itemsize * (blocks if name.startswith("absmax") else numel)
        for name, dtype in PIECES[moments].items()
    }


def _aligned(num_bytes: int) -> int:
    return cdiv(num_bytes, ALIGNMENT) * ALIGNMENT


class Pages:
    """The optimizer state of some tensors, initially zeros.

    tensors: index -> dense parameter, whose memory order its state has; all on one device. groups: indices that are
    stepped together; each tensor is in exactly one. A group larger than the largest tensor becomes several pages.
    device: where the tensors are stepped, if they are not there yet. moments: 8bit | 4bit.

    page_of: index -> page. ring: NUM_SLOTS flat uint8 tensors on the device. host: all pages, flat uint8, None for meta
    tensors. Raises UserError if the host lacks the memory.
    """

    def __init__(
        self,
        tensors: dict[int, Tensor],
        groups: Sequence[Sequence[int]],
        device: torch.device | None = None,
        moments: str = "8bit",
    ):
        device = device or next(iter(tensors.values())).device
        self.moments = moments
        sizes = {i: sum(map(_aligned, state_bytes(p.numel(), moments).values())) for i, p in tensors.items()}
        largest = max(sizes.values())
        self._places: dict[int, _Place] = {}
        self._sizes: list[int] = []
        for group in groups:
            room = -1
            for index in group:
                if sizes[index] > room:
                    self._sizes.append(0)
                    room = largest
                self._places[index] = self._append(tensors[index])
                room -= sizes[index]
        assert self._places.keys() == tensors.keys()
        self._starts = [0, *itertools.accumulate(self._sizes)]
        self.page_of = {index: place.page for index, place in self._places.items()}
        self.ring = [torch.zeros(max(self._sizes), dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self.host: Tensor | None = None
        if device.type == "cuda":
            self.host = _pinned(self.num_bytes)
            weakref.finalize(self, unpin, self.host).atexit = False
        elif device.type != "meta":
            self.host = torch.zeros(self.num_bytes, dtype=torch.uint8)
        self._streams = streams_for(device, INWARD, OUTWARD)
        # the order in which pages were taken in the previous step, and in this one
        self._previous: list[int] = []
        self._taken: list[int] = []
        self._to_prefetch: deque[int] = deque()
        # of this step: the page in each slot; events of pages' arrivals and returns, and of slots' last copies out
        self._slots: list[int | None] = [None] * NUM_SLOTS
        self._arrived: dict[int, object] = {}
        self._returned: dict[int, object] = {}
        self._freed: list[object] = [None] * NUM_SLOTS

    def _append(self, p: Tensor) -> _Place:
        """Append a tensor's state to the last page and return its place."""
        offsets = {}
        for name, num_bytes in state_bytes(p.numel(), self.moments).items():
            offsets[name] = self._sizes[-1]
            self._sizes[-1] += _aligned(num_bytes)
        return _Place(len(self._sizes) - 1, p.shape, p.stride(), offsets)

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def _views(self, index: int, flat: Tensor) -> dict[str, Tensor]:
        """Return a tensor's pieces as views of its page: remainder and codes in its shape and memory order."""
        place, views = self._places[index], {}
        for name, num_bytes in state_bytes(place.shape.numel(), self.moments).items():
            piece = flat[place.offsets[name] :][:num_bytes].view(PIECES[self.moments][name])
            if not name.startswith("absmax"):
                piece = piece.as_strided(place.shape, place.strides, piece.storage_offset())
            views[name] = piece
        return views

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, which meta tensors do not allocate."""
        return sum(self._sizes)

    def _page(self, page: int) -> Tensor:
        return self.host[self._starts[page] :][: self._sizes[page]]

    def at_home(self, index: int) -> dict[str, Tensor]:
        """Return views of a tensor's pieces in host memory, by name. For meta tensors: views of the empty ring."""
        return self._views(index, self.ring[0] if self.host is None else self._page(self.page_of[index]))

    def in_slot(self, index: int, slot: int) -> dict[str, Tensor]:
        """Return views of a tensor's pieces on the device while its page is in a slot, by name."""
        return self._views(index, self.ring[slot])

    def begin(self) -> None:
        """Begin a step: all pages are in host memory or on their way there; start to prefetch."""
        self._taken.clear(), self._arrived.clear(), self._returned.clear()
        self._to_prefetch = deque(self._previous)
        self._slots, self._freed = [None] * NUM_SLOTS, [None] * NUM_SLOTS
        # inward waits through outward, where a failed step may have left copies in flight
        self._streams.wait(OUTWARD, self._streams.record(COMPUTE))
        self._streams.wait(INWARD, self._streams.record(OUTWARD))
        self._prefetch()

    def _prefetch(self) -> None:
        """Copy in the next pages while slots are free."""
        while self._to_prefetch and None in self._slots:
            page = self._to_prefetch.popleft()
            if page not in self._taken and page not in self._slots:
                self._copy_in(page, self._slots.index(None))

    def _copy_in(self, page: int, slot: int) -> None:
        # the slot's old page, and this page if it is taken a second time, must be back in host memory first
        for event in (self._freed[slot], self._returned.get(page)):
            if event is not None:
                self._streams.wait(INWARD, event)
        with self._streams.on(INWARD):
            self._copy(page, slot, True)
        self._slots[slot] = page
        self._arrived[page] = self._streams.record(INWARD)

    def _copy(self, page: int, slot: int, is_inward: bool) -> None:
        if self.host is None:
            return
        on_host, on_device = self._page(page), self.ring[slot][: self._sizes[page]]
        to, source = (on_device, on_host) if is_inward else (on_host, on_device)
        to.copy_(source, non_blocking=True)

    def take(self, page: int) -> int:
        """Return the slot that holds a page for what compute enqueues until `put`."""
        if page not in self._slots:
            self._copy_in(page, self._slots.index(None) if None in self._slots else self._evict())
        self._streams.wait(COMPUTE, self._arrived[page])
        self._taken.append(page)
        return self._slots.index(page)

    def _evict(self) -> int:
        """Free the slot whose unmodified page is expected last, and return it; the page is prefetched again later."""
        slot = max(range(NUM_SLOTS), key=lambda s: self._previous.index(self._slots[s]))
        self._to_prefetch.appendleft(self._slots[slot])
        return slot

    def put(self, page: int) -> None:
        """Copy a taken page back to host memory and prefetch the next one."""
        slot = self._slots.index(page)
        self._streams.wait(OUTWARD, self._streams.record(COMPUTE))
        with self._streams.on(OUTWARD):
            self._copy(page, slot, False)
        self._returned[page] = self._freed[slot] = self._streams.record(OUTWARD)
        self._slots[slot] = None
        self._prefetch()

    def end(self) -> None:
        """End a step: compute waits for all copies."""
        for stream in (INWARD, OUTWARD):
            self._streams.wait(COMPUTE, self._streams.record(stream))
        self._previous = list(dict.fromkeys(self._taken))

    def synchronize(self) -> None:
        """Block until every page is back in host memory. Then the views of `at_home` can be read and written."""
        self._streams.synchronize()
