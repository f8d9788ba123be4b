"""FlashAttention 4, for Hopper and Blackwell GPUs, where the package flash-attn-4 is installed.

Its forward pass is an operator here, so that selective checkpointing can keep its output.

Letters: B batch, M queries, N keys, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@torch.library.custom_op("safelight::flash4_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output, (B, M, H, K), and the logarithms of the softmax's sums, (B, H, M) in fp32."""
    from flash_attn.cute import flash_attn_func

    with torch.no_grad():
        return flash_attn_func(q, k, v, softmax_scale=scale, return_lse=True)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


# the operator, as a dispatch mode sees it
OPERATOR = torch.ops.safelight.flash4_forward.default


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor]]:
    """Return the output, (B, M, H, K), and what `backward` needs besides. q: (B, M, H, K); k, v: (B, N, H, K)."""
    out, log_sums = OPERATOR(q, k, v, scale)
    return out, (log_sums,)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, needed: tuple[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, in their shapes."""
    from flash_attn.cute.interface import _flash_attn_bwd

    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return _flash_attn_bwd(q, k, v, out, grad, *needed, softmax_scale=scale, deterministic=is_deterministic)


def flash4_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Return softmax(q k^T * scale) v as `attend` does, contiguous. 16-bit inputs on a GPU only."""
    return _Flash4.apply(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)


class _Flash4(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, needed = forward(q, k, v, scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, *needed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *needed = ctx.saved_tensors
        return (*backward(grad.contiguous(), q, k, v, out, tuple(needed), ctx.scale), None)
