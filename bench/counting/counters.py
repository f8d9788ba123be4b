"""Count what a training step does: operators, kernel launches, bytes, FLOPs, host-device synchronizations.

Unlike times, counts are exactly reproducible. A dispatch mode sees every operator of a step, on meta tensors (shapes
without memory) or real ones. On meta tensors, attention is replaced by the fused operator that a GPU would run, and
saves the same tensors for backward; torch's own meta SDPA takes the math path, which saves the whole attention matrix.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from safelight.bench.core.operators import (
    SYNC_OPERATORS,
    class_of,
    class_of_kernel,
    does_work,
    layout_factor,
    moves_memory,
    num_foreach_kernels,
    num_kernels,
)
from safelight.kernels.triton.jit import Launch, LaunchMode
from safelight.kernels.unet.attention_backends import CALLS

MIB = 2**20


@torch.library.custom_op("safelight_bench::optimizer_update", mutates_args=("p", "buffers"))
def optimizer_update(p: Tensor, grad: Tensor, buffers: list[Tensor]) -> None:
    """Stand in for bitsandbytes' kernel, one per tensor. Runs only on meta tensors, by the fake below."""
    raise NotImplementedError("optimizer_update is counted, not run")


@optimizer_update.register_fake
def _(p, grad, buffers) -> None:
    return None


class CountedUpdates:
    """Counts the kernel that bitsandbytes runs for each tensor; its `sync_gpu` then waits for the device."""

    def __init__(self):
        self.num_syncs = 0

    def __call__(self, p: Tensor, grad: Tensor, buffers: list[Tensor]) -> None:
        self.num_syncs += 1
        optimizer_update(p, grad, buffers)


@dataclass
class Row:
    """Totals of one class of operators."""

    operators: int = 0
    launches: int = 0
    bytes_moved: int = 0


@dataclass
class Counts:
    """Totals of a step.

    rows: by class. flops: by the formulas of torch's FlopCounterMode. saved_bytes: saved for backward, of which
    saved_cast_bytes are weights cast by autocast.
    """

    rows: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    by_operator: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    flops_forward: int = 0
    flops_total: int = 0
    host_syncs: int = 0
    saved_bytes: int = 0
    saved_cast_bytes: int = 0

    def total(self, name: str, with_optimizer: bool = True) -> int:
        """Return the sum of a field of Row over the classes."""
        return sum(getattr(row, name) for kind, row in self.rows.items() if with_optimizer or kind != "optimizer")


class Counter(LaunchMode):
    """Dispatch mode that counts every operator. While `phase` is "optimizer", all of them count as that class.

    On meta tensors, reading a value (`.item()`) returns 1 and counts as a synchronization. Operators on CPU tensors
    only (AdamW's step counts) are left out.
    """

    def __init__(self, layout: str = "nchw"):
        super().__init__()
        self.layout, self.phase, self.counts = layout, "step", Counts()

    def _launched(self, launch: Launch) -> None:
        """Count a launch of one of our kernels: every tensor argument is read or written once."""
        module = launch.kernel.function.__module__.rpartition(".")[2]
        kind = "optimizer" if self.phase == "optimizer" else class_of_kernel(module)
        for row in (self.counts.rows[kind], self.counts.by_operator[launch.kernel.__name__]):
            row.operators += 1
            row.launches += 1
            row.bytes_moved += sum(x.numel() * x.element_size() for x in launch.tensors())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._count_syncs(name, inputs, kwargs)
        if name == "_local_scalar_dense" and inputs[0].is_meta:
            dtype = inputs[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        outputs_tree = func(*args, **kwargs)
        # torch 2.10's meta convolution_backward ignores channels-last
        if self.layout == "channels_last" and name in ("convolution", "convolution_backward", "native_group_norm"):
            outputs_tree = _as_channels_last(outputs_tree)
        outputs = [x for x in tree_leaves(outputs_tree) if isinstance(x, Tensor)]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if does_work(name, is_view) and any(x.device.type != "cpu" for x in itertools.chain(inputs, outputs)):
            self._count(func, name, args, kwargs, inputs, outputs, outputs_tree)
        return outputs_tree

    def _count_syncs(self, name: str, inputs: list[Tensor], kwargs: dict) -> None:
        to_host = name == "_to_copy" and "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cpu"
        from_device = any(x.device.type not in ("cpu", "meta") for x in inputs)
        reads_value = name in SYNC_OPERATORS and inputs[0].device.type != "cpu"
        if reads_value or (to_host and from_device and not kwargs.get("non_blocking", False)):
            self.counts.host_syncs += 1

    def _count(self, func, name: str, args, kwargs, inputs, outputs, outputs_tree) -> None:
        kind = "optimizer" if self.phase == "optimizer" else class_of(name)
        if name.startswith(("_foreach", "_fused_adam")):
            lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
            launches = num_foreach_kernels([x.numel() for x in lists[0]], len(lists))
            # in-place: the first list is read and written
            outputs = outputs or lists[0]
        else:
            launches = num_kernels(name, self.layout, has_bias=kind != "conv" or _conv_has_bias(name, args))
            if not outputs and inputs:
                outputs = [x for x in inputs if x is args[0]]
        size = sum(x.numel() * x.element_size() for x in itertools.chain(inputs, outputs))
        factor = moves_memory(kind) + layout_factor(name, self.layout)
        for row in (self.counts.rows[kind], self.counts.by_operator[name]):
            row.operators += 1
            row.launches += launches
            row.bytes_moved += round(size * factor)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=outputs_tree)
            self.counts.flops_total += flops
            # -1 outside the backward pass
            if torch._C._current_graph_task_id() == -1:
                self.counts.flops_forward += flops


def _conv_has_bias(name: str, args: tuple) -> bool:
    """Return whether a convolution adds a bias, or its backward computes the bias gradient."""
    return args[-1][2] if name == "convolution_backward" else args[2] is not None


def _as_channels_last(outputs):
    """Return a meta operator's outputs with 4-d tensors in channels-last layout, as cuDNN returns them."""

    def convert(x):
        is_image = isinstance(x, Tensor) and x.is_meta and x.dim() == 4
        return torch.empty_like(x, memory_format=torch.channels_last) if is_image else x

    return tuple(map(convert, outputs)) if isinstance(outputs, tuple) else convert(outputs)


class CardOperators(TorchFunctionMode):
    """Function mode that makes a UNet on meta tensors run a GPU's operators: fused attention, and optionally autocast.

    autocast: dtype of torch.autocast("cuda"), which torch does not offer for meta tensors: matrix multiplications and
    convolutions run in this dtype, norms and sums in fp32, concatenations in the widest dtype, and a parameter is cast
    once per step. Source: pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast".
    """

    LOWER = (F.linear, F.conv2d, torch.matmul, Tensor.matmul, torch.bmm, torch.baddbmm, F.scaled_dot_product_attention)
    FP32 = (
        F.group_norm,
        F.layer_norm,
        F.mse_loss,
        torch.pow,
        Tensor.pow,
        Tensor.square,
        torch.exp,
        Tensor.exp,
        torch.sum,
        Tensor.sum,
        torch.softmax,
        Tensor.softmax,
    )

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        self.autocast, self.casts = autocast, {}

    def _cast(self, value, dtype: torch.dtype):
        if isinstance(value, dict):
            return {name: self._cast(x, dtype) for name, x in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._cast(x, dtype) for x in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if isinstance(value, nn.Parameter) and dtype == self.autocast:
            if value not in self.casts:
                self.casts[value] = value.to(dtype)
            return self.casts[value]
        return value.to(dtype)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.backward:
            # a mode is disabled inside the function it handles, but checkpointing recomputes the forward pass inside
            # backward; so enter the mode again and call the engine directly, below every function a mode handles
            ones = (torch.ones_like(args[0], memory_format=torch.preserve_format),)
            with self:
                return _engine_run_backward(
                    args[:1], ones, False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if self.autocast is not None:
            if func in self.LOWER:
                args, kwargs = self._cast(args, self.autocast), self._cast(kwargs, self.autocast)
            elif func in self.FP32:
                args, kwargs = self._cast(args, torch.float32), self._cast(kwargs, torch.float32)
            elif func is torch.cat:
                widest = max((x.dtype for x in args[0]), key=lambda dtype: dtype.itemsize)
                args = (self._cast(args[0], widest), *args[1:])
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _card_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _card_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> Tensor:
    if attn_mask is not None or dropout_p or is_causal:
        raise ValueError("attention with a mask or dropout cannot be counted; the UNets in training have neither")
    # flash attention does not support fp32
    call = CALLS["flash" if query.dtype.itemsize == 2 else "efficient"]
    return call(*(x.transpose(1, 2) for x in (query, key, value)), None).transpose(1, 2)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes of storages that autograd saves for backward, each once, without those of `parameters`."""

    def __init__(self, parameters):
        self._own = {p.untyped_storage()._cdata for p in parameters}
        # keep the storages alive, so that no address is reused
        self._storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage
        return x

    def of(self, tensors) -> int:
        """Return the saved bytes that belong to these tensors' storages."""
        return sum(s.nbytes() for k, s in self._storages.items() if k in {x.untyped_storage()._cdata for x in tensors})

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())
