"""16-bit weights in pinned host memory, streamed block by block through two slots on the device.

All weights live in one flat buffer in pinned host memory, a block's back to back. A ring of slots on the device, each
as large as the largest block, holds the block that is computed with and the one that comes next. `take` copies a block
in, unless it is there, points its Parameters at the slot, and starts to copy the block that followed it last time into
the other slot. Once an optimizer has updated a taken block, `put` copies it back. The Parameters of all other blocks
point at host memory. A training step copies every block in twice, for forward and backward, and out once.

Three streams are used: compute, inward and outward copies. `take` makes compute wait for the block's arrival. An inward
copy waits for the compute that used the slot before, for the outward copy of the slot's old block, and for the last
outward copy of its own block. The host never waits; call `synchronize` before Parameters are read or written outside
of a pass.

Without a CUDA device memory is ordinary, there are no streams, and the rest is the same. For meta tensors only the ring
exists.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from safelight.errors import UserError
from safelight.kernels.host_memory import pinned_block, unpin
from safelight.kernels.streams import COMPUTE, streams_for
from safelight.kernels.triton.jit import cdiv
from safelight.units import GIB

# in elements of 2 bytes: 16 bytes, which a kernel may load at once
ALIGNMENT = 8
# one is computed with while the other is filled; a third would cost its bytes and hide no more of a steady stream
NUM_SLOTS = 2
INWARD, OUTWARD = "inward", "outward"


def _is_behind(p: Tensor, before: Tensor | None) -> bool:
    """Return whether a tensor begins where another one ends, as packed ones do."""
    return (
        before is not None
        and p.untyped_storage()._cdata == before.untyped_storage()._cdata
        and p.storage_offset() == before.storage_offset() + before.numel()
    )


@dataclass(frozen=True)
class _Place:
    """Where a weight is: its block, the offset in elements within the block, shape and memory order."""

    block: int
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]


class StreamedWeights:
    """Weights by block, uninitialized: write them to the `at_home` views, then call `attach`.

    blocks: dense Parameters by block; packed ones stay packed. dtype: 16-bit, which they will have. device: where they
    are computed with.

    ring: NUM_SLOTS flat tensors on the device. host: all blocks, flat, None for meta tensors. num_bytes: of all blocks.
    Raises UserError if the host lacks the memory.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Parameter]], dtype: torch.dtype, device: torch.device):
        self.parameters = [list(weights) for weights in blocks]
        self._places: dict[nn.Parameter, _Place] = {}
        self._sizes: list[int] = []
        for index, weights in enumerate(self.parameters):
            self._sizes.append(0)
            before = None
            for p in weights:
                offset = self._sizes[-1]
                if not _is_behind(p, before):
                    offset = cdiv(offset, ALIGNMENT) * ALIGNMENT
                self._places[p] = _Place(index, offset, p.shape, p.stride())
                self._sizes[-1], before = offset + p.numel(), p
        aligned = [cdiv(size, ALIGNMENT) * ALIGNMENT for size in self._sizes]
        self._starts = [0, *itertools.accumulate(aligned)]
        self.num_bytes = self._starts[-1] * dtype.itemsize
        self.ring = [torch.zeros(max(self._sizes), dtype=dtype, device=device) for _ in range(NUM_SLOTS)]
        self.host: Tensor | None = None
        if device.type == "cuda":
            block = _pinned(self.num_bytes)
            weakref.finalize(self, unpin, block).atexit = False
            self.host = block.view(dtype)
        elif device.type != "meta":
            self.host = torch.zeros(self._starts[-1], dtype=dtype)
        # made once: thousands of views a step would cost the host more than the copies
        self._in_slots = {p: [self._view(p, slot, 0) for slot in self.ring] for p in self._places}
        self._at_home = {p: self._in_slots[p][0] for p in self._places}
        if self.host is not None:
            self._at_home = {
                p: self._view(p, self.host, self._starts[place.block]) for p, place in self._places.items()
            }
        self._slot_of_storage = {slot.untyped_storage()._cdata: index for index, slot in enumerate(self.ring)}
        self._streams = streams_for(device, INWARD, OUTWARD)
        # the block that is taken, the block in each slot, and the one that followed (block, is in backward) last time
        self._taken: int | None = None
        self._slots: list[int | None] = [None] * NUM_SLOTS
        self._next: dict[tuple[int | None, bool], int] = {}
        self._previous: int | None = None
        self._slot_left_last: int | None = None
        # events: a slot's block has arrived, compute has left the slot, a block's copy out has finished
        self._arrived: list[object] = [None] * NUM_SLOTS
        self._left: list[object] = [None] * NUM_SLOTS
        self._returned: dict[int, object] = {}
        # copied since the last call of `reset_counts`
        self.bytes_inward = self.bytes_outward = 0

    def __contains__(self, p: nn.Parameter) -> bool:
        return p in self._places

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._places)

    @property
    def num_trained_bytes(self) -> int:
        """Bytes of the blocks that an optimizer updates."""
        sizes = zip(self.parameters, self._sizes, strict=True)
        trained = sum(size for weights, size in sizes if any(p.requires_grad for p in weights))
        return trained * self.ring[0].element_size()

    def block_of(self, p: nn.Parameter) -> int:
        """Return the index of a streamed weight's block."""
        return self._places[p].block

    def _view(self, p: nn.Parameter, flat: Tensor, start: int) -> Tensor:
        place = self._places[p]
        return flat.as_strided(place.shape, place.strides, start + place.offset)

    def at_home(self, p: nn.Parameter) -> Tensor:
        """Return a weight in host memory, in its shape and memory order. For meta tensors: in the empty ring."""
        return self._at_home[p]

    def in_slot(self, p: nn.Parameter, slot: int) -> Tensor:
        """Return a weight on the device while its block is in a slot."""
        return self._in_slots[p][slot]

    @torch.no_grad()
    def take_frozen(self) -> None:
        """Copy the weights that are not trained to host memory, and free their old memory."""
        for p, home in self._at_home.items():
            if not p.requires_grad:
                p.data = home.copy_(p)

    def detach(self) -> None:
        """Point every weight at nothing, so that the UNet's other tensors can be moved."""
        for p in self._places:
            p.data = torch.empty(0, dtype=self.ring[0].dtype, device="meta" if self.host is None else "cpu")

    def attach(self) -> None:
        """Point every weight at host memory."""
        for p in self._places:
            p.data = self._at_home[p]

    def reset_counts(self) -> None:
        self.bytes_inward = self.bytes_outward = 0

    def begin_pass(self) -> None:
        """Announce that the next block to be taken is the first of a forward pass."""
        self._previous = None

    def block_in(self, x: Tensor) -> int | None:
        """Return the block that a tensor is a view of, in its slot; None if it is no view of the ring."""
        slot = self._slot_of_storage.get(x.untyped_storage()._cdata)
        return None if slot is None else self._slots[slot]

    def view_of_taken(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        """Return a view of the taken block's slot."""
        return self.ring[self.slot].as_strided(size, stride, offset)

    @property
    def slot(self) -> int | None:
        """The slot of the block that is taken."""
        return None if self._taken is None else self._slots.index(self._taken)

    def take(self, block: int) -> None:
        """Have a block's weights on the device for what compute enqueues until another block is taken."""
        # selective checkpointing must not see the copies: they differ between a block's forward pass and its repetition
        with torch.no_grad(), _disable_current_modes():
            self._take(block)

    def _take(self, block: int) -> None:
        is_backward = torch._C._current_graph_task_id() != -1
        if self._previous is not None and self._previous != block:
            self._next[self._previous, is_backward] = block
        self._previous = block
        if self._taken != block:
            self._leave()
            if block not in self._slots:
                self._copy_in(block)
            slot = self._slots.index(block)
            self._streams.wait(COMPUTE, self._arrived[slot])
            for p in self.parameters[block]:
                p.data = self._in_slots[p][slot]
            self._taken = block
        following = self._next.get((block, is_backward))
        if following is not None and following not in self._slots:
            self._copy_in(following)

    def _leave(self) -> None:
        """Point the taken block's weights at host memory again."""
        if self._taken is None:
            return
        self._slot_left_last = self.slot
        self._left[self.slot] = self._streams.record(COMPUTE)
        for p in self.parameters[self._taken]:
            p.data = self._at_home[p]
        self._taken = None

    def _copy_in(self, block: int) -> None:
        """Start to copy a block to a slot that is not in use."""
        free = [slot for slot in range(NUM_SLOTS) if self._taken is None or slot != self.slot]
        # an empty one, else the one that compute left first
        slot = min(free, key=lambda s: (self._slots[s] is not None, s == self._slot_left_last))
        for event in (self._left[slot], self._returned.get(self._slots[slot]), self._returned.get(block)):
            if event is not None:
                self._streams.wait(INWARD, event)
        self._slots[slot] = block
        with self._streams.on(INWARD):
            self._copy(block, slot, True)
        self._arrived[slot] = self._streams.record(INWARD)

    def _copy(self, block: int, slot: int, is_inward: bool) -> None:
        num_bytes = self._sizes[block] * self.ring[0].element_size()
        if is_inward:
            self.bytes_inward += num_bytes
        else:
            self.bytes_outward += num_bytes
        if self.host is None:
            return
        on_host, on_device = self.host[self._starts[block] :][: self._sizes[block]], self.ring[slot]
        on_device = on_device[: self._sizes[block]]
        to, source = (on_device, on_host) if is_inward else (on_host, on_device)
        to.copy_(source, non_blocking=True)

    def begin_update(self, block: int) -> None:
        """Take a block whose weights compute is about to change."""
        self.take(block)
        # its last copy out may still read the slot
        if (event := self._returned.get(block)) is not None:
            self._streams.wait(COMPUTE, event)

    @torch.no_grad()
    def put(self, block: int) -> None:
        """Copy a taken block's new weights back to host memory."""
        slot = self._slots.index(block)
        self._streams.wait(OUTWARD, self._streams.record(COMPUTE))
        with self._streams.on(OUTWARD):
            self._copy(block, slot, False)
        self._returned[block] = self._streams.record(OUTWARD)

    def synchronize(self) -> None:
        """Block until host memory holds all weights. The Parameters then point at it and can be read and written."""
        self._leave()
        self._streams.synchronize()
        self._slots = [None] * NUM_SLOTS


def _pinned(num_bytes: int) -> Tensor:
    try:
        return pinned_block(num_bytes)
    except RuntimeError as error:
        raise UserError(
            f"optimizer.memory streamed keeps {num_bytes / GIB:.2f} GiB of weights in pinned host memory, which cannot "
            f"be allocated ({str(error).splitlines()[0][:80]}); free memory, or use paged"
        ) from None
