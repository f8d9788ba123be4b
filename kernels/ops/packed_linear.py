"""Several projections of one input as one matrix product, while every weight stays a Parameter of its own.

`pack` lays Parameters side by side in one buffer: each is then a contiguous view of it, with its own name, gradient and
optimizer state, and the whole buffer is one weight without a copy. Attention's q, k and v are projected so, the keys and
values of a step's cross-attentions, and its time embeddings. The weights' gradient is one product too, split into views.

Whatever gives a Parameter new memory (`module.to(dtype)`, a deep copy) ends that: the functions below then refuse to run.
Letters: M rows, D features in, F features out of all projections together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from safelight.kernels.ops.layer_norm import check_layer_norm, layer_norm_again, layer_norm_bwd, layer_norm_fwd
from safelight.kernels.ops.norm_then_matmul import check_linear, linear_gradients
from safelight.kernels.reference import row_sum


@torch.no_grad()
def pack(parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters, equal in all but their first dimension, one buffer in common; values and identities stay."""
    buffer = torch.cat([p.detach() for p in parameters]).contiguous()
    for p, part in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
        p.data = part


@torch.no_grad()
def unpack(parameters: Sequence[nn.Parameter]) -> None:
    """Give every parameter memory of its own again."""
    for p in parameters:
        p.data = p.detach().clone(memory_format=torch.contiguous_format)


def adjacent(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """Return torch.cat(tensors, dim) as a view of the memory they share, None where they do not lie side by side."""
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
    # a dimension around this one must step over all of them, or the view would meet itself
    if any(n > 1 and stride[dim] < step < total * stride[dim] for n, step in zip(first.shape, stride, strict=True)):
        return None
    return first.as_strided((*first.shape[:dim], total, *first.shape[dim + 1 :]), stride)


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return torch.cat(tensors, dim), without a copy where they lie side by side."""
    view = adjacent(tensors, dim)
    return torch.cat(list(tensors), dim) if view is None else view


def packed(parameters: Sequence[Tensor]) -> Tensor:
    """Return packed parameters as one tensor, a view. Raises ValueError where they are no longer side by side."""
    view = adjacent(parameters, 0)
    if view is None:
        raise ValueError(
            f"{len(parameters)} packed weights, the first {tuple(parameters[0].shape)}, no longer share their memory: "
            "something moved them (module.to, a deep copy); call kernels.patch.repack after it"
        )
    return view


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_weights, contiguous, *parameters):
        weights, biases = parameters[:num_weights], parameters[num_weights:]
        bias = None
        for start in range(0, len(biases), num_weights):
            part = packed(biases[start : start + num_weights])
            bias = part if bias is None else bias + part
        y = F.linear(x, packed(weights), bias)
        ctx.save_for_backward(x, *weights)
        ctx.num_weights, ctx.num_biases = num_weights, len(biases)
        sizes = [len(w) for w in weights]
        # the pieces of a single row are contiguous as they are
        if contiguous and y.numel() > y.shape[-1]:
            return tuple(torch.split_with_sizes_copy(y, sizes, -1))
        return y.split(sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        sizes = [len(w) for w in weights]
        rows_dy, rows_x = joined(grads, -1).reshape(-1, sum(sizes)), x.reshape(-1, x.shape[-1])
        # dx = dy W;  dW = dy^T x;  db = sum over rows of dy
        # hooks on saved tensors (offloading) may have given each weight a copy: joined, not packed
        dx = (rows_dy @ joined(weights, 0)).view(x.shape) if ctx.needs_input_grad[0] else None
        dweights = (rows_dy.t() @ rows_x).split(sizes)
        dbiases: list[Tensor] = []
        if ctx.num_biases:
            dbias = rows_dy.sum(dim=0)
            for start in range(0, ctx.num_biases, ctx.num_weights):
                # a gradient's memory becomes its parameter's own: no two may share it
                dbiases += (dbias.clone() if start else dbias).split(sizes)
        return dx, None, None, *dweights, *dbiases


def packed_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, contiguous: bool = False
) -> tuple[Tensor, ...]:
    """Return linear(x, weight, bias) for every weight, in one product. Saves x; if x needs no gradient, none is made.

    x: (..., D); weights: (F_i, D) each, packed; biases: none, or rounds of one a weight, (F_i,) each, every round packed
    and all of them added. Results are views of one tensor, or contiguous ones. Raises ValueError for parameters that are
    not packed or do not fit.
    """
    if any(w.dim() != 2 or w.shape[1] != x.shape[-1] for w in weights):
        raise ValueError(f"projections of {[tuple(w.shape) for w in weights]} do not fit x of {tuple(x.shape)}")
    if len(biases) % len(weights) or any(len(b) != len(weights[i % len(weights)]) for i, b in enumerate(biases)):
        raise ValueError(f"{len(biases)} biases do not fit {len(weights)} weights")
    return _PackedLinear.apply(x, len(weights), contiguous, *weights, *biases)


class _NormPackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, bias_in_x, eps, *weights):
        _, h, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, None, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, *weights)
        ctx.eps, ctx.has_bias_in_x = eps, bias_in_x is not None
        ctx.set_materialize_grads(False)
        return x, *F.linear(h, packed(weights)).split([len(w) for w in weights], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, *grads):
        if all(g is None for g in grads):
            return ds, None, None, row_sum(ds) if ctx.has_bias_in_x else None, *[None] * (1 + len(grads))
        x, norm_weight, norm_bias, mean, rstd, *weights = ctx.saved_tensors
        norm = (x, norm_weight, norm_bias, mean, rstd)
        sizes = [len(w) for w in weights]
        grads = [x.new_zeros(*x.shape[:-1], n) if g is None else g for g, n in zip(grads, sizes, strict=True)]
        h = layer_norm_again(*norm, ctx.eps)
        dh, dweight, _ = linear_gradients(joined(grads, -1), h, joined(weights, 0), has_bias=False)
        del h
        dx, dnorm_weight, dnorm_bias, *sums = layer_norm_bwd(dh, ds, *norm, ctx.eps, sum_dx=ctx.has_bias_in_x)
        return dx, dnorm_weight, dnorm_bias, sums[0] if sums else None, None, *dweight.split(sizes)


def norm_packed_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    *,
    bias_in_x: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """Return (x, linear(layer_norm(x), weight) for every weight), in one product. Saves x and fp32 statistics alone.

    Use the x returned for what follows: its gradient then joins the norm's in the same pass. x: (..., D), fp32 | fp16 |
    bf16; weights: (F_i, D) each, packed; bias_in_x: (D,), gets its gradient here (kernels/ops/norm_then_matmul.py). Results are
    views of one tensor. Raises ValueError for parameters that are not packed or do not fit.
    """
    check_layer_norm(x, norm_weight, None)
    for weight in weights:
        check_linear(x, weight)
    return _NormPackedLinear.apply(x.contiguous(), norm_weight, norm_bias, bias_in_x, eps, *weights)
