"""Copies a checkpoint's tensors to host memory, so that training continues while they are written.

The training loop only enqueues the copies: on a GPU they run between two steps, on the steps' own stream, into pinned
memory. Tensors are copied in their memory order; the writing thread makes them contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from safelight.kernels.host_memory import HostSlabs

SNAPSHOT_SLAB_BYTES = 2**28


def num_bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the total bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


class SnapshotBuffers:
    """Host memory for one snapshot at a time. is_pinned: whether it is pinned, so that GPU copies are asynchronous."""

    def __init__(self, is_pinned: bool):
        self._slabs = HostSlabs(SNAPSHOT_SLAB_BYTES, is_pinned)

    @property
    def num_bytes(self) -> int:
        return self._slabs.num_bytes

    def begin(self) -> None:
        """Start a new snapshot, which overwrites the previous one."""
        self._slabs.give_back_all()

    def like(self, x: Tensor) -> Tensor:
        """Return an uninitialized tensor of x's shape and dtype, in its memory order if that is dense."""
        strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
        flat = self._slabs.take(x.numel() * x.element_size()).view(x.dtype)
        return flat.as_strided(x.shape, strides, flat.storage_offset())

    def reserve(self, tensors: Iterable[Tensor]) -> None:
        """Allocate and touch the memory for a snapshot of such tensors, so that the first one is fast.

        Raises RuntimeError if CUDA cannot pin that much.
        """
        self.begin()
        for x in tensors:
            # the first write to a page costs more than copying it
            self.like(x).zero_()

    def release(self) -> None:
        """Free all memory."""
        self._slabs.release()


class Snapshot:
    """Copies of tensors by name, which may be in flight until `wait_for_copies` returns.

    tensors: a mapping, or pairs that are copied one after another, each of which may be freed after that.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], buffers: SnapshotBuffers):
        buffers.begin()
        self.tensors, device = {}, None
        for name, x in tensors.items() if isinstance(tensors, Mapping) else tensors:
            self.tensors[name] = buffers.like(x).copy_(x.detach(), non_blocking=True)
            device = x.device if x.device.type == "cuda" else device
        self._copied = None if device is None else torch.cuda.current_stream(device).record_event()

    def wait_for_copies(self) -> dict[str, Tensor]:
        """Block until the copies are done and return them, contiguous. Called by the writing thread."""
        if self._copied is not None:
            self._copied.synchronize()
        for name, x in self.tensors.items():
            if not x.is_contiguous():
                # in place, so that only one tensor at a time exists twice
                ordered = x.contiguous()
                flat = x.as_strided(ordered.shape, ordered.stride(), x.storage_offset())
                self.tensors[name] = flat.copy_(ordered)
        return self.tensors
