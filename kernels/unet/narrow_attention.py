"""Attention with heads narrower than 16 on a CPU, where PyTorch's fused operator is slow.

Softmax attention is computed a few heads at a time, so that their scores stay in the processor's cache, by matrix
products whose small operand, transposed, comes first: (K, M) @ (M, N). BLAS multiplies (M, N) @ (N, K) with K = 8 ten
times more slowly. The softmax is taken in powers of two, which take a third of the time of powers of e here. Of it one
number a row is saved for backward, the logarithm of its sum, from which the scores are computed again. Measured in
docs/log.md.

Letters: B batch, M queries, N keys, H heads, K head dim, P = B * H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# PyTorch's fused operator is faster from here on
MAX_HEAD_DIM = 16
# scores held at once, or those of one head if that has more: 512 KiB in fp32, in backward twice
MAX_SCORES = 2**17
LOG2_E = math.log2(math.e)


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


def _buffer(q: Tensor, num_keys: int) -> Tensor:
    """Return a tensor (heads, M, N) for the scores of the heads that are computed at once. q: (P, M, K)."""
    num_heads = min(max(1, MAX_SCORES // (q.shape[1] * num_keys)), q.shape[0])
    return q.new_empty(num_heads, q.shape[1], num_keys)


class _NarrowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        q_PMK, k_PKN, v_PKN = _rows(q), _columns(k, scale * LOG2_E), _columns(v)
        out_PKM = q_PMK.new_empty(q_PMK.shape[0], q_PMK.shape[2], q_PMK.shape[1])
        log_sums = q_PMK.new_empty(q_PMK.shape[0], q_PMK.shape[1], 1)
        buffer = _buffer(q_PMK, k.shape[1])
        parts = (q_PMK, k_PKN, v_PKN, out_PKM, log_sums)
        for q_, k_, v_, out, log_sum in zip(*(x.split(len(buffer)) for x in parts), strict=True):
            weights = buffer[: len(q_)]
            torch.bmm(q_, k_, out=weights)
            largest = weights.amax(-1, keepdim=True)
            weights.sub_(largest).exp2_()
            sums = weights.sum(-1, keepdim=True)
            torch.bmm(v_, weights.mT, out=out)
            out.div_(sums.mT)
            torch.add(largest, sums.log2_(), out=log_sum)
        out = _restored(out_PKM, q)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        q_PMK, k_PKN, v_PKN = _rows(q), _columns(k, ctx.scale * LOG2_E), _columns(v)
        grad_PMK, grad_PKM = _rows(grad), _columns(grad)
        # with s the scores and w their softmax: ds = w * (grad v^T - rowsum(grad * out))
        dots = (_wide(grad) * _wide(out)).sum(-1).transpose(1, 2).reshape(log_sums.shape)
        # dq = scale ds k and dk = scale ds^T q: the copies of k and q are scaled, that of k by LOG2_E as well
        q_PKM = _columns(q, ctx.scale)
        dq, dk, dv = torch.empty_like(q_PKM), torch.empty_like(k_PKN), torch.empty_like(v_PKN)
        buffer, other = _buffer(q_PMK, k.shape[1]), _buffer(q_PMK, k.shape[1])
        parts = (q_PMK, k_PKN, v_PKN, log_sums, grad_PMK, grad_PKM, dots, q_PKM, dq, dk, dv)
        for q_, k_, v_, log_sum, g, gT, dot, qT, dq_, dk_, dv_ in zip(
            *(x.split(len(buffer)) for x in parts), strict=True
        ):
            weights, ds = buffer[: len(q_)], other[: len(q_)]
            torch.baddbmm(log_sum, q_, k_, beta=-1, out=weights)
            weights.exp2_()
            torch.bmm(gT, weights, out=dv_)
            torch.baddbmm(dot, g, v_, beta=-1, out=ds)
            ds.mul_(weights)
            torch.bmm(k_, ds.mT, out=dq_)
            torch.bmm(qT, ds, out=dk_)
        dq.mul_(1 / LOG2_E)
        return _restored(dq, q), _restored(dk, k), _restored(dv, v), None
