"""Several projections of one input as a single matmul, while every weight remains its own Parameter.

`pack` moves Parameters next to each other in one buffer. Each is then a contiguous view into it, still with its own
name, gradient and optimizer state, and the buffer as a whole is one stacked weight, without a copy. Self-attention's q,
k and v are projected this way, and so are the keys and values of all cross-attentions and the time embeddings of all
residual blocks. The weights' gradient is one matmul too, split into views.

Anything that gives a Parameter new memory (`module.to(dtype)`, a deep copy) undoes the packing. The functions below
then raise, and `kernels.unet.patch.repack` packs again.
Letters: M rows, D input features, F output features of all projections together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from safelight.kernels.ops.layer_norm import check_layer_norm, layer_norm_bwd, layer_norm_fwd, layer_norm_recompute
from safelight.kernels.ops.norm_then_matmul import check_linear, linear_gradients
from safelight.kernels.ops.quantized_weight import QuantizedWeight, dense_rows
from safelight.kernels.reference import row_sum


@torch.no_grad()
def pack(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters that differ only in their first dimension into one shared buffer, keeping order and values."""
    buffer = torch.cat([p.detach() for p in parameters]).contiguous()
    for p, part in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
        p.data = part


@torch.no_grad()
def unpack(parameters: Sequence[nn.Parameter]) -> None:
    """Give every parameter its own memory again."""
    for p in parameters:
        p.data = p.detach().clone(memory_format=torch.contiguous_format)


def adjacent_view(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """Return torch.cat(tensors, dim) as a view of their shared memory, or None if they are not adjacent in it."""
    first = tensors[0].detach()
    if len(tensors) == 1:
        return first
    dim %= first.dim()
    storage, stride, offset = first.untyped_storage()._cdata, first.stride(), first.storage_offset()
    rest = first.shape[:dim] + first.shape[dim + 1 :]
    for x in tensors:
        if (
            x.untyped_storage()._cdata != storage
            or x.stride() != stride
            or x.storage_offset() != offset
            or x.shape[:dim] + x.shape[dim + 1 :] != rest
        ):
            return None
        offset += x.shape[dim] * stride[dim]
    total = sum(x.shape[dim] for x in tensors)
    # every outer dimension must stride over all of the tensors, or the view would overlap itself
    if any(n > 1 and stride[dim] < step < total * stride[dim] for n, step in zip(first.shape, stride, strict=True)):
        return None
    return first.as_strided((*first.shape[:dim], total, *first.shape[dim + 1 :]), stride)


def cat_or_view(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return torch.cat(tensors, dim), without a copy if they are adjacent in memory. Quantized weights become dense."""
    if isinstance(tensors[0], QuantizedWeight):
        return dense_rows(tensors)
    view = adjacent_view(tensors, dim)
    return torch.cat(list(tensors), dim) if view is None else view


def packed_view(parameters: Sequence[Tensor]) -> Tensor:
    """Return packed parameters as one tensor, a view, or dense if they are quantized.

    Raises ValueError if they are not packed any more.
    """
    if isinstance(parameters[0], QuantizedWeight):
        return dense_rows(parameters)
    view = adjacent_view(parameters, 0)
    if view is None:
        raise ValueError(
            f"{len(parameters)} packed weights, the first {tuple(parameters[0].shape)}, no longer share their memory: "
            "something moved them (module.to, a deep copy); call safelight.kernels.unet.patch.repack afterwards"
        )
    return view


def packed_weight_gradients(
    dy: Tensor, x: Tensor, sizes: Sequence[int], needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Return dweight of each packed projection, None where it is not needed. sizes: of dy, along its last dimension."""
    rows_x = x.reshape(-1, x.shape[-1])
    if all(needed):
        return (dy.reshape(-1, dy.shape[-1]).t() @ rows_x).split(sizes)
    parts = dy.split(sizes, -1)
    return [
        dpart.reshape(-1, size).t() @ rows_x if is_needed else None
        for dpart, size, is_needed in zip(parts, sizes, needed, strict=True)
    ]


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_weights, contiguous, *parameters):
        weights, biases = parameters[:num_weights], parameters[num_weights:]
        bias = None
        for start in range(0, len(biases), num_weights):
            part = packed_view(biases[start : start + num_weights])
            bias = part if bias is None else bias + part
        y = F.linear(x, packed_view(weights), bias)
        ctx.save_for_backward(x, *weights)
        ctx.num_weights, ctx.num_biases = num_weights, len(biases)
        sizes = [len(w) for w in weights]
        # slices of a single row are contiguous anyway
        if contiguous and y.numel() > y.shape[-1]:
            return tuple(torch.split_with_sizes_copy(y, sizes, -1))
        return y.split(sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        sizes = [len(w) for w in weights]
        dy = cat_or_view(grads, -1)
        rows_dy = dy.reshape(-1, sum(sizes))
        # dx = dy W;  dW = dy^T x;  db = sum over rows of dy
        # saved-tensor hooks (offloading) may have copied the weights, so they need not be adjacent here
        dx = (rows_dy @ cat_or_view(weights, 0)).view(x.shape) if ctx.needs_input_grad[0] else None
        dweights = packed_weight_gradients(dy, x, sizes, ctx.needs_input_grad[3 : 3 + ctx.num_weights])
        dbiases: list[Tensor | None] = []
        if any(ctx.needs_input_grad[3 + ctx.num_weights :]):
            dbias = rows_dy.sum(dim=0)
            for start in range(0, ctx.num_biases, ctx.num_weights):
                # a clone: autograd may make each of them a parameter's .grad, so they must not share memory
                dbiases += (dbias.clone() if start else dbias).split(sizes)
        else:
            dbiases = [None] * ctx.num_biases
        return dx, None, None, *dweights, *dbiases


def packed_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, contiguous: bool = False
) -> tuple[Tensor, ...]:
    """Return linear(x, weight, bias) for every weight, as one matmul. Saves x; computes its gradient only if needed.

    x: (..., D) -> (..., F_i) each, same dtype: views of one tensor, or with contiguous=True copies. weights: (F_i, D)
    each, packed. biases: none, or one or more rounds of one bias per weight, (F_i,) each; each round is packed, and all
    are added.
    Raises ValueError for parameters that are not packed or do not fit.
    """
    if any(w.dim() != 2 or w.shape[1] != x.shape[-1] for w in weights):
        raise ValueError(f"projections of {[tuple(w.shape) for w in weights]} do not fit x of {tuple(x.shape)}")
    if len(biases) % len(weights) or any(len(b) != len(weights[i % len(weights)]) for i, b in enumerate(biases)):
        raise ValueError(f"{len(biases)} biases do not fit {len(weights)} weights")
    return _PackedLinear.apply(x, len(weights), contiguous, *weights, *biases)


class _NormPackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, input_bias, eps, *weights):
        _, h, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, None, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, *weights)
        ctx.eps, ctx.has_input_bias = eps, input_bias is not None
        ctx.set_materialize_grads(False)
        return x, *F.linear(h, packed_view(weights)).split([len(w) for w in weights], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, *grads):
        if all(g is None for g in grads):
            return ds, None, None, row_sum(ds) if ctx.has_input_bias else None, *[None] * (1 + len(grads))
        x, norm_weight, norm_bias, mean, rstd, *weights = ctx.saved_tensors
        norm = (x, norm_weight, norm_bias, mean, rstd)
        sizes = [len(w) for w in weights]
        grads = [x.new_zeros(*x.shape[:-1], n) if g is None else g for g, n in zip(grads, sizes, strict=True)]
        needed = ctx.needs_input_grad[5:]
        h = layer_norm_recompute(*norm, ctx.eps) if any(needed) else None
        dy = cat_or_view(grads, -1)
        dh, _, _ = linear_gradients(dy, None, cat_or_view(weights, 0), has_bias=False)
        dweights = [None] * len(sizes) if h is None else packed_weight_gradients(dy, h, sizes, needed)
        del h, dy
        dx, dnorm_weight, dnorm_bias, *sums = layer_norm_bwd(dh, ds, *norm, ctx.eps, sum_dx=ctx.has_input_bias)
        return dx, dnorm_weight, dnorm_bias, sums[0] if sums else None, None, *dweights


def norm_packed_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    *,
    input_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """Return x and linear(layer_norm(x), weight) for every weight, as one matmul. Saves x and fp32 statistics.

    x: (..., D), fp32 | fp16 | bf16 -> (..., F_i) each, same dtype, views of one tensor. Use the returned x wherever
    else x is
    used: its gradient is then added inside the norm's backward kernel. weights: (F_i, D) each, packed. input_bias:
    (D,), a bias contained in x whose gradient is computed here, see kernels/ops/norm_then_matmul.py.
    Raises ValueError for parameters that are not packed or do not fit.
    """
    check_layer_norm(x, norm_weight, None)
    for weight in weights:
        check_linear(x, weight)
    return _NormPackedLinear.apply(x.contiguous(), norm_weight, norm_bias, input_bias, eps, *weights)
