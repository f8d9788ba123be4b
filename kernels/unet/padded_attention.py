"""Attention of heads padded with zeros to a width that a fused operator may compute faster.

Zeros change neither scores nor outputs, so only the cost differs: fused kernels compute in tiles of a few widths, and
their loads are simpler if a head fills its tile, but the padding is copied there and back. Which is faster on a GPU, at
a model's shapes, is for the probe to time (attention_probe.py).

Backward pads again what forward read, so that the padding is not kept in between.

Letters: B batch, M queries, N keys, H heads, K head dim, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from safelight.kernels.unet import flash4

aten = torch.ops.aten

# of the tiles in which kernels compute a head
FLASH_WIDTHS = (32, 64, 96, 128, 192, 256)
# on Blackwell FlashAttention 4 takes no head between 128 and 256
FLASH4_WIDTHS = (32, 64, 96, 128, 256)
CUDNN_WIDTHS = (64, 128, 256)
WIDTHS = {"flash": FLASH_WIDTHS, "flash4": FLASH4_WIDTHS, "cudnn": CUDNN_WIDTHS}

Gradients = tuple[Tensor, Tensor, Tensor]


class Passes(NamedTuple):
    """An operator's two passes over (B, T, H, W).

    forward: (q, k, v, scale) -> (output, what backward needs besides). backward: (gradient, q, k, v, output, the same,
    scale) -> gradients of q, k and v.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, tuple]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple, float], Gradients]


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, *needed, _ = aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)
    return out.transpose(1, 2), tuple(needed)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, needed: tuple, scale: float
) -> Gradients:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    log_sums, *sequences, seed, offset = needed
    grads = aten._scaled_dot_product_flash_attention_backward.default(
        grad, q, k, v, out, log_sums, *sequences, 0.0, False, seed, offset, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in grads)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, *needed, _ = aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, scale=scale)
    return out.transpose(1, 2), tuple(needed)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, needed: tuple, scale: float
) -> Gradients:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    log_sums, *sequences, seed, offset = needed
    grads = aten._scaled_dot_product_cudnn_attention_backward.default(
        grad, q, k, v, out, log_sums, seed, offset, None, *sequences, 0.0, False, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in grads)


PASSES: dict[str, Passes] = {
    "flash": Passes(_flash_forward, _flash_backward),
    "cudnn": Passes(_cudnn_forward, _cudnn_backward),
    "flash4": Passes(flash4.forward, flash4.backward),
}


def padded_name(backend: str, head_dim: int) -> str | None:
    """Return the name of a backend with heads padded to its next width, flash@64; None if it has none or they fit."""
    width = next((width for width in WIDTHS.get(backend, ()) if width >= head_dim), head_dim)
    return None if width == head_dim else f"{backend}@{width}"


def padded_attention(name: str) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
    """Return the function of a name as `padded_name` gives it, which computes attention as `attend`."""
    backend, _, width = name.partition("@")

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return _PaddedAttention.apply(q, k, v, scale, PASSES[backend], int(width))

    return call


class _PaddedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, passes: Passes, width: int) -> Tensor:
        added = (0, width - q.shape[3])
        out, needed = passes.forward(pad(q, added), pad(k, added), pad(v, added), scale)
        out = out[..., : q.shape[3]].contiguous()
        ctx.scale, ctx.passes, ctx.added = scale, passes, added
        tensors = [x for x in needed if isinstance(x, Tensor)]
        # places of the tensors, and the values of what is none
        ctx.needed = [None if isinstance(x, Tensor) else (x,) for x in needed]
        ctx.save_for_backward(q, k, v, out, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        needed = tuple(next(saved) if value is None else value[0] for value in ctx.needed)
        wide = [pad(x, ctx.added) for x in (grad, q, k, v, out)]
        grads = ctx.passes.backward(*wide, needed, ctx.scale)
        return (*(x[..., : q.shape[3]] for x in grads), None, None, None)
