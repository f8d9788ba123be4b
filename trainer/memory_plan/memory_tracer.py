"""Which memory a training step holds and when, from the real step on meta tensors: shapes without memory.

A dispatch mode sees every operator. Each new storage is counted when an operator returns it and discounted when its last
reference is gone, as torch's allocators do. Not seen: what an operator allocates and frees within itself (workspace of
cuDNN and cuBLAS), which trainer/memory_plan/gpus.py has constants for, and attention's backward scratch, which is known (below).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from safelight.kernels.triton.jit import Launch, LaunchMode
from safelight.trainer.memory_plan.allocation_trace import (
    ACTIVATIONS,
    GRADIENTS,
    KINDS,
    TEMPORARY,
    AllocationTrace,
    Peak,
    Work,
)

# of torch's CUDA caching allocator: kMinBlockSize in c10/core/CachingDeviceAllocator.h
CUDA_ROUNDING = 512
_CONVOLUTIONS = ("convolution", "convolution_backward", "native_group_norm")


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _as_the_library_lays_it(func, args: tuple, outputs):
    """Return a meta operator's outputs as cuDNN and oneDNN lay them: channels-last where image or weight is.

    Source: cudnn_conv_suggest_memory_format and mkldnn_conv_use_channels_last, ATen/native/ConvUtils.h.
    """
    name = func._overloadpacket.__name__
    if name not in _CONVOLUTIONS or not any(isinstance(x, Tensor) and _channels_last(x) for x in args[:3]):
        return outputs

    def laid(x):
        is_image = isinstance(x, Tensor) and x.dim() == 4 and not _channels_last(x)
        return torch.empty_like(x, memory_format=torch.channels_last) if is_image else x

    return tuple(map(laid, outputs)) if isinstance(outputs, tuple) else laid(outputs)


def _attention_scratch(name: str, args: tuple) -> int:
    """Return the bytes that flash attention's backward allocates within itself: dq in fp32 and a number a row.

    Source: mha_bwd in ATen/native/transformers/cuda/flash_attn/flash_api.cpp (rows to 128, head dim to 32).
    """
    if name not in ("_scaled_dot_product_flash_attention_backward", "_flash_attention_backward"):
        return 0
    batch, heads, rows, dim = args[1].shape if name.startswith("_scaled") else (args[1].transpose(1, 2).shape)
    return 4 * batch * heads * -(-rows // 128) * 128 * (-(-dim // 32) * 32 + 1)


class LiveBytes(LaunchMode):
    """Follows the bytes alive on the meta device while it is entered.

    rounding: of every allocation, in bytes. kind: what new storages count as. phase: what a peak is said to be during;
    forward and backward are told apart by themselves where it is "step".
    """

    def __init__(self, rounding: int = CUDA_ROUNDING):
        super().__init__()
        self.rounding, self.kind, self.phase = rounding, None, "step"
        self.live = dict.fromkeys(KINDS, 0)
        self.peak, self.work = Peak(), Work()
        self.allocations = AllocationTrace()
        self._known: dict[int, list] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return self._total

    def reset_peak(self) -> None:
        """Begin a new peak and a new trace of allocations, and count work anew, from what is alive now."""
        self.work, self.peak, self.allocations = Work(), Peak(), AllocationTrace()
        for entry in self._known.values():
            self.allocations.appear(entry)
        self._note(0)

    def hold(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Count tensors that are there already, or count them as another kind from now on."""
        for x in tensors:
            if x is not None and x.is_meta:
                self._take(x, kind)

    def settle(self, kind: str) -> None:
        """Count all that a step has left behind as of one kind."""
        for entry in self._known.values():
            if entry[1] in (GRADIENTS, ACTIVATIONS, TEMPORARY):
                self._turn(entry, kind)

    def _turn(self, entry: list, kind: str) -> None:
        """Count a storage as another kind."""
        size, before = self._rounded(entry[0]), entry[1]
        self.live[before] -= size
        self.live[kind] += size
        entry[1] = kind
        self.allocations.change(entry, before)

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self.rounding) * self.rounding

    def _take(self, x: Tensor, kind: str) -> None:
        storage = x.untyped_storage()
        entry = self._known.get(storage._cdata)
        if entry is not None:
            if entry[1] != kind:
                self._turn(entry, kind)
            return
        # bytes, kind, place in the trace of allocations
        entry = self._known[storage._cdata] = [storage.nbytes(), kind, -1]
        weakref.finalize(storage, self._free, storage._cdata).atexit = False
        size = self._rounded(entry[0])
        self.live[kind] += size
        self._total += size
        self.allocations.appear(entry, self._during())
        self._note(0)

    def _free(self, address: int) -> None:
        entry = self._known.pop(address)
        size = self._rounded(entry[0])
        self.live[entry[1]] -= size
        self._total -= size
        self.allocations.vanish(entry)

    def _during(self) -> str:
        if self.phase != "step":
            return self.phase
        return "backward" if _is_in_backward() else "forward"

    def _note(self, scratch: int) -> None:
        if self._total + scratch > self.peak.total:
            self.peak = Peak(self._total + scratch, self._during(), dict(self.live))
            self.peak.kinds[TEMPORARY] += scratch

    def _launched(self, launch: Launch) -> None:
        self.work.launches += 1
        self.work.bytes_moved += sum(x.numel() * x.element_size() for x in launch.tensors())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            # the host asks whether a norm is finite: it is
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            # what the references of kernels read on the host: keys of draws, which tensors to skip (none)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        outputs = _as_the_library_lays_it(func, args, func(*args, **kwargs))
        found = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_meta]
        kind = self.kind or (TEMPORARY if _is_in_backward() else ACTIVATIONS)
        is_new = False
        for x in found:
            if x.untyped_storage()._cdata not in self._known:
                self._take(x, kind)
                is_new = True
        if scratch := _attention_scratch(name, args):
            # alive for a moment, as it is: no block of the allocator's
            self._note(scratch)
            self.allocations.flash(scratch, self._during())
        self._count(func, args, kwargs, outputs, found, is_new)
        return outputs

    def _count(self, func, args, kwargs, outputs, found: list[Tensor], is_new: bool) -> None:
        writes = func._schema.is_mutable
        if (not found and not writes) or not (is_new or writes) or func._overloadpacket.__name__.startswith("empty"):
            return
        self.work.launches += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.work.flops += formula(*args, **kwargs, out_val=outputs)
            return
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_meta]
        self.work.bytes_moved += sum(x.numel() * x.element_size() for x in (*inputs, *found))


@contextlib.contextmanager
def gradients_told(live: LiveBytes, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Count the gradients that parameters get as such within the block."""
    handles = [p.register_post_accumulate_grad_hook(lambda p: live.hold([p.grad], GRADIENTS)) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
