"""GroupNorm with an optional addend before it and an optional SiLU behind it: the norms of a UNet's residual blocks.

    z = x + addend      xhat = (z - mean) * rstd      u = weight * xhat + bias      y = silu(u) = u * sigmoid(u), or u

The addend is the time embedding: one value a sample and channel. Statistics are fp32: two passes within a tile, tiles
merged by Welford's update, so a large mean costs no digits. Saved are x, fp32 mean and rstd; the backward pass computes
SiLU again. 32 groups would leave most of a card idle at batch 1, so each group's pixels are split among programs, by a
rule of the shape alone (results do not depend on the card); the parts meet in a fixed order, never by atomics.

Channels-last and NCHW memory are read and written as they are, through strides.
Letters: N batch, C channels, S pixels, G groups; P splits of S; K groups of a tile.
Source: Wu and He 2018, arXiv:1803.08494; merging of moments: Chan, Golub and LeVeque 1979.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from safelight.kernels.jit import cdiv, kernel, next_power_of_2, runs_kernel, with_flat_pixels
from safelight.kernels.reference import recomputed_gradients, to_compute

if TYPE_CHECKING:
    import triton.language as tl

TILE = 2048  # elements a program holds at once: 16 a thread
TILE_CHANNELS = 128
REDUCE_TILE = 1024
REDUCE_SPLITS = 8
NUM_PROGRAMS = 512  # enough for four a processor of the largest card
MAX_SPLITS = 64


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """Return the norm in plain PyTorch; arguments as `group_norm_silu`."""
    z = to_compute(x)
    if addend_NC is not None:
        z = z + to_compute(addend_NC).reshape(*addend_NC.shape, *[1] * (x.dim() - 2))
    u = F.group_norm(z, num_groups, to_compute(weight), to_compute(bias), eps)
    return (F.silu(u) if silu else u).to(x.dtype)


@kernel
def _tile(
    num_groups, stride_c, stride_s, start, end,
    GROUP_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return a tile's element offsets, (BLOCK_S, BLOCK_K, BLOCK_C), within its sample, and its mask."""
    s = start + tl.arange(0, BLOCK_S)
    group = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    within = tl.arange(0, BLOCK_C)
    channel = group[:, None] * GROUP_C + within[None, :]
    valid = (group[:, None] < num_groups) & (within[None, :] < GROUP_C)
    offsets = s.to(tl.int64)[:, None, None] * stride_s + channel.to(tl.int64)[None, :, :] * stride_c
    return offsets, (s < end)[:, None, None] & valid[None, :, :]


@kernel
def _channels(num_groups, GROUP_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the program's groups, (BLOCK_K,), its channels, (BLOCK_K, BLOCK_C), and their mask."""
    group = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    within = tl.arange(0, BLOCK_C)
    valid = (group[:, None] < num_groups) & (within[None, :] < GROUP_C)
    return group, group[:, None] * GROUP_C + within[None, :], valid


@kernel(varying=("C", "S", "num_groups", "chunk"))
def _group_stats_kernel(
    x_ptr, addend_ptr, parts_ptr, C, S, num_groups, stride_xn, stride_xc, stride_xs, chunk,
    HAS_ADDEND: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write each split's mean and sum of squared deviations: parts (N, P, G, 2)."""
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    end = tl.minimum((split + 1) * chunk, S)
    mean = tl.full((BLOCK_K,), 0.0, tl.float32)
    m2 = tl.full((BLOCK_K,), 0.0, tl.float32)
    if HAS_ADDEND:
        addend = tl.load(addend_ptr + n * C + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]
    for start in range(split * chunk, end, BLOCK_S):
        offsets, mask = _tile(num_groups, stride_xc, stride_xs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
        z = tl.load(x_ptr + n * stride_xn + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADDEND:
            z = tl.where(mask, z + addend, 0.0)
        count = ((tl.minimum(end, start + BLOCK_S) - start) * GROUP_C).to(tl.float32)
        before = ((start - split * chunk) * GROUP_C).to(tl.float32)
        total = tl.reduce(tl.reduce(z, 2, tl.standard._sum_combine), 0, tl.standard._sum_combine)
        tile_mean = total / count
        deviation = tl.where(mask, z - tile_mean[None, :, None], 0.0)
        square = tl.reduce(deviation * deviation, 2, tl.standard._sum_combine)
        tile_m2 = tl.reduce(square, 0, tl.standard._sum_combine)
        # merged mean = mean + delta n_b / n;  merged m2 = m2_a + m2_b + delta^2 n_a n_b / n
        delta = tile_mean - mean
        mean += delta * (count / (before + count))
        m2 += tile_m2 + delta * delta * (before * count / (before + count))
    part = ((n * tl.num_programs(1) + split) * num_groups + group) * 2
    tl.store(parts_ptr + part, mean, mask=group < num_groups)
    tl.store(parts_ptr + part + 1, m2, mask=group < num_groups)


@kernel(varying=("C", "S", "num_groups", "chunk", "num_splits"))
def _apply_kernel(
    x_ptr, addend_ptr, weight_ptr, bias_ptr, parts_ptr, mean_ptr, rstd_ptr, y_ptr, C, S, num_groups,
    stride_xn, stride_xc, stride_xs, stride_yn, stride_yc, stride_ys, chunk, num_splits, eps,
    HAS_STATS: tl.constexpr, HAS_ADDEND: tl.constexpr, SILU: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write y. HAS_STATS: mean and rstd are given; else they are merged of the parts and written, (N, G)."""
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    if HAS_STATS:
        mean = tl.load(mean_ptr + n * num_groups + group, mask=group < num_groups, other=0.0)
        rstd = tl.load(rstd_ptr + n * num_groups + group, mask=group < num_groups, other=0.0)
    else:
        p = tl.arange(0, BLOCK_P)
        part = ((n * num_splits + p[:, None]) * num_groups + group[None, :]) * 2
        part_mask = (p[:, None] < num_splits) & (group[None, :] < num_groups)
        part_mean = tl.load(parts_ptr + part, mask=part_mask, other=0.0)
        part_m2 = tl.load(parts_ptr + part + 1, mask=part_mask, other=0.0)
        count = (tl.maximum(tl.minimum(S - p * chunk, chunk), 0) * GROUP_C).to(tl.float32)[:, None]
        total = S * 1.0 * GROUP_C
        mean = tl.reduce(part_mean * (count / total), 0, tl.standard._sum_combine)
        deviation = tl.where(part_mask, part_mean - mean[None, :], 0.0)
        m2 = tl.reduce(part_m2 + count * deviation * deviation, 0, tl.standard._sum_combine)
        rstd = 1.0 / tl.sqrt_rn(m2 / total + eps)
        if split == 0:
            tl.store(mean_ptr + n * num_groups + group, mean, mask=group < num_groups)
            tl.store(rstd_ptr + n * num_groups + group, rstd, mask=group < num_groups)
    weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        addend = tl.load(addend_ptr + n * C + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]
    end = tl.minimum((split + 1) * chunk, S)
    for start in range(split * chunk, end, BLOCK_S):
        offsets, mask = _tile(num_groups, stride_xc, stride_xs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
        z = tl.load(x_ptr + n * stride_xn + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADDEND:
            z = z + addend
        u = (z - mean[None, :, None]) * rstd[None, :, None] * weight[None, :, :] + bias[None, :, :]
        if SILU:
            u = u / (1.0 + tl.exp(-u))
        offsets, mask = _tile(num_groups, stride_yc, stride_ys, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
        tl.store(y_ptr + n * stride_yn + offsets, u.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def _du(dy, xhat, weight, bias, SILU: tl.constexpr):
    """Return the gradient of u, the norm's output before SiLU."""
    if SILU:
        u = xhat * weight + bias
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        # du = dy * sigmoid(u) * (1 + u * (1 - sigmoid(u)))
        dy = dy * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return dy


@kernel(varying=("C", "S", "num_groups", "chunk"))
def _bwd_sums_kernel(
    dy_ptr, x_ptr, addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr, C, S, num_groups,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, chunk,
    HAS_ADDEND: tl.constexpr, SILU: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write each split's sums over pixels of du, du * xhat and (with an addend) xhat: sums (N, P, 3, C)."""
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    mean = tl.load(mean_ptr + n * num_groups + group, mask=group < num_groups, other=0.0)[None, :, None]
    rstd = tl.load(rstd_ptr + n * num_groups + group, mask=group < num_groups, other=0.0)[None, :, None]
    weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]
    sum_du = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    sum_du_xhat = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    sum_xhat = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    if HAS_ADDEND:
        addend = tl.load(addend_ptr + n * C + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]
    end = tl.minimum((split + 1) * chunk, S)
    for start in range(split * chunk, end, BLOCK_S):
        offsets, mask = _tile(num_groups, stride_xc, stride_xs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
        z = tl.load(x_ptr + n * stride_xn + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADDEND:
            z = z + addend
        offsets, mask = _tile(num_groups, stride_gc, stride_gs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
        dy = tl.load(dy_ptr + n * stride_gn + offsets, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (z - mean) * rstd, 0.0)
        # dy is zero where masked, and du with it
        du = _du(dy, xhat, weight, bias, SILU)
        sum_du += tl.reduce(du, 0, tl.standard._sum_combine)
        sum_du_xhat += tl.reduce(du * xhat, 0, tl.standard._sum_combine)
        if HAS_ADDEND:
            sum_xhat += tl.reduce(xhat, 0, tl.standard._sum_combine)
    row = (n * tl.num_programs(1) + split) * 3 * C
    tl.store(sums_ptr + row + channel, sum_du, mask=valid)
    tl.store(sums_ptr + row + C + channel, sum_du_xhat, mask=valid)
    if HAS_ADDEND:
        tl.store(sums_ptr + row + 2 * C + channel, sum_xhat, mask=valid)


@kernel(varying=("N", "C", "S", "num_groups", "num_splits"))
def _bwd_reduce_kernel(
    sums_ptr, weight_ptr, rstd_ptr, means_ptr, dweight_ptr, dbias_ptr, daddend_ptr, N, C, S, num_groups, num_splits,
    HAS_ADDEND: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write dweight, dbias (C,), daddend (N, C), and the two means dx needs: means (N, G, 2)."""
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    dweight = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    dbias = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    size = S * 1.0 * GROUP_C
    for i in range(N):
        # a loop's number is 32 bits wide; the offsets it makes are not
        n = i + tl.full((), 0, tl.int64)
        sum_du = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
        sum_du_xhat = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
        sum_xhat = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
        for start in range(0, num_splits, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < num_splits)[:, None, None] & valid[None, :, :]
            part = (n * num_splits + p[:, None, None]) * 3 * C + channel[None, :, :]
            sum_du += tl.reduce(tl.load(sums_ptr + part, mask=mask, other=0.0), 0, tl.standard._sum_combine)
            sum_du_xhat += tl.reduce(tl.load(sums_ptr + part + C, mask=mask, other=0.0), 0, tl.standard._sum_combine)
            if HAS_ADDEND:
                xhats = tl.load(sums_ptr + part + 2 * C, mask=mask, other=0.0)
                sum_xhat += tl.reduce(xhats, 0, tl.standard._sum_combine)
        # dbias = sum over n, s of du;  dweight = sum over n, s of du * xhat
        dbias += sum_du
        dweight += sum_du_xhat
        # over a group's elements: mean_1 = mean(weight * du), mean_2 = mean(weight * du * xhat)
        mean_1 = tl.reduce(weight * sum_du, 1, tl.standard._sum_combine) / size
        mean_2 = tl.reduce(weight * sum_du_xhat, 1, tl.standard._sum_combine) / size
        at = (n * num_groups + group) * 2
        tl.store(means_ptr + at, mean_1, mask=group < num_groups)
        tl.store(means_ptr + at + 1, mean_2, mask=group < num_groups)
        if HAS_ADDEND:
            rstd = tl.load(rstd_ptr + n * num_groups + group, mask=group < num_groups, other=0.0)
            # daddend = sum over s of dx = rstd * (weight * sum du - S * mean_1 - mean_2 * sum xhat)
            daddend = rstd[:, None] * (weight * sum_du - S * mean_1[:, None] - mean_2[:, None] * sum_xhat)
            tl.store(daddend_ptr + n * C + channel, daddend.to(daddend_ptr.dtype.element_ty), mask=valid)
    tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=valid)
    tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=valid)


@kernel(varying=("C", "S", "num_groups", "chunk"))
def _bwd_dx_kernel(
    dy_ptr, x_ptr, addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr, C, S, num_groups,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, stride_dn, stride_dc, stride_ds, chunk,
    HAS_ADDEND: tl.constexpr, SILU: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    in_range = group < num_groups
    mean = tl.load(mean_ptr + n * num_groups + group, mask=in_range, other=0.0)[None, :, None]
    rstd = tl.load(rstd_ptr + n * num_groups + group, mask=in_range, other=0.0)[None, :, None]
    mean_1 = tl.load(means_ptr + (n * num_groups + group) * 2, mask=in_range, other=0.0)[None, :, None]
    mean_2 = tl.load(means_ptr + (n * num_groups + group) * 2 + 1, mask=in_range, other=0.0)[None, :, None]
    weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]
    if HAS_ADDEND:
        addend = tl.load(addend_ptr + n * C + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]
    end = tl.minimum((split + 1) * chunk, S)
    for start in range(split * chunk, end, BLOCK_S):
        offsets, mask = _tile(num_groups, stride_xc, stride_xs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
        z = tl.load(x_ptr + n * stride_xn + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADDEND:
            z = z + addend
        offsets, mask = _tile(num_groups, stride_gc, stride_gs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
        dy = tl.load(dy_ptr + n * stride_gn + offsets, mask=mask, other=0.0).to(tl.float32)
        xhat = (z - mean) * rstd
        du = _du(dy, xhat, weight, bias, SILU)
        # dx = rstd * (weight * du - mean_1 - xhat * mean_2)
        dx = rstd * (weight * du - mean_1 - xhat * mean_2)
        offsets, mask = _tile(num_groups, stride_dc, stride_ds, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
        tl.store(dx_ptr + n * stride_dn + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Plan:
    """How a shape is cut into programs, from the shape alone."""

    group_c: int
    block_k: int
    block_c: int
    block_s: int
    chunk: int  # pixels of a split
    num_splits: int
    grid: tuple[int, int, int]

    @property
    def blocks(self) -> dict[str, int]:
        return {"GROUP_C": self.group_c, "BLOCK_K": self.block_k, "BLOCK_C": self.block_c}


def _plan(num_samples: int, num_channels: int, num_pixels: int, num_groups: int) -> _Plan:
    group_c = num_channels // num_groups
    block_c = next_power_of_2(group_c)
    block_k = min(max(1, TILE_CHANNELS // block_c), next_power_of_2(num_groups))
    block_s = max(1, min(TILE // (block_k * block_c), next_power_of_2(num_pixels)))
    num_blocks = cdiv(num_groups, block_k)
    num_tiles = cdiv(num_pixels, block_s)
    wanted = min(MAX_SPLITS, num_tiles, cdiv(NUM_PROGRAMS, num_samples * num_blocks))
    chunk = cdiv(num_tiles, wanted) * block_s
    num_splits = cdiv(num_pixels, chunk)
    return _Plan(group_c, block_k, block_c, block_s, chunk, num_splits, (num_blocks, num_splits, num_samples))


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, num_groups: int, eps: float, silu: bool,
    parts: Tensor | None, mean_NG: Tensor, rstd_NG: Tensor,
) -> Tensor:  # fmt: skip
    plan = _plan(x.shape[0], x.shape[1], x[0, 0].numel(), num_groups)
    y = torch.empty_like(x)
    flat, out = x.flatten(2), y.flatten(2)
    _apply_kernel[plan.grid](
        flat, flat if addend_NC is None else addend_NC, weight, bias, mean_NG if parts is None else parts,
        mean_NG, rstd_NG, out, x.shape[1], flat.shape[2], num_groups, *flat.stride(), *out.stride(),
        plan.chunk, plan.num_splits, eps,
        HAS_STATS=parts is None, HAS_ADDEND=addend_NC is not None, SILU=silu,
        BLOCK_S=plan.block_s, BLOCK_P=MAX_SPLITS, **plan.blocks,
    )  # fmt: skip
    return y


def group_norm_silu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd), without autograd; mean and rstd are (N, G) float32."""
    if not runs_kernel(x):
        z = to_compute(x) if addend_NC is None else to_compute(x) + to_compute(addend_NC)[..., *[None] * (x.dim() - 2)]
        var_NG, mean_NG = torch.var_mean(z.reshape(len(z), num_groups, -1), dim=2, correction=0)
        y = group_norm_silu_reference(x, weight, bias, addend_NC, num_groups, eps, silu)
        return y, mean_NG, (var_NG + eps).rsqrt()
    flat = x.flatten(2)
    num_samples, num_channels, num_pixels = flat.shape
    plan = _plan(num_samples, num_channels, num_pixels, num_groups)
    parts = torch.empty(num_samples, plan.num_splits, num_groups, 2, dtype=torch.float32, device=x.device)
    mean_NG, rstd_NG = (torch.empty(num_samples, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    _group_stats_kernel[plan.grid](
        flat, flat if addend_NC is None else addend_NC, parts, num_channels, num_pixels, num_groups, *flat.stride(),
        plan.chunk, HAS_ADDEND=addend_NC is not None, BLOCK_S=plan.block_s, **plan.blocks,
    )  # fmt: skip
    y = _apply(x, weight, bias, addend_NC, num_groups, eps, silu, parts, mean_NG, rstd_NG)
    return y, mean_NG, rstd_NG


def group_norm_silu_again(
    x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, mean_NG: Tensor, rstd_NG: Tensor,
    num_groups: int, eps: float, silu: bool,
) -> Tensor:  # fmt: skip
    """Return y once more from the statistics of the forward pass, the same bits."""
    if not runs_kernel(x):
        return group_norm_silu_reference(x, weight, bias, addend_NC, num_groups, eps, silu)
    return _apply(x, weight, bias, addend_NC, num_groups, eps, silu, None, mean_NG, rstd_NG)


def group_norm_silu_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, mean_NG: Tensor, rstd_NG: Tensor,
    num_groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return (dx, dweight, dbias, daddend)."""
    if not runs_kernel(x):

        def again(x, weight, bias, addend_NC):
            return group_norm_silu_reference(x, weight, bias, addend_NC, num_groups, eps, silu)

        return recomputed_gradients(again, (x, weight, bias, addend_NC), dy)
    flat, flat_dy = x.flatten(2), dy.flatten(2)
    num_samples, num_channels, num_pixels = flat.shape
    plan = _plan(num_samples, num_channels, num_pixels, num_groups)
    has_addend = addend_NC is not None
    sums = torch.empty(num_samples, plan.num_splits, 3, num_channels, dtype=torch.float32, device=x.device)
    means = torch.empty(num_samples, num_groups, 2, dtype=torch.float32, device=x.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    daddend_NC = torch.empty_like(addend_NC) if has_addend else None
    dx = torch.empty_like(x)
    flat_dx = dx.flatten(2)
    saved = (flat, addend_NC if has_addend else flat, weight, bias, mean_NG, rstd_NG)
    shape = (num_channels, num_pixels, num_groups)
    options = {"HAS_ADDEND": has_addend, **plan.blocks}
    _bwd_sums_kernel[plan.grid](
        flat_dy, *saved, sums, *shape, *flat_dy.stride(), *flat.stride(), plan.chunk,
        SILU=silu, BLOCK_S=plan.block_s, **options,
    )  # fmt: skip
    block_k = max(1, min(plan.block_k, REDUCE_TILE // (REDUCE_SPLITS * plan.block_c)))
    _bwd_reduce_kernel[(cdiv(num_groups, block_k),)](
        sums, weight, rstd_NG, means, dweight, dbias, daddend_NC if has_addend else means, num_samples, *shape,
        plan.num_splits, BLOCK_P=REDUCE_SPLITS, **{**options, "BLOCK_K": block_k},
    )  # fmt: skip
    _bwd_dx_kernel[plan.grid](
        flat_dy, *saved, means, flat_dx, *shape, *flat_dy.stride(), *flat.stride(), *flat_dx.stride(), plan.chunk,
        SILU=silu, BLOCK_S=plan.block_s, **options,
    )  # fmt: skip
    return dx, dweight, dbias, daddend_NC


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, addend_NC, num_groups, eps, silu):
        y, mean_NG, rstd_NG = group_norm_silu_fwd(x, weight, bias, addend_NC, num_groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, addend_NC, mean_NG, rstd_NG)
        ctx.options = (num_groups, eps, silu)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *group_norm_silu_bwd(dy, *ctx.saved_tensors, *ctx.options), None, None, None


def check_group_norm(x: Tensor, weight: Tensor, addend_NC: Tensor | None, num_groups: int) -> None:
    """Raise ValueError where shapes do not fit each other."""
    if x.dim() < 3 or x.numel() == 0:
        raise ValueError(f"group norm needs (N, C, pixels) with at least one of each, got {tuple(x.shape)}")
    if x.shape[1] % num_groups or weight.shape != x.shape[1:2]:
        raise ValueError(f"{x.shape[1]} channels do not fit {num_groups} groups and {tuple(weight.shape)} weights")
    if addend_NC is not None and addend_NC.shape != x.shape[:2]:
        raise ValueError(f"the addend has shape {tuple(addend_NC.shape)}; give it (N, C) = {tuple(x.shape[:2])}")


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, *, silu: bool = True,
    addend_NC: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return silu(group_norm(x + addend)), or without the SiLU.

    x: (N, C, H, W) or (N, C, L), fp32 | fp16 | bf16, channels-last or not -> the same shape, dtype and memory order.
    weight, bias: (C,); addend_NC: (N, C), taken in before the norm, in fp32. Raises ValueError for shapes that do not fit.
    """
    check_group_norm(x, weight, addend_NC, num_groups)
    addend_NC = None if addend_NC is None else addend_NC.contiguous()
    return _GroupNormSiLU.apply(with_flat_pixels(x), weight, bias, addend_NC, num_groups, eps, silu)
