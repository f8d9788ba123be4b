"""Keeps what a forward pass saves for the backward pass in host memory: copied out when saved, prefetched before use.

Hooks on saved tensors (Offload) replace every storage above a minimal size that autograd saves, and every input that
torch.utils.checkpoint keeps, by a copy in pinned memory. Weights stay on the device, and so does what a caller still
references: skip connections stay until the block that reads them. A storage is copied once, however many views of it
are saved, and comes back as one storage with the same strides, so the backward pass runs the same arithmetic.

Streams. All copies, in both directions, run in order on one side stream; each starts when the compute stream has
reached the point where it was enqueued. A source is freed only after the compute stream has been made to wait for its
copy, AHEAD storages later. Memory is therefore freed in the compute stream's own order, the peak does not depend on how
far the host runs ahead (as it does with Tensor.record_stream), and a device that is faster than the bus waits for it.
The destination of a prefetch is allocated on the compute stream, which waits for the copy before its first use and
before it is freed. Host memory needs no events, because only the side stream writes to it. The host never waits. On the
CPU copies are synchronous; on meta tensors there are none, and host memory is only counted.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.host_memory import HostSlabs
from safelight.kernels.streams import COMPUTE, streams_for

# smaller storages stay on the device: launching a copy costs more than they take
MIN_BYTES = 32 << 10
# storages in flight to the host, or prefetched: about two blocks of the UNet
AHEAD = 4
SLAB_BYTES = 64 << 20
COPY = "copy"


def slabs_for(device: torch.device) -> HostSlabs:
    """Return host memory for a device's saved tensors: pinned for a GPU, only counted for meta tensors."""
    return HostSlabs(SLAB_BYTES, is_pinned=device.type == "cuda", is_real=device.type != "meta")


def _take(slabs: HostSlabs, num_bytes: int) -> Tensor | None:
    try:
        return slabs.take(num_bytes)
    except RuntimeError as error:
        kind = "pinned host memory" if slabs.is_pinned else "host memory"
        raise UserError(
            f"{num_bytes >> 20} MiB more of {kind} cannot be allocated in addition to {slabs.num_bytes >> 20} MiB "
            f"of offloaded activations ({str(error).splitlines()[0][:80]}); lower the batch size, "
            "or use checkpointing full"
        ) from None


class Copies:
    """Copies between a device and the host, in order, on a side stream if the device has streams."""

    def __init__(self, device: torch.device):
        self._streams = streams_for(device, COPY)

    def copy(self, to: Tensor, source: Tensor) -> object:
        """Enqueue a copy behind compute's work so far; return the event to `wait` for, None without streams."""
        self._streams.wait(COPY, self._streams.record(COMPUTE))
        with self._streams.on(COPY):
            to.copy_(source, non_blocking=True)
        return self._streams.record(COPY)

    def wait(self, event: object) -> None:
        """Make the compute stream wait for a copy."""
        self._streams.wait(COMPUTE, event)


class _HostCopy:
    """A storage's copy in host memory, freed when no saved tensor refers to it any more.

    source: weak reference to the storage. on_device: the whole storage as one flat tensor, None while it is only in
    host memory.
    """

    def __init__(self, x: Tensor, slabs: HostSlabs, copies: Copies):
        storage = x.untyped_storage()
        self.source = weakref.ref(storage)
        self.device, self.dtype, self.numel = x.device, x.dtype, storage.nbytes() // x.element_size()
        self.slabs, self.copies, self.event = slabs, copies, None
        self.on_device: Tensor | None = x.detach().as_strided((self.numel,), (1,), 0)
        host = _take(slabs, storage.nbytes())
        self.host = None if host is None else host.view(self.dtype)
        if self.host is not None:
            self.event = copies.copy(self.host, self.on_device)

    def wait_for_copy(self) -> None:
        """Make the compute stream wait for the copy in flight."""
        if self.event is not None:
            self.copies.wait(self.event)
            self.event = None

    def release(self) -> None:
        """Release the storage on the device."""
        self.wait_for_copy()
        self.on_device = None

    def fetch(self) -> None:
        """Start copying the storage back to the device, if it is not there."""
        if self.on_device is None:
            self.on_device = torch.empty(self.numel, dtype=self.dtype, device=self.device)
            if self.host is not None:
                self.event = self.copies.copy(self.on_device, self.host)

    def __del__(self):
        if hasattr(self, "host"):
            # memory that is still being copied must not be reused
            self.release()
            self.slabs.give_back()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A saved tensor as a view of a copy. order: all copies of its forward pass, as saved; index: its own in order."""

    copy: _HostCopy
    order: list[weakref.ref]
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def without_graph(x: Tensor) -> Tensor:
    # a saved output that keeps its grad_fn would form a reference cycle with it; autograd restores grad_fn itself
    return x if x.grad_fn is None else x.detach()


class Offload:
    """Keeps what a UNet's forward pass saves in host memory, while `enabled`.

    host_bytes: host memory allocated so far, pinned for a GPU; copied_bytes: what the last forward pass copied out, and
    its backward pass copies back.
    """

    def __init__(self):
        self.enabled, self.copied_bytes = True, 0
        self._device: torch.device | None = None
        self._slabs: HostSlabs | None = None
        self._known: weakref.WeakValueDictionary[int, _HostCopy] = weakref.WeakValueDictionary()
        self._in_flight: deque[weakref.ref] = deque()
        self._order: list[weakref.ref] = []
        self._weights: set[int] = set()
        self._context: torch.autograd.graph.saved_tensors_hooks | None = None

    def __deepcopy__(self, memo: dict) -> Offload:
        # a copy of a UNet offloads too, into memory of its own
        copied = Offload()
        copied.enabled = self.enabled
        return copied

    @property
    def host_bytes(self) -> int:
        return 0 if self._slabs is None else self._slabs.num_bytes

    def free(self) -> None:
        """Drop the host memory; it is freed once nothing of it is in use."""
        self._slabs, self.copied_bytes = None, 0

    def begin(self, module: nn.Module, *_) -> None:
        """Forward pre-hook: offload what is saved from here on, if gradients are enabled."""
        if not self.enabled or not torch.is_grad_enabled():
            return
        device = next(module.parameters()).device
        if self._slabs is None or self._device != device:
            self._device, self._slabs, self._copies = device, slabs_for(device), Copies(device)
        # a forward pass without a backward pass may have left copies in flight
        self._release_until(0)
        self._order, self.copied_bytes = [], 0
        self._weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self._context = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self._context.__enter__()

    def end(self, *_) -> None:
        """Forward hook, called also if the forward pass failed: stop offloading what is saved."""
        if self._context is not None:
            self._context.__exit__()
            self._context = None

    def pack(self, x: Tensor) -> Tensor | _Kept:
        storage = x.untyped_storage()
        if x.device != self._device or storage.nbytes() < MIN_BYTES or storage._cdata in self._weights:
            return without_graph(x)
        copy = self._known.get(storage._cdata)
        # the address may belong to another storage by now
        if copy is None or copy.source() is not storage:
            self._release_until(AHEAD - 1)
            copy = self._known[storage._cdata] = _HostCopy(x, self._slabs, self._copies)
            self._in_flight.append(weakref.ref(copy))
            self.copied_bytes += storage.nbytes()
        elif copy.dtype != x.dtype:
            return without_graph(x)
        self._order.append(weakref.ref(copy))
        return _Kept(copy, self._order, len(self._order) - 1, x.shape, x.stride(), x.storage_offset())

    def _release_until(self, max_in_flight: int) -> None:
        """Release storages on the device, oldest first, until at most max_in_flight copies are in flight."""
        while len(self._in_flight) > max_in_flight:
            copy = self._in_flight.popleft()()
            if copy is not None:
                copy.release()

    @staticmethod
    @torch.no_grad()
    def unpack(kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        kept.copy.fetch()
        # the backward pass needs them in the opposite order
        ahead: set[_HostCopy] = set()
        for index in range(kept.index - 1, -1, -1):
            if len(ahead) == AHEAD:
                break
            copy = kept.order[index]()
            if copy is not None and copy is not kept.copy:
                copy.fetch()
                ahead.add(copy)
        kept.copy.wait_for_copy()
        return kept.copy.on_device.as_strided(kept.size, kept.stride, kept.offset)


def offload_of(unet: nn.Module) -> Offload | None:
    """Return the Offload of a module, None if it does not offload."""
    offload = getattr(unet, "activation_offload", None)
    return offload if offload is not None and offload.enabled else None


def set_offload(unet: nn.Module, enabled: bool) -> None:
    """Turn offloading of a module's saved tensors on or off."""
    offload = getattr(unet, "activation_offload", None)
    if offload is None:
        if not enabled:
            return
        offload = unet.activation_offload = Offload()
        unet.register_forward_pre_hook(offload.begin)
        unet.register_forward_hook(offload.end, always_call=True)
    offload.enabled = enabled
    if not enabled:
        offload.free()
