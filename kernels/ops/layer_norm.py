"""LayerNorm, optionally fused with the residual add before it: the norms of a UNet's transformer blocks.

    s = x + residual      xhat = (s - mean) * rstd      y = weight * xhat + bias

Both s and y are returned: s is the residual stream. A program takes BLOCK_M whole rows. Statistics are fp32, in two
passes over a row held in registers, and are those of s as stored, rounded to its dtype.

Saved for backward: s, the parameters, and fp32 mean and rstd. xhat is recomputed:

    dx = rstd * (weight * dy - mean(weight * dy) - xhat * mean(weight * dy * xhat)) + ds
    dweight = sum over rows of dy * xhat        dbias = sum over rows of dy

where ds is the gradient that reaches s by the residual stream. The backward kernel can also return the sums over rows
of dx and ds: those are the gradients of biases that neighbouring projections add to s, at no extra pass.
Letters: M rows (batch x tokens), D features.
Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
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

TILE = 2048  # elements a program holds at once: 16 a thread
MAX_FEATURES = 8192
# Programs of the backward pass. Each writes and re-reads a row of partial sums for each of two to four sums, 8 bytes a
# feature, where a row of four 16-bit tensors is 8 bytes a feature too: with MIN_BWD_ROWS rows or more a program, a
# sixteenth of the tensors' bytes for each sum. The most is four on each SM of the largest GPU, as many as their
# registers allow there; of those with four sums three fit.
MIN_BWD_PROGRAMS, MAX_BWD_PROGRAMS = 128, 512
MIN_BWD_ROWS = 16


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (s, y) in plain PyTorch; s is x if there is no residual."""
    s = x if residual is None else (to_compute(x) + to_compute(residual)).to(x.dtype)
    y = F.layer_norm(to_compute(s), s.shape[-1:], to_compute(weight), to_compute(bias), eps)
    return s, y.to(x.dtype)


@kernel(do_not_specialize=("M",))
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    s_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    D,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write s (with a residual), y, mean and rstd of BLOCK_M rows. HAS_STATS: read mean and rstd, write only y."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    offsets = row[:, None] * D + d[None, :]
    mask = (row[:, None] < M) & (d[None, :] < D)
    s = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + offsets, rounded, mask=mask)
        # normalize s as stored, since that is what the backward pass will read
        s = rounded.to(tl.float32)
    if HAS_STATS:
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
    else:
        mean = tl.reduce(s, 1, tl.standard._sum_combine) / D
        deviation = tl.where(mask, s - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.reduce(deviation * deviation, 1, tl.standard._sum_combine) / D + eps)
        tl.store(mean_ptr + row, mean, mask=row < M)
        tl.store(rstd_ptr + row, rstd, mask=row < M)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    y = (s - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=("M",))
def _layer_norm_bwd_kernel(
    dy_ptr,
    ds_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    parts_ptr,
    M,
    D,
    HAS_DS: tl.constexpr,
    SUM_DX: tl.constexpr,
    SUM_DS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write dx, and this program's row of partial sums: (2 to 4, programs, D).

    The sums are of dweight and dbias, then with SUM_DX of dx, then with SUM_DS of ds.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    dweight = tl.full((BLOCK_D,), 0.0, tl.float32)
    dbias = tl.full((BLOCK_D,), 0.0, tl.float32)
    sum_dx = tl.full((BLOCK_D,), 0.0, tl.float32)
    sum_ds = tl.full((BLOCK_D,), 0.0, tl.float32)
    for start in range(program * BLOCK_M, M, num_programs * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        offsets = row[:, None] * D + d[None, :]
        mask = (row[:, None] < M) & (d[None, :] < D)
        s = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        xhat = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
        # dbias = sum over rows of dy;  dweight = sum over rows of dy * xhat
        dbias += tl.reduce(dy, 0, tl.standard._sum_combine)
        dweight += tl.reduce(dy * xhat, 0, tl.standard._sum_combine)
        # dx = rstd * (weight dy - mean(weight dy) - xhat * mean(weight dy * xhat)) + ds
        # weight is loaded in every iteration: kept in registers through the loop, it spills on sm_86 and sm_89
        dxhat = dy * tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        mean_1 = tl.reduce(dxhat, 1, tl.standard._sum_combine) / D
        mean_2 = tl.reduce(dxhat * xhat, 1, tl.standard._sum_combine) / D
        dx = rstd[:, None] * (dxhat - mean_1[:, None] - xhat * mean_2[:, None])
        if HAS_DS:
            ds = tl.load(ds_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dx += ds
            if SUM_DS:
                sum_ds += tl.reduce(ds, 0, tl.standard._sum_combine)
        if SUM_DX:
            # masked rows add nothing: their rstd is 0
            sum_dx += tl.reduce(dx, 0, tl.standard._sum_combine)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    part = program.to(tl.int64) * D + d
    size = num_programs.to(tl.int64) * D
    tl.store(parts_ptr + part, dweight, mask=d < D)
    tl.store(parts_ptr + size + part, dbias, mask=d < D)
    if SUM_DX:
        tl.store(parts_ptr + 2 * size + part, sum_dx, mask=d < D)
    if SUM_DS:
        tl.store(parts_ptr + (2 + SUM_DX) * size + part, sum_ds, mask=d < D)


def _blocks(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Return M, D and the block sizes."""
    D = x.shape[-1]
    block_d = next_power_of_2(D)
    M = x.numel() // D
    return M, D, {"BLOCK_M": max(1, min(TILE // block_d, next_power_of_2(M))), "BLOCK_D": block_d}


def _num_bwd_programs(M: int, block_m: int) -> int:
    """Return the programs of the backward pass, by the shape alone: every GPU adds up the rows in the same order."""
    wanted = min(max(MIN_BWD_PROGRAMS, M // MIN_BWD_ROWS), MAX_BWD_PROGRAMS)
    return min(wanted, cdiv(M, block_m))


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (s, y, mean, rstd), without autograd; mean and rstd are (M,) float32. x, residual: contiguous."""
    if not runs_kernel(x):
        s, y = layer_norm_reference(x, weight, bias, residual, eps)
        var, mean = torch.var_mean(to_compute(s).reshape(-1, s.shape[-1]), dim=1, correction=0)
        return s, y, mean, (var + eps).rsqrt()
    M, D, blocks = _blocks(x)
    s = x if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    _layer_norm_fwd_kernel[(cdiv(M, blocks["BLOCK_M"]),)](
        x,
        x if residual is None else residual,
        weight,
        bias,
        s,
        y,
        mean,
        rstd,
        M,
        D,
        eps,
        HAS_RESIDUAL=residual is not None,
        HAS_STATS=False,
        **blocks,
    )
    return s, y, mean, rstd


def layer_norm_recompute(s: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """Return y again from the saved s and statistics, bit for bit as in the forward pass."""
    if not runs_kernel(s):
        return layer_norm_reference(s, weight, bias, None, eps)[1]
    M, D, blocks = _blocks(s)
    y = torch.empty_like(s)
    _layer_norm_fwd_kernel[(cdiv(M, blocks["BLOCK_M"]),)](
        s, s, weight, bias, s, y, mean, rstd, M, D, eps, HAS_RESIDUAL=False, HAS_STATS=True, **blocks
    )
    return y


def layer_norm_bwd(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    *,
    sum_dx: bool = False,
    sum_ds: bool = False,
) -> tuple[Tensor, ...]:
    """Return (dx, dweight, dbias), then with sum_dx the sum over rows of dx, then with sum_ds that of ds, (D,) each.

    dx is also the residual's gradient. ds: the gradient that reaches s by another path, or None; it is added to dx.
    """
    if not runs_kernel(s):

        def forward(s, weight, bias):
            return layer_norm_reference(s, weight, bias, None, eps)[1]

        dx, dweight, dbias = recomputed_gradients(forward, (s, weight, bias), dy)
        dx = dx if ds is None else dx + ds
        return dx, dweight, dbias, *(row_sum(x) for x, is_summed in ((dx, sum_dx), (ds, sum_ds)) if is_summed)
    M, D, blocks = _blocks(s)
    dy, has_ds = dy.contiguous(), ds is not None
    ds = ds.contiguous() if has_ds else dy
    num_programs = _num_bwd_programs(M, blocks["BLOCK_M"])
    dx = torch.empty_like(s)
    parts = torch.empty(2 + sum_dx + sum_ds, num_programs, D, dtype=torch.float32, device=s.device)
    # Four sums of a wide row take over 160 registers a thread with four warps and at most 86 with eight; in fp32 they
    # spill with four on sm_120. Narrower 16-bit rows take 142 at most, and eight warps would need half as many
    # instructions again.
    is_large = blocks["BLOCK_D"] > 1024 or s.dtype == torch.float32
    warps = {"num_warps": 8} if sum_dx and sum_ds and is_large else {}
    _layer_norm_bwd_kernel[(num_programs,)](
        dy, ds, s, weight, mean, rstd, dx, parts, M, D, HAS_DS=has_ds, SUM_DX=sum_dx, SUM_DS=sum_ds, **blocks, **warps
    )
    return dx, *column_sum(parts, weight.dtype).unbind()


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps):
        s, y, mean, rstd = layer_norm_fwd(x, weight, bias, residual, eps)
        ctx.save_for_backward(s, weight, bias, mean, rstd)
        ctx.eps, ctx.has_residual = eps, residual is not None
        ctx.set_materialize_grads(False)
        return (s, y) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ds, dy = grads if ctx.has_residual else (None, *grads)
        if dy is None:
            return ds, None, None, ds, None
        dx, dweight, dbias = layer_norm_bwd(dy, ds, *ctx.saved_tensors, ctx.eps)
        return dx, dweight, dbias, dx if ctx.has_residual else None, None


def check_layer_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError if the shapes do not fit each other."""
    if x.numel() == 0 or x.shape[-1] > MAX_FEATURES:
        raise ValueError(f"layer norm takes 1 to {MAX_FEATURES} features and at least one row, got {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a weight of {tuple(weight.shape)} does not fit x with {x.shape[-1]} features")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"the residual is {tuple(residual.shape)} {residual.dtype}; it must match x, {tuple(x.shape)} {x.dtype}"
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Return layer_norm(x) over the last dimension.

    x: (..., D), fp32 | fp16 | bf16 -> the same shape and dtype, contiguous. weight, bias: (D,).
    Raises ValueError for more than 8,192 features, or shapes that do not fit.
    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450; matches torch.nn.functional.layer_norm.
    """
    check_layer_norm(x, weight, None)
    return _LayerNorm.apply(x.contiguous(), weight, bias, None, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return (s, layer_norm(s)), s = x + residual rounded to x's dtype; shapes and errors as `layer_norm`."""
    check_layer_norm(x, weight, residual)
    return _LayerNorm.apply(x.contiguous(), weight, bias, residual.contiguous(), eps)
