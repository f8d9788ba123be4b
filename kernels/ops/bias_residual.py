"""The bias of a convolution or projection, the residual add after it and a scale, in one pass.

    y = (x + bias + residual + residual_bias) * scale

x is the output of a convolution or projection that ran without its bias, which saves a pass over the output; the
residual may be such an output too, with its own bias.

    dx = dresidual = scale * dy        dbias = dresidual_bias = sum over samples and pixels of scale * dy

Nothing is saved for backward. With scale 1 and a dense dy, dx is dy itself and PyTorch sums it; otherwise one kernel
writes dx and the partial sums of dbias in the same pass.
Letters: N batch, C channels, S pixels or tokens; P rows of partial sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from safelight.kernels.ops.column_sum import column_sum
from safelight.kernels.reference import channel_sum, row_sum, to_compute
from safelight.kernels.triton.jit import cdiv, kernel, next_power_of_2, runs_kernel, with_flat_pixels

if TYPE_CHECKING:
    import triton.language as tl

TILE = 2048  # elements a program holds at once: 16 a thread
MAX_BLOCK_C = 128
NUM_PROGRAMS = 512  # of the backward pass; each writes one row of partial sums for its channels


def _as_NCS(x: Tensor) -> Tensor:
    """Return x as (N, C, S). Channels are the second of four dimensions, else the last."""
    if x.dim() == 4:
        return x.flatten(2)
    return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)


def _broadcast(bias_C: Tensor, x: Tensor) -> Tensor:
    return bias_C[:, None, None] if x.dim() == 4 else bias_C


def bias_residual_reference(
    x: Tensor, bias: Tensor, residual: Tensor | None, residual_bias: Tensor | None, scale: float
) -> Tensor:
    """Return y in plain PyTorch; arguments as `bias_residual`."""
    y = to_compute(x) + _broadcast(to_compute(bias), x)
    if residual is not None:
        y = y + to_compute(residual)
    if residual_bias is not None:
        y = y + _broadcast(to_compute(residual_bias), x)
    return (y * scale).to(x.dtype)


# C is specialized: the mask of a vectorized access needs to know that 16 divides it
@kernel(do_not_specialize=("S",))
def _bias_residual_fwd_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    residual_bias_ptr,
    y_ptr,
    C,
    S,
    scale,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_rn,
    stride_rc,
    stride_rs,
    stride_yn,
    stride_yc,
    stride_ys,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write y for BLOCK_S pixels and BLOCK_C channels; the grid is (pixel blocks, channel blocks, samples)."""
    n = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (s[:, None] < S) & (c[None, :] < C)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_RESIDUAL_BIAS:
        bias += tl.load(residual_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    x_at = x_ptr + n * stride_xn + s[:, None] * stride_xs + c[None, :] * stride_xc
    y = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    if HAS_RESIDUAL:
        residual_at = residual_ptr + n * stride_rn + s[:, None] * stride_rs + c[None, :] * stride_rc
        y += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
    y_at = y_ptr + n * stride_yn + s[:, None] * stride_ys + c[None, :] * stride_yc
    tl.store(y_at, (y * scale).to(y_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=("S", "chunk"))
def _bias_residual_bwd_kernel(
    dy_ptr,
    dx_ptr,
    parts_ptr,
    C,
    S,
    scale,
    chunk,
    stride_dyn,
    stride_dyc,
    stride_dys,
    stride_dxn,
    stride_dxc,
    stride_dxs,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write dx of one split's pixels and the sums over them to parts, (N * P, C).

    The grid is (channel blocks, splits, samples); a split is `chunk` pixels.
    """
    n = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    total = tl.full((BLOCK_C,), 0.0, tl.float32)
    end = tl.minimum((split + 1) * chunk, S)
    for start in range(split * chunk, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (s[:, None] < end) & (c[None, :] < C)
        dy_at = dy_ptr + n * stride_dyn + s[:, None] * stride_dys + c[None, :] * stride_dyc
        # dx = dresidual = scale * dy;  dbias = sum over n, s of scale * dy
        dx = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32) * scale
        total += tl.reduce(dx, 0, tl.standard._sum_combine)
        dx_at = dx_ptr + n * stride_dxn + s[:, None] * stride_dxs + c[None, :] * stride_dxc
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + (n * tl.num_programs(1) + split) * C + c, total, mask=c < C)


def _blocks(C: int, S: int) -> dict[str, int]:
    block_c = min(MAX_BLOCK_C, next_power_of_2(C))
    return {"BLOCK_S": min(TILE // block_c, next_power_of_2(S)), "BLOCK_C": block_c}


def bias_residual_fwd(
    x: Tensor, bias: Tensor, residual: Tensor | None, residual_bias: Tensor | None, scale: float
) -> Tensor:
    """Return y, without autograd; arguments as `bias_residual`."""
    if not runs_kernel(x):
        return bias_residual_reference(x, bias, residual, residual_bias, scale)
    if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    y = torch.empty_like(x, memory_format=torch.preserve_format if x.dim() == 4 else torch.contiguous_format)
    flat, out = _as_NCS(x), _as_NCS(y)
    flat_residual = flat if residual is None else _as_NCS(residual)
    N, C, S = flat.shape
    blocks = _blocks(C, S)
    _bias_residual_fwd_kernel[(cdiv(S, blocks["BLOCK_S"]), cdiv(C, blocks["BLOCK_C"]), N)](
        flat,
        bias,
        flat_residual,
        bias if residual_bias is None else residual_bias,
        out,
        C,
        S,
        scale,
        *flat.stride(),
        *flat_residual.stride(),
        *out.stride(),
        HAS_RESIDUAL=residual is not None,
        HAS_RESIDUAL_BIAS=residual_bias is not None,
        **blocks,
    )
    return y


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def bias_residual_bwd(dy: Tensor, bias_dtype: torch.dtype | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Return (dx, dbias); bias_dtype None means that no dbias is needed, and returns None for it.

    dx is also the residual's gradient. It is dy itself if the scale is 1 and dy is dense. A dy that is a channel slice,
    as the gradient of a concatenation is, is made dense here, since the convolution that takes dx would have to copy it
    anyway.
    """
    order = torch.channels_last if dy.dim() == 4 and dy.stride(1) == 1 else torch.contiguous_format
    if scale == 1 and (bias_dtype is None or _is_dense(dy)):
        dx = dy.contiguous(memory_format=order)
        return dx, None if bias_dtype is None else (channel_sum if dy.dim() == 4 else row_sum)(dy).to(bias_dtype)
    if not runs_kernel(dy):
        dx = to_compute(dy) * scale
        dbias = None if bias_dtype is None else (channel_sum if dy.dim() == 4 else row_sum)(dx).to(bias_dtype)
        return dx.to(dy.dtype).contiguous(memory_format=order), dbias
    if dy.dim() == 4:
        dy = with_flat_pixels(dy)
    dx = torch.empty_like(dy, memory_format=order)
    flat, out = _as_NCS(dy), _as_NCS(dx)
    N, C, S = flat.shape
    blocks = _blocks(C, S)
    num_tiles, num_blocks = cdiv(S, blocks["BLOCK_S"]), cdiv(C, blocks["BLOCK_C"])
    chunk = cdiv(num_tiles, min(num_tiles, cdiv(NUM_PROGRAMS, N * num_blocks))) * blocks["BLOCK_S"]
    num_splits = cdiv(S, chunk)
    parts = torch.empty(1, N * num_splits, C, dtype=torch.float32, device=dy.device)
    _bias_residual_bwd_kernel[(num_blocks, num_splits, N)](
        flat, out, parts, C, S, scale, chunk, *flat.stride(), *out.stride(), **blocks
    )
    return dx, None if bias_dtype is None else column_sum(parts, bias_dtype)[0]


class _BiasResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, residual_bias, scale):
        ctx.bias_dtype, ctx.scale = bias.dtype, scale
        ctx.has_residual, ctx.has_residual_bias = residual is not None, residual_bias is not None
        return bias_residual_fwd(x, bias, residual, residual_bias, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_dbias = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        dx, dbias = bias_residual_bwd(dy, ctx.bias_dtype if needs_dbias else None, ctx.scale)
        # a clone: autograd may make each of them its parameter's .grad, so they must not share memory
        dresidual_bias = dbias.clone() if ctx.has_residual_bias and needs_dbias else None
        return dx, dbias, dx if ctx.has_residual else None, dresidual_bias, None


def bias_residual(
    x: Tensor, bias: Tensor, residual: Tensor | None = None, scale: float = 1.0, residual_bias: Tensor | None = None
) -> Tensor:
    """Return (x + bias + residual + residual_bias) * scale, summed in fp32.

    x: (N, C, H, W), channels-last or not, or (..., C); fp32 | fp16 | bf16 -> the same shape, dtype and memory order.
    bias, residual_bias: (C,); residual: shape and dtype of x. Raises ValueError for shapes or dtypes that do not fit.
    """
    num_channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    for b in (bias,) if residual_bias is None else (bias, residual_bias):
        if x.numel() == 0 or b.shape != (num_channels,):
            raise ValueError(f"a bias of {tuple(b.shape)} does not fit x of {tuple(x.shape)}; give it {num_channels}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"the residual is {tuple(residual.shape)} {residual.dtype}; it must match x, {tuple(x.shape)} {x.dtype}"
        )
    return _BiasResidual.apply(x, bias, residual, residual_bias, scale)
