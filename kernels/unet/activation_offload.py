"""What a forward pass saves for the backward pass, in host memory: copied out as it is saved, fetched back ahead of its use.

Hooks on saved tensors (Offload) turn every storage of some size that autograd saves, and every input that
torch.utils.checkpoint keeps, into a copy in pinned memory. Weights stay, and so does what a caller holds elsewhere: skip
connections live on the device until the block that reads them. A storage is copied once, however many views of it are
saved, and comes back as one storage with the same strides: the backward pass runs the same arithmetic.

Streams. Copies run on one side stream, both ways, in the order they were asked for; each begins when the device has
reached the point where it was asked for. A source is held until the compute stream has been told to wait for its copy,
AHEAD storages later; so memory is given back in the compute stream's own order, the peak does not depend on how far the
host has run ahead (as it does with Tensor.record_stream), and a device that is faster than the bus waits for it. The
destination of a fetch is allocated in the compute stream, which waits for the copy before its first use and before it is
freed. Host memory needs no events: whoever writes it again does so on the side stream. The host waits for nothing.
On the CPU the copies are plain ones; on meta tensors there are none, and host memory is only counted.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safelight.errors import UserError

MIN_BYTES = 32 << 10  # smaller storages stay: a copy's launch costs more than they take
AHEAD = 4  # storages under way to the host, or fetched before they are asked for: about two blocks
ALIGNMENT = 512
SLAB_BYTES = 64 << 20


class HostMemory:
    """Host memory for one forward pass at a time, pinned beside a GPU.

    Slabs are filled from their start; once nothing of them is in use they are filled from the start again. So it grows to
    the largest pass met and no further. torch's pinned allocator rounds up to powers of two: slabs are powers of two, and
    what is left of one serves later requests, so that the rounding costs at most part of the last slab.
    num_bytes: of all slabs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.num_bytes = self._num_in_use = 0
        # (size, memory) of each, and how far each is filled
        self._slabs: list[tuple[int, Tensor | None]] = []
        self._filled: list[int] = []

    def take(self, num_bytes: int) -> Tensor | None:
        """Return memory, (num_bytes,) uint8; None for meta tensors. Raises UserError where the host gives no more."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        index = next((i for i, slab in enumerate(self._slabs) if self._filled[i] + size <= slab[0]), len(self._slabs))
        if index == len(self._slabs):
            self._add(max(SLAB_BYTES, 1 << (size - 1).bit_length()))
        start = self._filled[index]
        self._filled[index] += size
        self._num_in_use += 1
        memory = self._slabs[index][1]
        return None if memory is None else memory[start : start + num_bytes]

    def give_back(self) -> None:
        """Count one piece as free."""
        self._num_in_use -= 1
        if self._num_in_use == 0:
            self._filled = [0] * len(self._slabs)

    def _add(self, size: int) -> None:
        memory = None
        if self.device.type != "meta":
            is_pinned = self.device.type == "cuda"
            try:
                memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
            except RuntimeError as error:
                kind = "pinned host memory" if is_pinned else "host memory"
                raise UserError(
                    f"{size >> 20} MiB more of {kind} are not to be had beside {self.num_bytes >> 20} MiB of offloaded "
                    f"activations ({str(error).splitlines()[0][:80]}); lower the batch size, or use checkpointing full"
                ) from None
        self._slabs.append((size, memory))
        self._filled.append(0)
        self.num_bytes += size


class InlineCopies:
    """Copies that are done when they are asked for, or, of meta tensors, need no doing."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def wait(self, event: None) -> None:
        pass


class StreamCopies:
    """Copies on a side stream of a GPU; `copy` returns what the compute stream has to `wait` for."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


class _HostCopy:
    """A storage's copy in host memory; given back when nothing saved refers to it any more.

    source: the storage, weakly. on_device: all of it as one flat tensor, before it has left and once it is fetched.
    """

    def __init__(self, x: Tensor, memory: HostMemory, copies: InlineCopies | StreamCopies):
        storage = x.untyped_storage()
        self.source = weakref.ref(storage)
        self.device, self.dtype, self.numel = x.device, x.dtype, storage.nbytes() // x.element_size()
        self.memory, self.copies, self.event = memory, copies, None
        self.on_device: Tensor | None = x.detach().as_strided((self.numel,), (1,), 0)
        host = memory.take(storage.nbytes())
        self.host = None if host is None else host.view(self.dtype)
        if self.host is not None:
            self.event = copies.copy(self.host, self.on_device)

    def settle(self) -> None:
        """Let the compute stream wait for the copy under way."""
        if self.event is not None:
            self.copies.wait(self.event)
            self.event = None

    def leave(self) -> None:
        """Let go of the storage on the device."""
        self.settle()
        self.on_device = None

    def fetch(self) -> None:
        """Ask for the storage back on the device, if it is not there."""
        if self.on_device is None:
            self.on_device = torch.empty(self.numel, dtype=self.dtype, device=self.device)
            if self.host is not None:
                self.event = self.copies.copy(self.on_device, self.host)

    def __del__(self):
        if hasattr(self, "host"):
            # memory under a copy must not be given out again
            self.leave()
            self.memory.give_back()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A saved tensor: a view of a copy. order: the copies of its pass as they were saved; place: its own among them."""

    copy: _HostCopy
    order: list[weakref.ref]
    place: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _without_graph(x: Tensor) -> Tensor:
    # an operator's saved output would hold the operator that holds it; autograd knows the graph without
    return x if x.grad_fn is None else x.detach()


class Offload:
    """Keeps what a UNet's forward pass saves in host memory, while `enabled`.

    host_bytes: of host memory it has taken, pinned beside a GPU; copied_bytes: what the last forward pass copied out, and
    its backward pass back in. make_copies: how copies run on a device, for tests.
    """

    def __init__(self, make_copies: Callable[[torch.device], InlineCopies | StreamCopies] | None = None):
        self.enabled, self.copied_bytes = True, 0
        self._make_copies = make_copies or (lambda d: StreamCopies(d) if d.type == "cuda" else InlineCopies())
        self._memory: HostMemory | None = None
        self._known: weakref.WeakValueDictionary[int, _HostCopy] = weakref.WeakValueDictionary()
        self._leaving: deque[weakref.ref] = deque()
        self._order: list[weakref.ref] = []
        self._staying: set[int] = set()
        self._context: torch.autograd.graph.saved_tensors_hooks | None = None

    def __deepcopy__(self, memo: dict) -> Offload:
        # a copied UNet offloads too, into memory of its own
        copied = Offload(self._make_copies)
        copied.enabled = self.enabled
        return copied

    @property
    def host_bytes(self) -> int:
        return 0 if self._memory is None else self._memory.num_bytes

    def free(self) -> None:
        """Give the host memory back, once nothing of it is in use."""
        self._memory, self.copied_bytes = None, 0

    def begin(self, module: nn.Module, *_) -> None:
        """Before a forward pass: from here on saved tensors are kept in host memory, where there will be a backward pass."""
        if not self.enabled or not torch.is_grad_enabled():
            return
        device = next(module.parameters()).device
        if self._memory is None or self._memory.device != device:
            self._memory, self._copies = HostMemory(device), self._make_copies(device)
        # a pass without its backward pass may have left some under way
        self._let_go(0)
        self._order, self.copied_bytes = [], 0
        self._staying = {p.untyped_storage()._cdata for p in module.parameters()}
        self._context = torch.autograd.graph.saved_tensors_hooks(self._keep, self._back)
        self._context.__enter__()

    def end(self, *_) -> None:
        """After a forward pass, whether it ended or failed."""
        if self._context is not None:
            self._context.__exit__()
            self._context = None

    def _keep(self, x: Tensor) -> Tensor | _Kept:
        storage = x.untyped_storage()
        if x.device != self._memory.device or storage.nbytes() < MIN_BYTES or storage._cdata in self._staying:
            return _without_graph(x)
        copy = self._known.get(storage._cdata)
        # an address may be another storage's by now
        if copy is None or copy.source() is not storage:
            self._let_go(AHEAD - 1)
            copy = self._known[storage._cdata] = _HostCopy(x, self._memory, self._copies)
            self._leaving.append(weakref.ref(copy))
            self.copied_bytes += storage.nbytes()
        elif copy.dtype != x.dtype:
            return _without_graph(x)
        self._order.append(weakref.ref(copy))
        return _Kept(copy, self._order, len(self._order) - 1, x.shape, x.stride(), x.storage_offset())

    def _let_go(self, most: int) -> None:
        """Let storages leave the device until at most so many are under way."""
        while len(self._leaving) > most:
            copy = self._leaving.popleft()()
            if copy is not None:
                copy.leave()

    @staticmethod
    @torch.no_grad()
    def _back(kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        kept.copy.fetch()
        # the backward pass asks in the opposite order
        ahead: set[_HostCopy] = set()
        for place in range(kept.place - 1, -1, -1):
            if len(ahead) == AHEAD:
                break
            copy = kept.order[place]()
            if copy is not None and copy is not kept.copy:
                copy.fetch()
                ahead.add(copy)
        kept.copy.settle()
        return kept.copy.on_device.as_strided(kept.size, kept.stride, kept.offset)


def offload_of(unet: nn.Module) -> Offload | None:
    """Return what offloads a module's saved tensors, None if nothing does."""
    offload = getattr(unet, "activation_offload", None)
    return offload if offload is not None and offload.enabled else None


def set_offload(unet: nn.Module, wanted: bool) -> None:
    """Let a module's forward pass keep what it saves in host memory, or no longer."""
    offload = getattr(unet, "activation_offload", None)
    if offload is None:
        if not wanted:
            return
        offload = unet.activation_offload = Offload()
        unet.register_forward_pre_hook(offload.begin)
        unet.register_forward_hook(offload.end, always_call=True)
    offload.enabled = wanted
    if not wanted:
        offload.free()
