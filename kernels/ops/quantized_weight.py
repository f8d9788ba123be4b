"""Frozen weights in 8 or 4 bits, held by bitsandbytes' blockwise formats and dequantized wherever they are used.

    8bit    int8 codes, one fp32 scale for 256 values: 1.02 bytes a value
    nf4     4-bit NormalFloat codes, one scale for 64 values, itself in 8 bits: 0.52 bytes a value
            Dettmers et al. 2023, arXiv:2305.14314 (with double quantization)

A QuantizedWeight is a Parameter in the place of the dense one: it has its shape, its memory order and the dtype that it
is computed in. An operator that gets one dequantizes it first, and what autograd saves for the backward pass is the
quantized weight, so that a dense one exists for the time of one product. It has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from safelight.kernels.triton.jit import cdiv

INT8_BLOCK, NF4_BLOCK, SCALE_BLOCK = 256, 64, 256
# the largest code of the symmetric 8-bit format
MAX_INT8 = 127
FORMATS = ("8bit", "nf4")
# smaller weights stay dense: they take nothing, and every product would dequantize them
MIN_ELEMENTS = 4096
# device bytes for each value of the weight that is being quantized: its fp32 source, and a temporary as large
QUANTIZING_BYTES = 8

_METADATA = (
    Tensor.__len__,
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.numel,
    Tensor.size,
    Tensor.storage_offset,
    Tensor.stride,
    Tensor.untyped_storage,
)


class QuantizedWeight(Tensor):
    """A frozen weight in 8 or 4 bits; see the module's docstring. Make one by `quantize`.

    format: of FORMATS. parts: what is held, by name, on the weight's device.
    """

    format: str
    parts: dict[str, Tensor]
    # what makes isinstance(x, nn.Parameter) true
    _is_param = True

    @staticmethod
    def __new__(cls, like: Tensor, dtype: torch.dtype, format: str, parts: dict[str, Tensor]):
        device = next(iter(parts.values())).device
        self = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype, device=device, requires_grad=False
        )
        self.format, self.parts = format, parts
        return self

    def __init__(self, like: Tensor, dtype: torch.dtype, format: str, parts: dict[str, Tensor]):
        super().__init__()

    def __repr__(self, **_) -> str:
        return f"QuantizedWeight({tuple(self.shape)}, {self.format}, {self.dtype}, {self.device})"

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """Return the dense weight in its dtype and memory order. out: flat memory to write it to."""
        flat = _dequantized(self.format, self.parts, self.numel(), self.dtype, out)
        return flat.as_strided(self.shape, self.stride())

    def new_dense(self, num: int) -> Tensor:
        """Return uninitialized flat memory for `num` values in the weight's dtype, on its device."""
        return torch.empty(num, dtype=self.dtype, device=self.device)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if handler := _HANDLERS.get(func):
            return handler(*args, **kwargs)
        if func in _METADATA or func in _properties():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_dense(args), **_dense(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        return func(*_dense(args), **_dense(kwargs or {}))


def _dense(values: Any) -> Any:
    return tree_map(lambda x: x.dequantize() if isinstance(x, QuantizedWeight) else x, values)


@functools.cache
def _properties() -> frozenset:
    """Return the getters that tell about a tensor and read no value of it."""
    names = ("device", "dtype", "grad", "grad_fn", "is_cuda", "is_leaf", "is_meta", "itemsize", "layout", "nbytes")
    return frozenset(getattr(Tensor, name).__get__ for name in (*names, "ndim", "requires_grad", "shape"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        # not saved as a tensor: hooks on saved tensors, which offload activations, have nothing to do with it
        ctx.weight = weight
        return F.linear(x, weight.dequantize(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows_dy = dy.reshape(-1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = dy W
            dx = (rows_dy @ ctx.weight.dequantize()).view(*dy.shape[:-1], -1)
        return dx, None, rows_dy.sum(dim=0) if ctx.needs_input_grad[2] else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, QuantizedWeight) or not isinstance(weight, QuantizedWeight):
        return F.linear(*_dense((input, weight, bias)))
    return _Linear.apply(input, weight, bias)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, options):
        ctx.weight, ctx.options, ctx.shape = weight, options, x.shape
        return F.conv2d(x, weight.dequantize(), bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.nn.grad.conv2d_input(ctx.shape, ctx.weight.dequantize(), dy, *ctx.options)
        return dx, None, dy.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    options = (stride, padding, dilation, groups)
    if isinstance(input, QuantizedWeight) or not isinstance(weight, QuantizedWeight):
        return F.conv2d(*_dense((input, weight, bias)), *options)
    return _Conv2d.apply(input, weight, bias, options)


def _flatten(weight: QuantizedWeight, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Return `weight.flatten`, quantized if the weight is a 1x1 convolution's that becomes a matrix."""
    if start_dim != 1 or end_dim != -1 or any(size != 1 for size in weight.shape[2:]):
        return weight.dequantize().flatten(start_dim, end_dim)
    rows, columns = weight.shape[:2]
    matrix = torch.empty_strided((rows, columns), (columns, 1), device="meta")
    return QuantizedWeight(matrix, weight.dtype, weight.format, weight.parts)


def _to(weight: QuantizedWeight, *args, **kwargs) -> Tensor:
    """Return what `weight.to(...)` is: itself, quantized on another device, or dense in another dtype."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is not None and dtype != weight.dtype:
        return weight.dequantize().to(*args, **kwargs)
    if device is None or device == weight.device:
        return weight
    parts = {name: part.to(device) for name, part in weight.parts.items()}
    return QuantizedWeight(weight, weight.dtype, weight.format, parts)


def _set_data(weight: QuantizedWeight, value: Tensor) -> None:
    if not isinstance(value, QuantizedWeight):
        raise ValueError(f"{weight!r} is frozen and quantized; a dense tensor cannot take its place")
    weight.parts = value.parts


def _requires_grad(weight: QuantizedWeight, requires_grad: bool = True) -> QuantizedWeight:
    if requires_grad:
        raise ValueError(f"{weight!r} is quantized and cannot be trained")
    return weight


_HANDLERS = {
    F.linear: _linear,
    F.conv2d: _conv2d,
    Tensor.flatten: _flatten,
    Tensor.to: _to,
    Tensor.detach: lambda weight: weight,
    Tensor.requires_grad_: _requires_grad,
    Tensor.data.__get__: lambda weight: weight,
    Tensor.data.__set__: _set_data,
}


@functools.cache
def _code(format: str, device: torch.device) -> Tensor:
    """Return the values of 8-bit codes, ascending, (256,) float32: of weights, or of nf4's scales."""
    if format == "nf4":
        import bitsandbytes.functional

        return bitsandbytes.functional.create_dynamic_map().to(device)
    # -1 stands for the lowest code, too
    return torch.arange(256, dtype=torch.float32).sub_(128).div_(MAX_INT8).clamp_(min=-1).to(device)


def quantize(weight: Tensor, format: str, dtype: torch.dtype, device: torch.device) -> QuantizedWeight:
    """Return a weight in 8 or 4 bits on a device, to be computed with in `dtype`.

    weight: dense, fp32 for the smallest error; it moves to the device in fp32. format: of FORMATS. A convolution's
    blocks are in channels-last order, whatever its own is, so that its values are the same with and without kernels.
    Raises ValueError for another format.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; use {' or '.join(FORMATS)}")
    # registers its operators
    import bitsandbytes  # noqa: F401

    ops = torch.ops.bitsandbytes
    weight = weight.detach()
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    else:
        weight = weight.contiguous()
    # in memory order
    flat = weight.as_strided((weight.numel(),), (1,), weight.storage_offset()).to(device, torch.float32)
    if format == "8bit":
        codes, scales = ops.quantize_blockwise.default(flat, _code(format, flat.device), INT8_BLOCK)
        parts = {"codes": codes, "scales": scales}
    else:
        codes, scales = ops.quantize_4bit.default(flat, NF4_BLOCK, format, torch.uint8)
        # all scales are positive: what is quantized is their distance from the mean
        mean = scales.mean()
        scale_codes, scales = ops.quantize_blockwise.default(scales - mean, _code(format, flat.device), SCALE_BLOCK)
        parts = {"codes": codes, "scale_codes": scale_codes, "scales": scales, "mean": mean}
    return QuantizedWeight(weight, dtype, format, parts)


def _dequantized(format: str, parts: Mapping[str, Tensor], num: int, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Return `num` dense values, flat. out: where to write them."""
    ops, code = torch.ops.bitsandbytes, _code(format, parts["codes"].device)
    if format == "8bit":
        operator, arguments = ops.dequantize_blockwise, (parts["codes"], parts["scales"], code, INT8_BLOCK, dtype)
    else:
        scales = ops.dequantize_blockwise.default(
            parts["scale_codes"], parts["scales"], code, SCALE_BLOCK, torch.float32
        ).add_(parts["mean"])
        operator, arguments = ops.dequantize_4bit, (parts["codes"], scales, NF4_BLOCK, format, [num], dtype)
    if out is None:
        return operator.default(*arguments).view(num)
    if out.device.type == "cpu":
        # bitsandbytes' operators for a CPU take no `out`
        return out.copy_(operator.default(*arguments).view(num))
    if out.device.type == "meta":
        # bitsandbytes 0.50 compares a list with a torch.Size there and always fails: a fill stands for it in traces
        return out.zero_()
    operator.out(*arguments, out=out)
    return out


def quantized_bytes(num: int, format: str) -> int:
    """Return the bytes that a weight of `num` values takes in a format."""
    if format == "8bit":
        return num + 4 * cdiv(num, INT8_BLOCK)
    num_scales = cdiv(num, NF4_BLOCK)
    return cdiv(num, 2) + num_scales + 4 * cdiv(num_scales, SCALE_BLOCK) + 4


def held_tensors(x: Tensor) -> list[Tensor]:
    """Return the tensors that hold a weight: itself, or a quantized one's parts."""
    return list(x.parts.values()) if isinstance(x, QuantizedWeight) else [x]


def dense_rows(weights: Sequence[Tensor]) -> Tensor:
    """Return quantized weights (F_i, D) one below the other, dense: each is dequantized to its rows of one tensor."""
    sizes = [weight.numel() for weight in weights]
    out = weights[0].new_dense(sum(sizes))
    for weight, piece in zip(weights, out.split(sizes), strict=True):
        weight.dequantize(piece)
    return out.view(-1, weights[0].shape[1])


def quantize_layers(module: nn.Module, format: str, dtype: torch.dtype, device: torch.device) -> int:
    """Quantize the frozen weights of linear and convolution layers of a UNet's blocks. Return how many.

    The first and the last convolution and the embeddings of timestep and size stay dense: they are small, and all that
    the UNet sees or says passes through them.
    """
    num = 0
    for layer in quantizable_layers(module):
        layer.weight = quantize(layer.weight, format, dtype, device)
        num += 1
    return num


def quantizable_layers(unet: nn.Module) -> list[nn.Module]:
    """Return the layers whose weight `quantize_layers` quantizes."""
    blocks = [unet.down_blocks, unet.up_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return [layer for layer in layers if not layer.weight.requires_grad and layer.weight.numel() >= MIN_ELEMENTS]
