"""Track the memory of a real training step that runs on meta tensors, which have shapes but no storage.

A dispatch mode sees every operator. It counts each new storage when an operator returns it and subtracts it when the
last reference is dropped, as torch's allocators do. It cannot see buffers that an operator allocates and frees
internally: gpus.py has constants for the workspaces of cuDNN and cuBLAS, and the scratch of attention's backward is
computed below.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from safelight.kernels.ops.quantized_weight import held_tensors
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
from safelight.trainer.memory_plan.operator_results import OperatorResults, meta_tensors

# torch's CUDA caching allocator rounds sizes up to this: kMinBlockSize in c10/core/CachingDeviceAllocator.h
CUDA_ROUNDING = 512
# shared by all traces of a process
_RESULTS = OperatorResults()
_CONVOLUTIONS = ("convolution", "convolution_backward", "native_group_norm")


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _with_library_layout(func, args: tuple, outputs):
    """Return a meta operator's outputs in the layout of cuDNN and oneDNN: channels-last if the image or the weight is.

    Source: cudnn_conv_suggest_memory_format and mkldnn_conv_use_channels_last, ATen/native/ConvUtils.h.
    """
    name = func._overloadpacket.__name__
    if name not in _CONVOLUTIONS or not any(isinstance(x, Tensor) and _channels_last(x) for x in args[:3]):
        return outputs

    def to_channels_last(x):
        is_image = isinstance(x, Tensor) and x.dim() == 4 and not _channels_last(x)
        return torch.empty_like(x, memory_format=torch.channels_last) if is_image else x

    return tuple(map(to_channels_last, outputs)) if isinstance(outputs, tuple) else to_channels_last(outputs)


def _attention_scratch(name: str, args: tuple) -> int:
    """Return the bytes that flash attention's backward allocates internally: dq in fp32 and one fp32 value a row.

    Source: mha_bwd in ATen/native/transformers/cuda/flash_attn/flash_api.cpp. It pads rows to a multiple of 128 and the
    head dimension to a multiple of 32.
    """
    if name not in ("_scaled_dot_product_flash_attention_backward", "_flash_attention_backward"):
        return 0
    batch, heads, rows, dim = args[1].shape if name.startswith("_scaled") else (args[1].transpose(1, 2).shape)
    return 4 * batch * heads * -(-rows // 128) * 128 * (-(-dim // 32) * 32 + 1)


class LiveBytes(LaunchMode):
    """Dispatch mode that tracks the live bytes on the meta device, now and at the peak.

    rounding: allocations are rounded up to a multiple of this many bytes. kind: the kind that new storages get; None:
    activations in forward, temporaries in backward. phase: the name recorded with a peak; "step" is recorded as
    forward or backward, whichever is running.
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
        """Restart the peak, the allocation trace and the work counters from the storages alive now."""
        self.work, self.peak, self.allocations = Work(), Peak(), AllocationTrace()
        for entry in self._known.values():
            self.allocations.allocate(entry)
        self._update_peak(0)

    def hold(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Count existing tensors as a kind, whether they are already tracked or not."""
        for x in tensors:
            if x is not None and x.is_meta:
                for held in held_tensors(x):
                    self._track(held, kind)

    def reclassify_leftovers(self, kind: str) -> None:
        """Count every gradient, activation and temporary that is still alive as `kind`."""
        for entry in self._known.values():
            if entry[1] in (GRADIENTS, ACTIVATIONS, TEMPORARY):
                self._reclassify(entry, kind)

    def _reclassify(self, entry: list, kind: str) -> None:
        size, before = self._rounded(entry[0]), entry[1]
        self.live[before] -= size
        self.live[kind] += size
        entry[1] = kind
        self.allocations.reclassify(entry, before)

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self.rounding) * self.rounding

    def _track(self, x: Tensor, kind: str) -> None:
        storage = x.untyped_storage()
        entry = self._known.get(storage._cdata)
        if entry is not None:
            if entry[1] != kind:
                self._reclassify(entry, kind)
            return
        # bytes, kind, index in the allocation trace
        entry = self._known[storage._cdata] = [storage.nbytes(), kind, -1]
        weakref.finalize(storage, self._free, storage._cdata).atexit = False
        size = self._rounded(entry[0])
        self.live[kind] += size
        self._total += size
        self.allocations.allocate(entry, self._during())
        self._update_peak(0)

    def _free(self, address: int) -> None:
        entry = self._known.pop(address)
        size = self._rounded(entry[0])
        self.live[entry[1]] -= size
        self._total -= size
        self.allocations.free(entry)

    def _during(self) -> str:
        if self.phase != "step":
            return self.phase
        return "backward" if _is_in_backward() else "forward"

    def _update_peak(self, scratch: int) -> None:
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
            # .item(): the host checks whether a norm is finite; answer that it is
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            # the kernels' reference implementations read random keys and skip flags on the host; zeros skip nothing
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if torch._C._len_torch_dispatch_stack():
            # another mode counts operators, and must see each call
            outputs = _with_library_layout(func, args, func(*args, **kwargs))
        else:
            outputs = _RESULTS.call(func, args, kwargs, _with_library_layout)
        results = list(meta_tensors((outputs,)))
        kind = self.kind or (TEMPORARY if _is_in_backward() else ACTIVATIONS)
        is_new = False
        for x in results:
            if x.untyped_storage()._cdata not in self._known:
                self._track(x, kind)
                is_new = True
        if scratch := _attention_scratch(name, args):
            # not rounded: it is part of one operator
            self._update_peak(scratch)
            self.allocations.scratch(scratch, self._during())
        self._count(func, args, kwargs, outputs, results, is_new)
        return outputs

    def _count(self, func, args, kwargs, outputs, results: list[Tensor], is_new: bool) -> None:
        writes = func._schema.is_mutable
        if (not results and not writes) or not (is_new or writes) or func._overloadpacket.__name__.startswith("empty"):
            return
        self.work.launches += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.work.flops += formula(*args, **kwargs, out_val=outputs)
            return
        inputs = meta_tensors((*args, *kwargs.values()))
        self.work.bytes_moved += sum(x.numel() * x.element_size() for x in (*inputs, *results))


@contextlib.contextmanager
def count_gradients(live: LiveBytes, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager: count what accumulates in `.grad` of the parameters as gradients."""
    handles = [p.register_post_accumulate_grad_hook(lambda p: live.hold([p.grad], GRADIENTS)) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
