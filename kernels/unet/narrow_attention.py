"""Attention with heads narrower than 16 on a CPU, where PyTorch's fused operator is slow.

Softmax attention is computed a few heads at a time, so that their scores stay in the processor's cache, by matrix
products whose small operand, transposed, comes first: (K, M) @ (M, N). BLAS multiplies (M, N) @ (N, K) with K = 8 ten
times more slowly. Nothing but the inputs is saved for backward, which computes the scores again. Measured in
docs/log.md.

Letters: B batch, M queries, N keys, H heads, K head dim, P = B * H.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# PyTorch's fused operator is faster from here on
MAX_HEAD_DIM = 16
# scores held at once, or those of one head if that has more: 1 MiB in fp32, and their softmax as much
MAX_SCORES = 2**18

aten = torch.ops.aten


def narrow_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Return softmax(q k^T * scale) v, (B, M, H, K), contiguous.

    q: (B, M, H, K); k, v: (B, N, H, K), on a CPU, of any strides. scale: None for 1 / sqrt(K). 16-bit inputs are
    computed in fp32. Raises ValueError for heads of MAX_HEAD_DIM or more.
    """
    if q.shape[3] >= MAX_HEAD_DIM:
        raise ValueError(f"head dim {q.shape[3]} is not below {MAX_HEAD_DIM}")
    return _NarrowAttention.apply(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x


def _rows(x: Tensor) -> Tensor:
    """(B, T, H, K) -> (P, T, K), contiguous, of at least 32 bits."""
    return _wide(x).transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()


def _columns(x: Tensor, scale: float = 1.0) -> Tensor:
    """(B, T, H, K) -> (P, K, T), scaled, of at least 32 bits, contiguous, because BLAS is slow on other strides."""
    x = _wide(x) if scale == 1 else _wide(x) * scale
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[3], x.shape[1]).contiguous()


def _restored(x: Tensor, like: Tensor) -> Tensor:
    """(P, K, T) -> (B, T, H, K), contiguous, in the dtype of `like`, which has this shape."""
    return x.unflatten(0, (-1, like.shape[2])).permute(0, 3, 1, 2).to(like.dtype).contiguous()


def _buffers(q: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Return two tensors (heads, M, N) for the scores of the heads that are computed at once. q: (P, M, K)."""
    num_heads = min(max(1, MAX_SCORES // (q.shape[1] * num_keys)), q.shape[0])
    scores = q.new_empty(num_heads, q.shape[1], num_keys)
    return scores, torch.empty_like(scores)


class _NarrowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        q_PMK, k_PKN, v_PKN = _rows(q), _columns(k, scale), _columns(v)
        out_PKM = q_PMK.new_empty(q_PMK.shape[0], q_PMK.shape[2], q_PMK.shape[1])
        scores, weights = _buffers(q_PMK, k.shape[1])
        for q_, k_, v_, out in zip(*(x.split(len(scores)) for x in (q_PMK, k_PKN, v_PKN, out_PKM)), strict=True):
            s, w = scores[: len(q_)], weights[: len(q_)]
            torch.bmm(q_, k_, out=s)
            aten._softmax.out(s, -1, False, out=w)
            torch.bmm(v_, w.mT, out=out)
        return _restored(out_PKM, q)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        q_PMK, k_PKN, v_PKN = _rows(q), _columns(k, ctx.scale), _columns(v)
        grad_PMK, grad_PKM = _rows(grad), _columns(grad)
        # dq = scale ds k and dk = scale ds^T q: the scale is in the copies of k and q already
        q_PKM = _columns(q, ctx.scale)
        dq, dk, dv = torch.empty_like(q_PKM), torch.empty_like(k_PKN), torch.empty_like(v_PKN)
        scores, weights = _buffers(q_PMK, k.shape[1])
        parts = (q_PMK, k_PKN, v_PKN, grad_PMK, grad_PKM, q_PKM, dq, dk, dv)
        for q_, k_, v_, g, gT, qT, dq_, dk_, dv_ in zip(*(x.split(len(scores)) for x in parts), strict=True):
            s, w = scores[: len(q_)], weights[: len(q_)]
            torch.bmm(q_, k_, out=s)
            aten._softmax.out(s, -1, False, out=w)
            torch.bmm(gT, w, out=dv_)
            torch.bmm(g, v_, out=s)
            # in place: each row is read before it is written
            aten._softmax_backward_data.out(s, w, -1, s.dtype, grad_input=s)
            torch.bmm(k_, s.mT, out=dq_)
            torch.bmm(qT, s, out=dk_)
        return _restored(dq, q), _restored(dk, k), _restored(dv, v), None
