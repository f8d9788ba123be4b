"""GEGLU: the gated activation between a transformer feed-forward block's two matmuls.

    x = [a, g] along the last dimension
    y = a * gelu(g),  gelu(g) = g * cdf(g),  cdf(g) = (1 + erf(g / sqrt 2)) / 2

One program per row and block of BLOCK_F features; a backward pass that also sums walks several rows per program.
Saved for backward: x. Letters: M rows (batch x tokens), F features of the output.
Source: Shazeer 2020, arXiv:2002.05202; the halves' order is diffusers' GEGLU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from safelight.kernels.ops.column_sum import column_sum
from safelight.kernels.reference import recomputed_gradients, row_sum, to_compute
from safelight.kernels.triton.jit import cdiv, kernel, next_power_of_2, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

SQRT_HALF = 0.7071067811865476
INV_SQRT_2PI = 0.3989422804014327
MAX_BLOCK_F = 1024
# Limits for a backward pass that sums. Each program writes and re-reads an fp32 row of partial sums, 8 bytes per
# feature where a row of a 16-bit gradient is 2, so few programs take many rows each.
NUM_SUM_PROGRAMS = 512
MIN_SUM_ROWS = 8


def geglu_reference(x: Tensor) -> Tensor:
    """Return a * gelu(g) in plain PyTorch; shapes as `geglu`."""
    a, g = to_compute(x).chunk(2, dim=-1)
    return (a * F.gelu(g)).to(x.dtype)


@kernel
def _geglu_fwd_kernel(x_ptr, y_ptr, num_features, BLOCK_F: tl.constexpr):
    """Write y = a * gelu(g) for one row and BLOCK_F features."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < num_features
    a_ptr = x_ptr + row * 2 * num_features
    a = tl.load(a_ptr + f, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(a_ptr + num_features + f, mask=mask, other=0.0).to(tl.float32)
    y = a * g * 0.5 * (1.0 + tl.math.erf(g * SQRT_HALF))
    tl.store(y_ptr + row * num_features + f, y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=("num_rows",))
def _geglu_bwd_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    parts_ptr,
    num_rows,
    num_features,
    WRITE_Y: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Write dx; with WRITE_Y also y, over dy; with SUM also this program's partial sums of dx, (programs, 2F)."""
    program = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < num_features
    sum_da = tl.full((BLOCK_F,), 0.0, tl.float32)
    sum_dg = tl.full((BLOCK_F,), 0.0, tl.float32)
    for start in range(program, num_rows, tl.num_programs(0)):
        # the loop variable is int32; offsets must be int64
        row = start + tl.full((), 0, tl.int64)
        a_ptr = x_ptr + row * 2 * num_features
        da_ptr = dx_ptr + row * 2 * num_features
        dy = tl.load(dy_ptr + row * num_features + f, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + f, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(a_ptr + num_features + f, mask=mask, other=0.0).to(tl.float32)
        cdf = 0.5 * (1.0 + tl.math.erf(g * SQRT_HALF))
        # da = dy * g cdf(g)
        da = dy * g * cdf
        # dg = dy * a * (cdf(g) + g pdf(g)),  pdf(g) = exp(-g^2 / 2) / sqrt(2 pi)
        dg = dy * a * (cdf + g * INV_SQRT_2PI * tl.exp(-0.5 * g * g))
        tl.store(da_ptr + f, da.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(da_ptr + num_features + f, dg.to(dx_ptr.dtype.element_ty), mask=mask)
        if SUM:
            sum_da += da
            sum_dg += dg
        if WRITE_Y:
            # same bits as the forward pass: multiplying by 0.5 is exact at any point
            tl.store(dy_ptr + row * num_features + f, (a * g * cdf).to(dy_ptr.dtype.element_ty), mask=mask)
    if SUM:
        part_ptr = parts_ptr + program.to(tl.int64) * 2 * num_features
        tl.store(part_ptr + f, sum_da, mask=mask)
        tl.store(part_ptr + num_features + f, sum_dg, mask=mask)


def _grid(num_rows: int, num_features: int) -> tuple[tuple[int, int], int]:
    """Return the grid (rows, feature blocks) and BLOCK_F."""
    block = min(MAX_BLOCK_F, next_power_of_2(num_features))
    return (num_rows, cdiv(num_features, block)), block


def geglu_fwd(x: Tensor) -> Tensor:
    """Return y, without autograd; x as `geglu`."""
    if not runs_kernel(x):
        return geglu_reference(x)
    x = x.contiguous()
    num_features = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], num_features, dtype=x.dtype, device=x.device)
    if y.numel():
        grid, block = _grid(y.numel() // num_features, num_features)
        _geglu_fwd_kernel[grid](x, y, num_features, BLOCK_F=block)
    return y


def _backward(dy: Tensor, x: Tensor, write_y: bool, with_sum: bool) -> tuple[Tensor, Tensor | None]:
    """Return (dx, its sum over rows or None)."""
    dx = torch.empty_like(x)
    if not dy.numel():
        return dx, x.new_zeros(x.shape[-1]) if with_sum else None
    num_features = dy.shape[-1]
    num_rows = dy.numel() // num_features
    (num_programs, num_blocks), block = _grid(num_rows, num_features)
    parts = dx
    if with_sum:
        num_programs = max(1, min(NUM_SUM_PROGRAMS // num_blocks, cdiv(num_rows, MIN_SUM_ROWS)))
        parts = torch.empty(1, num_programs, 2 * num_features, dtype=torch.float32, device=x.device)
    _geglu_bwd_kernel[(num_programs, num_blocks)](
        dy, x, dx, parts, num_rows, num_features, WRITE_Y=write_y, SUM=with_sum, BLOCK_F=block
    )
    return dx, column_sum(parts, x.dtype)[0] if with_sum else None


def geglu_bwd(dy: Tensor, x: Tensor) -> Tensor:
    """Return dx of y = geglu(x)."""
    if not runs_kernel(x):
        return recomputed_gradients(geglu_reference, (x,), dy)[0]
    return _backward(dy.contiguous(), x.contiguous(), False, False)[0]


def geglu_bwd_recompute(dy: Tensor, x: Tensor, with_sum: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (dx, y, sum of dx over rows or None) of y = geglu(x), in one pass.

    The sum, (2F,), is the gradient of a bias that was added to x. y overwrites dy, which must be contiguous and belong
    to the caller.
    """
    if not runs_kernel(x):
        dx = recomputed_gradients(geglu_reference, (x,), dy)[0]
        return dx, geglu_reference(x), row_sum(dx) if with_sum else None
    dx, total = _backward(dy, x.contiguous(), True, with_sum)
    return dx, dy, total


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return geglu_fwd(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return geglu_bwd(dy, *ctx.saved_tensors)


def geglu(x: Tensor) -> Tensor:
    """Return a * gelu(g), where a, g are the halves of x.

    x: (..., 2F), fp32 | fp16 | bf16 -> (..., F), same dtype. Raises ValueError if the last dimension is odd.
    Source: Shazeer 2020, arXiv:2002.05202; matches diffusers' GEGLU.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"geglu needs an even last dimension, got {x.shape[-1]}")
    return _GEGLU.apply(x)
