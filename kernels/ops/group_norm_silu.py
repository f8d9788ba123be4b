"""GroupNorm with an optional addend before it and an optional SiLU after it: the norms of a UNet's residual blocks.

    z = x + addend      xhat = (z - mean) * rstd      u = weight * xhat + bias      y = silu(u) = u * sigmoid(u), or u

The addend is the time embedding: one value per sample and channel. x may be channels-last or NCHW in memory: both
are addressed through their strides, without a copy.

Saved for backward: x, the parameters, the addend, and fp32 mean and rstd. xhat and the SiLU are recomputed:

    du = dy * sigmoid(u) * (1 + u * (1 - sigmoid(u)))
    dx = rstd * (weight * du - mean_1 - xhat * mean_2)
    mean_1 = mean over the group of weight * du,  mean_2 = mean over the group of weight * du * xhat

Numerics: statistics are fp32. Within a tile they take two passes; tiles and splits are merged by Chan's formula, so a
large mean costs no digits. Partial results are merged in a fixed order, never with atomics.

Work split: a program takes BLOCK_K groups of one sample, that is (BLOCK_K, BLOCK_C) channels, and walks its pixels
BLOCK_S at a time; the grid is (group blocks, splits, samples). The plan depends on the shape alone, not on the GPU, so
results do not either. There are two forms:

    split   32 groups would leave most of a GPU idle at batch 1, so a group's pixels are divided among several programs.
            Forward takes two launches (partial statistics; merge and apply), backward three (partial sums; merge; dx).
    whole   A group of at most MAX_WHOLE elements belongs to one program, which reads it twice, the second time from its
            SM's cache: one launch forward, one backward. At batch 1 this leaves a large GPU's other SMs idle, but the
            split form's kernels would be over within microseconds too, and at batch 1 launches are what a step has too
            many of. Larger groups fall out of the cache and would keep their one program busy for too long.

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

from safelight.kernels.ops.column_sum import column_sum
from safelight.kernels.reference import channel_sum, recomputed_gradients, to_compute
from safelight.kernels.triton.jit import cdiv, kernel, next_power_of_2, runs_kernel, with_flat_pixels

if TYPE_CHECKING:
    import triton.language as tl

TILE = 2048  # elements a program holds at once: 16 a thread
TILE_CHANNELS = 128
MAX_WHOLE = 20480  # elements of a group in one program: 40 KiB in 16 bits, all of SD1.5's norms at 16 x 16 and below
WHOLE_TILE = 4096  # 8 elements a thread of 16 warps: SD1.5's largest such group takes 8 tiles
WHOLE_WARPS = 16
WHOLE_REGISTERS = 128  # the most a thread can have with 16 warps
REDUCE_TILE = 1024
REDUCE_SPLITS = 8
NUM_PROGRAMS = 512  # about four per SM of the largest GPU
MAX_SPLITS = 64


@kernel
def _channels(num_groups, GROUP_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the program's groups, (BLOCK_K,), its channels, (BLOCK_K, BLOCK_C), and the channels' mask."""
    group = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    within = tl.arange(0, BLOCK_C)
    valid = (group[:, None] < num_groups) & (within[None, :] < GROUP_C)
    return group, group[:, None] * GROUP_C + within[None, :], valid


@kernel
def _flat_channels(num_groups, GROUP_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the program's channels and their mask in one dimension, (BLOCK_K * BLOCK_C,), for loads and stores.

    Addressed as a three-dimensional tile, Triton 3.6 gives each thread one pixel of every group: the groups' sums and
    parameters then take up to 242 registers, and a warp's loads become short.
    """
    flat = tl.arange(0, BLOCK_K * BLOCK_C)
    group, within = tl.program_id(0) * BLOCK_K + flat // BLOCK_C, flat % BLOCK_C
    return group * GROUP_C + within, (group < num_groups) & (within < GROUP_C)


@kernel
def _tile(
    num_groups,
    stride_c,
    stride_s,
    start,
    end,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return a tile's element offsets within its sample and its mask, both (BLOCK_S, BLOCK_K * BLOCK_C)."""
    channel, valid = _flat_channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    s = start + tl.arange(0, BLOCK_S)
    offsets = s.to(tl.int64)[:, None] * stride_s + channel.to(tl.int64)[None, :] * stride_c
    return offsets, (s < end)[:, None] & valid[None, :]


@kernel
def _load_tile(
    ptr,
    num_groups,
    stride_n,
    stride_c,
    stride_s,
    start,
    end,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return a tile of the program's sample, (BLOCK_S, BLOCK_K, BLOCK_C) fp32, zero where masked, and its mask."""
    offsets, mask = _tile(num_groups, stride_c, stride_s, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
    values = tl.load(ptr + tl.program_id(2).to(tl.int64) * stride_n + offsets, mask=mask, other=0.0)
    values, mask = tl.reshape(values, (BLOCK_S, BLOCK_K, BLOCK_C)), tl.reshape(mask, (BLOCK_S, BLOCK_K, BLOCK_C))
    return values.to(tl.float32), mask


@kernel
def _store_tile(
    ptr,
    values,
    num_groups,
    stride_n,
    stride_c,
    stride_s,
    start,
    end,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write a tile of the program's sample, (BLOCK_S, BLOCK_K, BLOCK_C), in the dtype of ptr."""
    offsets, mask = _tile(num_groups, stride_c, stride_s, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
    at = ptr + tl.program_id(2).to(tl.int64) * stride_n + offsets
    values = tl.reshape(values.to(ptr.dtype.element_ty), (BLOCK_S, BLOCK_K * BLOCK_C))
    tl.store(at, values, mask=mask)


@kernel
def _load_columns(ptr, channel, valid):
    """Return one value per channel in fp32, (1, BLOCK_K, BLOCK_C)."""
    return tl.load(ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]


@kernel
def _sum(x, AXIS: tl.constexpr):
    """Return the sum over one axis."""
    return tl.reduce(x, AXIS, tl.standard._sum_combine)


@kernel
def _moments(
    x_ptr,
    addend,
    num_groups,
    stride_n,
    stride_c,
    stride_s,
    begin,
    end,
    HAS_ADDEND: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return each group's mean and sum of squared deviations over pixels begin to end, (BLOCK_K,) each."""
    mean = tl.full((BLOCK_K,), 0.0, tl.float32)
    m2 = tl.full((BLOCK_K,), 0.0, tl.float32)
    for start in range(begin, end, BLOCK_S):
        z, mask = _load_tile(
            x_ptr, num_groups, stride_n, stride_c, stride_s, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        if HAS_ADDEND:
            z = tl.where(mask, z + addend, 0.0)
        count = ((tl.minimum(end, start + BLOCK_S) - start) * GROUP_C).to(tl.float32)
        before = ((start - begin) * GROUP_C).to(tl.float32)
        tile_mean = _sum(_sum(z, 2), 0) / count
        deviation = tl.where(mask, z - tile_mean[None, :, None], 0.0)
        tile_m2 = _sum(_sum(deviation * deviation, 2), 0)
        # merge a (so far) with b (this tile), n = n_a + n_b, delta = mean_b - mean_a:
        # mean = mean_a + delta n_b / n;  m2 = m2_a + m2_b + delta^2 n_a n_b / n
        delta = tile_mean - mean
        mean += delta * (count / (before + count))
        m2 += tile_m2 + delta * delta * (before * count / (before + count))
    return mean, m2


@kernel(do_not_specialize=("C", "S", "num_groups", "chunk"))
def _group_stats_kernel(
    x_ptr,
    addend_ptr,
    parts_ptr,
    C,
    S,
    num_groups,
    stride_xn,
    stride_xc,
    stride_xs,
    chunk,
    HAS_ADDEND: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write each split's mean and sum of squared deviations to parts, (N, P, G, 2)."""
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    addend = _load_columns(addend_ptr + n * C, channel, valid) if HAS_ADDEND else 0.0
    end = tl.minimum((split + 1) * chunk, S)
    mean, m2 = _moments(
        x_ptr,
        addend,
        num_groups,
        stride_xn,
        stride_xc,
        stride_xs,
        split * chunk,
        end,
        HAS_ADDEND,
        GROUP_C,
        BLOCK_S,
        BLOCK_K,
        BLOCK_C,
    )
    part = ((n * tl.num_programs(1) + split) * num_groups + group) * 2
    tl.store(parts_ptr + part, mean, mask=group < num_groups)
    tl.store(parts_ptr + part + 1, m2, mask=group < num_groups)


@kernel
def _merged_stats(
    parts_ptr, n, group, S, num_groups, chunk, num_splits, eps, GROUP_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Return mean and rstd merged over a sample's splits, (BLOCK_K,) each."""
    p = tl.arange(0, BLOCK_P)
    part = ((n * num_splits + p[:, None]) * num_groups + group[None, :]) * 2
    mask = (p[:, None] < num_splits) & (group[None, :] < num_groups)
    part_mean = tl.load(parts_ptr + part, mask=mask, other=0.0)
    part_m2 = tl.load(parts_ptr + part + 1, mask=mask, other=0.0)
    count = (tl.maximum(tl.minimum(S - p * chunk, chunk), 0) * GROUP_C).to(tl.float32)[:, None]
    total = S * 1.0 * GROUP_C
    mean = _sum(part_mean * (count / total), 0)
    deviation = tl.where(mask, part_mean - mean[None, :], 0.0)
    m2 = _sum(part_m2 + count * deviation * deviation, 0)
    return mean, 1.0 / tl.sqrt_rn(m2 / total + eps)


@kernel(do_not_specialize=("C", "S", "num_groups", "chunk", "num_splits"))
def _apply_kernel(
    x_ptr,
    addend_ptr,
    weight_ptr,
    bias_ptr,
    parts_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    C,
    S,
    num_groups,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_yn,
    stride_yc,
    stride_ys,
    chunk,
    num_splits,
    eps,
    STATS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    SILU: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write y. STATS says where mean and rstd, (N, G), come from.

    "given": read; "parts": merged from the splits' partial results, and written; "whole": computed from x, and written.
    """
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    at, in_range = n * num_groups + group, group < num_groups
    addend = _load_columns(addend_ptr + n * C, channel, valid) if HAS_ADDEND else 0.0
    end = tl.minimum((split + 1) * chunk, S)
    if STATS == "given":
        mean = tl.load(mean_ptr + at, mask=in_range, other=0.0)
        rstd = tl.load(rstd_ptr + at, mask=in_range, other=0.0)
    else:
        if STATS == "whole":
            mean, m2 = _moments(
                x_ptr,
                addend,
                num_groups,
                stride_xn,
                stride_xc,
                stride_xs,
                split * chunk,
                end,
                HAS_ADDEND,
                GROUP_C,
                BLOCK_S,
                BLOCK_K,
                BLOCK_C,
            )
            rstd = 1.0 / tl.sqrt_rn(m2 / (S * 1.0 * GROUP_C) + eps)
        else:
            mean, rstd = _merged_stats(parts_ptr, n, group, S, num_groups, chunk, num_splits, eps, GROUP_C, BLOCK_P)
        if split == 0:
            tl.store(mean_ptr + at, mean, mask=in_range)
            tl.store(rstd_ptr + at, rstd, mask=in_range)
    weight, bias = _load_columns(weight_ptr, channel, valid), _load_columns(bias_ptr, channel, valid)
    for start in range(split * chunk, end, BLOCK_S):
        z, _mask = _load_tile(
            x_ptr, num_groups, stride_xn, stride_xc, stride_xs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        if HAS_ADDEND:
            z = z + addend
        u = (z - mean[None, :, None]) * rstd[None, :, None] * weight + bias
        if SILU:
            u = u / (1.0 + tl.exp(-u))
        _store_tile(
            y_ptr, u, num_groups, stride_yn, stride_yc, stride_ys, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )


@kernel
def _saved(
    addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group, channel, valid, C, num_groups, HAS_ADDEND: tl.constexpr
):
    """Return (addend, weight, bias, mean, rstd) of a program's sample and groups, each broadcastable to a tile."""
    n = tl.program_id(2).to(tl.int64)
    at, in_range = n * num_groups + group, group < num_groups
    mean = tl.load(mean_ptr + at, mask=in_range, other=0.0)[None, :, None]
    rstd = tl.load(rstd_ptr + at, mask=in_range, other=0.0)[None, :, None]
    weight, bias = _load_columns(weight_ptr, channel, valid), _load_columns(bias_ptr, channel, valid)
    addend = _load_columns(addend_ptr + n * C, channel, valid) if HAS_ADDEND else 0.0
    return addend, weight, bias, mean, rstd


@kernel
def _du(dy, xhat, weight, bias, SILU: tl.constexpr):
    """Return du, the gradient of the norm's output before SiLU; zero wherever dy is, so also where a tile is masked."""
    if SILU:
        u = xhat * weight + bias
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        # du = dy * sigmoid(u) * (1 + u * (1 - sigmoid(u)))
        dy = dy * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return dy


@kernel
def _sums(
    dy_ptr,
    x_ptr,
    addend,
    weight,
    bias,
    mean,
    rstd,
    num_groups,
    stride_dyn,
    stride_dyc,
    stride_dys,
    stride_xn,
    stride_xc,
    stride_xs,
    begin,
    end,
    HAS_ADDEND: tl.constexpr,
    SILU: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return the sums over pixels begin to end of du, du * xhat and (with an addend) xhat, (BLOCK_K, BLOCK_C) each."""
    sum_du = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    sum_du_xhat = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    sum_xhat = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    for start in range(begin, end, BLOCK_S):
        z, mask = _load_tile(
            x_ptr, num_groups, stride_xn, stride_xc, stride_xs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        if HAS_ADDEND:
            z = z + addend
        dy, _mask = _load_tile(
            dy_ptr, num_groups, stride_dyn, stride_dyc, stride_dys, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        xhat = tl.where(mask, (z - mean) * rstd, 0.0)
        du = _du(dy, xhat, weight, bias, SILU)
        sum_du += _sum(du, 0)
        sum_du_xhat += _sum(du * xhat, 0)
        if HAS_ADDEND:
            sum_xhat += _sum(xhat, 0)
    return sum_du, sum_du_xhat, sum_xhat


@kernel(do_not_specialize=("C", "S", "num_groups", "chunk"))
def _bwd_sums_kernel(
    dy_ptr,
    x_ptr,
    addend_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    C,
    S,
    num_groups,
    stride_dyn,
    stride_dyc,
    stride_dys,
    stride_xn,
    stride_xc,
    stride_xs,
    chunk,
    HAS_ADDEND: tl.constexpr,
    SILU: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write each split's sums over pixels of du, du * xhat and (with an addend) xhat to sums, (N, P, 3, C)."""
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    addend, weight, bias, mean, rstd = _saved(
        addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group, channel, valid, C, num_groups, HAS_ADDEND
    )
    sum_du, sum_du_xhat, sum_xhat = _sums(
        dy_ptr,
        x_ptr,
        addend,
        weight,
        bias,
        mean,
        rstd,
        num_groups,
        stride_dyn,
        stride_dyc,
        stride_dys,
        stride_xn,
        stride_xc,
        stride_xs,
        split * chunk,
        tl.minimum((split + 1) * chunk, S),
        HAS_ADDEND,
        SILU,
        GROUP_C,
        BLOCK_S,
        BLOCK_K,
        BLOCK_C,
    )
    row = (n * tl.num_programs(1) + split) * 3 * C
    tl.store(sums_ptr + row + channel, sum_du, mask=valid)
    tl.store(sums_ptr + row + C + channel, sum_du_xhat, mask=valid)
    if HAS_ADDEND:
        tl.store(sums_ptr + row + 2 * C + channel, sum_xhat, mask=valid)


@kernel
def _group_means(weight, sum_du, sum_du_xhat, size):
    """Return the two means over a group's elements that dx needs, (BLOCK_K,) each."""
    # mean_1 = mean(weight * du), mean_2 = mean(weight * du * xhat)
    return _sum(weight * sum_du, 1) / size, _sum(weight * sum_du_xhat, 1) / size


@kernel
def _daddend(weight, rstd, mean_1, mean_2, sum_du, sum_xhat, S):
    """Return the addend's gradient, (BLOCK_K, BLOCK_C)."""
    # daddend = sum over s of dx = rstd * (weight * sum du - S * mean_1 - mean_2 * sum xhat)
    return rstd[:, None] * (weight * sum_du - S * mean_1[:, None] - mean_2[:, None] * sum_xhat)


@kernel
def _sum_of_parts(at, mask, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the sum over splits, (BLOCK_K, BLOCK_C), of the values at addresses at, (BLOCK_P, BLOCK_K * BLOCK_C)."""
    return _sum(tl.reshape(tl.load(at, mask=mask, other=0.0), (BLOCK_P, BLOCK_K, BLOCK_C)), 0)


@kernel(do_not_specialize=("N", "C", "S", "num_groups", "num_splits"))
def _bwd_reduce_kernel(
    sums_ptr,
    weight_ptr,
    rstd_ptr,
    means_ptr,
    dweight_ptr,
    dbias_ptr,
    daddend_ptr,
    N,
    C,
    S,
    num_groups,
    num_splits,
    HAS_ADDEND: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge the splits' sums; write dweight, dbias (C,), daddend (N, C), and means (N, G, 2), the two that dx needs."""
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    flat_channel, flat_valid = _flat_channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    dweight = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    dbias = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    size = S * 1.0 * GROUP_C
    for i in range(N):
        # the loop variable is int32; offsets must be int64
        n = i + tl.full((), 0, tl.int64)
        sum_du = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
        sum_du_xhat = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
        sum_xhat = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
        for start in range(0, num_splits, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < num_splits)[:, None] & flat_valid[None, :]
            part = (n * num_splits + p[:, None]) * 3 * C + flat_channel[None, :]
            sum_du += _sum_of_parts(sums_ptr + part, mask, BLOCK_P, BLOCK_K, BLOCK_C)
            sum_du_xhat += _sum_of_parts(sums_ptr + part + C, mask, BLOCK_P, BLOCK_K, BLOCK_C)
            if HAS_ADDEND:
                sum_xhat += _sum_of_parts(sums_ptr + part + 2 * C, mask, BLOCK_P, BLOCK_K, BLOCK_C)
        # dbias = sum over n, s of du;  dweight = sum over n, s of du * xhat
        dbias += sum_du
        dweight += sum_du_xhat
        mean_1, mean_2 = _group_means(weight, sum_du, sum_du_xhat, size)
        at = n * num_groups + group
        tl.store(means_ptr + at * 2, mean_1, mask=group < num_groups)
        tl.store(means_ptr + at * 2 + 1, mean_2, mask=group < num_groups)
        if HAS_ADDEND:
            rstd = tl.load(rstd_ptr + at, mask=group < num_groups, other=0.0)
            daddend = _daddend(weight, rstd, mean_1, mean_2, sum_du, sum_xhat, S)
            tl.store(daddend_ptr + n * C + channel, daddend.to(daddend_ptr.dtype.element_ty), mask=valid)
    tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=valid)
    tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=valid)


@kernel
def _store_dx(
    dy_ptr,
    ds_ptr,
    x_ptr,
    dx_ptr,
    addend,
    weight,
    bias,
    mean,
    rstd,
    mean_1,
    mean_2,
    num_groups,
    stride_dyn,
    stride_dyc,
    stride_dys,
    stride_dsn,
    stride_dsc,
    stride_dss,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_dxn,
    stride_dxc,
    stride_dxs,
    begin,
    end,
    HAS_ADDEND: tl.constexpr,
    HAS_DS: tl.constexpr,
    SILU: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write dx of pixels begin to end, including ds if there is one; return the sum of ds over them."""
    sum_ds = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    for start in range(begin, end, BLOCK_S):
        z, _mask = _load_tile(
            x_ptr, num_groups, stride_xn, stride_xc, stride_xs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        dy, _mask = _load_tile(
            dy_ptr, num_groups, stride_dyn, stride_dyc, stride_dys, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        if HAS_ADDEND:
            z = z + addend
        xhat = (z - mean) * rstd
        du = _du(dy, xhat, weight, bias, SILU)
        # dx = rstd * (weight * du - mean_1 - xhat * mean_2) + ds
        dx = rstd * (weight * du - mean_1[None, :, None] - xhat * mean_2[None, :, None])
        if HAS_DS:
            ds, _mask = _load_tile(
                ds_ptr, num_groups, stride_dsn, stride_dsc, stride_dss, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
            )
            dx += ds
            sum_ds += _sum(ds, 0)
        _store_tile(
            dx_ptr, dx, num_groups, stride_dxn, stride_dxc, stride_dxs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
    return sum_ds


@kernel(do_not_specialize=("C", "S", "num_groups", "chunk"))
def _bwd_dx_kernel(
    dy_ptr,
    ds_ptr,
    x_ptr,
    addend_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    dx_ptr,
    C,
    S,
    num_groups,
    stride_dyn,
    stride_dyc,
    stride_dys,
    stride_dsn,
    stride_dsc,
    stride_dss,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_dxn,
    stride_dxc,
    stride_dxs,
    chunk,
    HAS_ADDEND: tl.constexpr,
    HAS_DS: tl.constexpr,
    SILU: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write dx of one split, from the two means that _bwd_reduce_kernel wrote."""
    split = tl.program_id(1)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    addend, weight, bias, mean, rstd = _saved(
        addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group, channel, valid, C, num_groups, HAS_ADDEND
    )
    at = (tl.program_id(2).to(tl.int64) * num_groups + group) * 2
    mean_1 = tl.load(means_ptr + at, mask=group < num_groups, other=0.0)
    mean_2 = tl.load(means_ptr + at + 1, mask=group < num_groups, other=0.0)
    _store_dx(
        dy_ptr,
        ds_ptr,
        x_ptr,
        dx_ptr,
        addend,
        weight,
        bias,
        mean,
        rstd,
        mean_1,
        mean_2,
        num_groups,
        stride_dyn,
        stride_dyc,
        stride_dys,
        stride_dsn,
        stride_dsc,
        stride_dss,
        stride_xn,
        stride_xc,
        stride_xs,
        stride_dxn,
        stride_dxc,
        stride_dxs,
        split * chunk,
        tl.minimum((split + 1) * chunk, S),
        HAS_ADDEND,
        HAS_DS,
        SILU,
        GROUP_C,
        BLOCK_S,
        BLOCK_K,
        BLOCK_C,
    )


@kernel(do_not_specialize=("C", "S", "num_groups"))
def _bwd_whole_kernel(
    dy_ptr,
    ds_ptr,
    x_ptr,
    addend_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    daddend_ptr,
    sum_ds_ptr,
    dx_ptr,
    C,
    S,
    num_groups,
    stride_dyn,
    stride_dyc,
    stride_dys,
    stride_dsn,
    stride_dsc,
    stride_dss,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_dxn,
    stride_dxc,
    stride_dxs,
    HAS_ADDEND: tl.constexpr,
    HAS_DS: tl.constexpr,
    SILU: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The whole backward pass in one launch: write dx, and each sample's dweight, dbias, daddend, sum of ds, (N, C)."""
    # there is one split, so its number is also its first pixel
    begin = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    addend, weight, bias, mean, rstd = _saved(
        addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group, channel, valid, C, num_groups, HAS_ADDEND
    )
    sum_du, sum_du_xhat, sum_xhat = _sums(
        dy_ptr,
        x_ptr,
        addend,
        weight,
        bias,
        mean,
        rstd,
        num_groups,
        stride_dyn,
        stride_dyc,
        stride_dys,
        stride_xn,
        stride_xc,
        stride_xs,
        begin,
        S,
        HAS_ADDEND,
        SILU,
        GROUP_C,
        BLOCK_S,
        BLOCK_K,
        BLOCK_C,
    )
    column_weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    mean_1, mean_2 = _group_means(column_weight, sum_du, sum_du_xhat, S * 1.0 * GROUP_C)
    # dbias = sum over s of du;  dweight = sum over s of du * xhat
    tl.store(dweight_ptr + n * C + channel, sum_du_xhat.to(dweight_ptr.dtype.element_ty), mask=valid)
    tl.store(dbias_ptr + n * C + channel, sum_du.to(dbias_ptr.dtype.element_ty), mask=valid)
    if HAS_ADDEND:
        group_rstd = tl.load(rstd_ptr + n * num_groups + group, mask=group < num_groups, other=0.0)
        daddend = _daddend(column_weight, group_rstd, mean_1, mean_2, sum_du, sum_xhat, S)
        tl.store(daddend_ptr + n * C + channel, daddend.to(daddend_ptr.dtype.element_ty), mask=valid)
    sum_ds = _store_dx(
        dy_ptr,
        ds_ptr,
        x_ptr,
        dx_ptr,
        addend,
        weight,
        bias,
        mean,
        rstd,
        mean_1,
        mean_2,
        num_groups,
        stride_dyn,
        stride_dyc,
        stride_dys,
        stride_dsn,
        stride_dsc,
        stride_dss,
        stride_xn,
        stride_xc,
        stride_xs,
        stride_dxn,
        stride_dxc,
        stride_dxs,
        begin,
        S,
        HAS_ADDEND,
        HAS_DS,
        SILU,
        GROUP_C,
        BLOCK_S,
        BLOCK_K,
        BLOCK_C,
    )
    if HAS_DS:
        tl.store(sum_ds_ptr + n * C + channel, sum_ds.to(sum_ds_ptr.dtype.element_ty), mask=valid)


@dataclass(frozen=True)
class _Plan:
    """How a shape is divided among programs."""

    group_c: int
    block_k: int
    block_c: int
    block_s: int
    reduce_k: int  # groups per program of the kernel that merges the splits
    chunk: int  # pixels per split
    num_splits: int
    grid: tuple[int, int, int]
    num_warps: int = 4
    is_whole: bool = False  # one program per group

    @property
    def blocks(self) -> dict[str, int]:
        warps = {} if self.num_warps == 4 else {"num_warps": self.num_warps}
        return {"GROUP_C": self.group_c, "BLOCK_K": self.block_k, "BLOCK_C": self.block_c, **warps}


def _plan(num_samples: int, num_channels: int, num_pixels: int, num_groups: int, may_be_whole: bool = True) -> _Plan:
    """Return the plan of a shape. may_be_whole: allow one program per group; False where nothing is reduced."""
    group_c = num_channels // num_groups
    block_c = next_power_of_2(group_c)
    if may_be_whole and num_pixels * group_c <= MAX_WHOLE:
        block_s = max(1, min(WHOLE_TILE // block_c, next_power_of_2(num_pixels)))
        num_warps = min(max(4, block_s * block_c // 256), WHOLE_WARPS)
        chunk = cdiv(num_pixels, block_s) * block_s
        return _Plan(group_c, 1, block_c, block_s, 1, chunk, 1, (num_groups, 1, num_samples), num_warps, True)
    block_k = min(max(1, TILE_CHANNELS // block_c), next_power_of_2(num_groups))
    reduce_k = max(1, min(block_k, REDUCE_TILE // (REDUCE_SPLITS * block_c)))
    block_s = max(1, min(TILE // (block_k * block_c), next_power_of_2(num_pixels)))
    num_blocks = cdiv(num_groups, block_k)
    num_tiles = cdiv(num_pixels, block_s)
    max_splits = min(MAX_SPLITS, num_tiles, cdiv(NUM_PROGRAMS, num_samples * num_blocks))
    chunk = cdiv(num_tiles, max_splits) * block_s
    num_splits = cdiv(num_pixels, chunk)
    return _Plan(group_c, block_k, block_c, block_s, reduce_k, chunk, num_splits, (num_blocks, num_splits, num_samples))


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    addend_NC: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    parts: Tensor | None,
    mean_NG: Tensor,
    rstd_NG: Tensor,
    stats: str,
) -> Tensor:
    """Launch _apply_kernel and return y; stats as its STATS."""
    plan = _plan(x.shape[0], x.shape[1], x[0, 0].numel(), num_groups, may_be_whole=stats != "given")
    y = torch.empty_like(x)
    flat, out = x.flatten(2), y.flatten(2)
    _apply_kernel[plan.grid](
        flat,
        flat if addend_NC is None else addend_NC,
        weight,
        bias,
        mean_NG if parts is None else parts,
        mean_NG,
        rstd_NG,
        out,
        x.shape[1],
        flat.shape[2],
        num_groups,
        *flat.stride(),
        *out.stride(),
        plan.chunk,
        plan.num_splits,
        eps,
        STATS=stats,
        HAS_ADDEND=addend_NC is not None,
        SILU=silu,
        BLOCK_S=plan.block_s,
        BLOCK_P=MAX_SPLITS,
        **plan.blocks,
    )
    return y


def group_norm_silu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd), without autograd; mean and rstd are (N, G) float32. Arguments as `group_norm_silu`."""
    if not runs_kernel(x):
        z = to_compute(x) if addend_NC is None else to_compute(x) + to_compute(addend_NC)[..., *[None] * (x.dim() - 2)]
        var_NG, mean_NG = torch.var_mean(z.reshape(len(z), num_groups, -1), dim=2, correction=0)
        y = group_norm_silu_reference(x, weight, bias, addend_NC, num_groups, eps, silu)
        return y, mean_NG, (var_NG + eps).rsqrt()
    flat = x.flatten(2)
    num_samples, num_channels, num_pixels = flat.shape
    plan = _plan(num_samples, num_channels, num_pixels, num_groups)
    mean_NG, rstd_NG = (torch.empty(num_samples, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = (x, weight, bias, addend_NC, num_groups, eps, silu)
    if plan.is_whole:
        return _apply(*arguments, None, mean_NG, rstd_NG, "whole"), mean_NG, rstd_NG
    parts = torch.empty(num_samples, plan.num_splits, num_groups, 2, dtype=torch.float32, device=x.device)
    _group_stats_kernel[plan.grid](
        flat,
        flat if addend_NC is None else addend_NC,
        parts,
        num_channels,
        num_pixels,
        num_groups,
        *flat.stride(),
        plan.chunk,
        HAS_ADDEND=addend_NC is not None,
        BLOCK_S=plan.block_s,
        **plan.blocks,
    )
    return _apply(*arguments, parts, mean_NG, rstd_NG, "parts"), mean_NG, rstd_NG


def group_norm_silu_recompute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    addend_NC: Tensor | None,
    mean_NG: Tensor,
    rstd_NG: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Return y again from the saved statistics, bit for bit as in the forward pass."""
    if not runs_kernel(x):
        return group_norm_silu_reference(x, weight, bias, addend_NC, num_groups, eps, silu)
    return _apply(x, weight, bias, addend_NC, num_groups, eps, silu, None, mean_NG, rstd_NG, "given")


def group_norm_silu_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    addend_NC: Tensor | None,
    mean_NG: Tensor,
    rstd_NG: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    *,
    ds: Tensor | None = None,
    sum_ds: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias, daddend), followed with sum_ds by the sum of ds over samples and pixels, (C,).

    ds: the gradient that reaches x by another path, such as a skip connection, or None; it is added to dx.
    """
    if not runs_kernel(x):

        def forward(x, weight, bias, addend_NC):
            return group_norm_silu_reference(x, weight, bias, addend_NC, num_groups, eps, silu)

        dx, *rest = recomputed_gradients(forward, (x, weight, bias, addend_NC), dy)
        return dx if ds is None else dx + ds, *rest, *([channel_sum(ds)] if sum_ds else ())
    num_samples, num_channels, num_pixels = x.flatten(2).shape
    plan = _plan(num_samples, num_channels, num_pixels, num_groups)
    has_addend, has_ds = addend_NC is not None, ds is not None
    daddend_NC = torch.empty_like(addend_NC) if has_addend else None
    dx = torch.empty_like(x)
    flat, flat_dy, flat_dx = x.flatten(2), dy.flatten(2), dx.flatten(2)
    flat_ds = with_flat_pixels(ds).flatten(2) if has_ds else flat_dy
    saved = (flat, addend_NC if has_addend else flat, weight, bias, mean_NG, rstd_NG)
    shape = (num_channels, num_pixels, num_groups)
    strides = (*flat_dy.stride(), *flat_ds.stride(), *flat.stride(), *flat_dx.stride())
    options = {"HAS_ADDEND": has_addend, **plan.blocks}
    if plan.is_whole:
        # with one sample these are the parameters' gradients; with several they are summed over samples below
        dtype = weight.dtype if num_samples == 1 else torch.float32
        parts = torch.empty(2 + has_ds, num_samples, num_channels, dtype=dtype, device=x.device)
        # without maxnreg the assembler aims at 64 registers a thread on sm_75 and sm_80, and spills
        _bwd_whole_kernel[plan.grid](
            flat_dy,
            flat_ds,
            *saved,
            parts[0],
            parts[1],
            daddend_NC if has_addend else parts,
            parts[-1],
            flat_dx,
            *shape,
            *strides,
            HAS_DS=has_ds,
            SILU=silu,
            BLOCK_S=plan.block_s,
            maxnreg=WHOLE_REGISTERS,
            **options,
        )
        dweight, dbias, *total = parts[:, 0] if num_samples == 1 else column_sum(parts, weight.dtype)
        return dx, dweight, dbias, daddend_NC, *(total if sum_ds else ())
    sums = torch.empty(num_samples, plan.num_splits, 3, num_channels, dtype=torch.float32, device=x.device)
    means = torch.empty(num_samples, num_groups, 2, dtype=torch.float32, device=x.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    _bwd_sums_kernel[plan.grid](
        flat_dy,
        *saved,
        sums,
        *shape,
        *flat_dy.stride(),
        *flat.stride(),
        plan.chunk,
        SILU=silu,
        BLOCK_S=plan.block_s,
        **options,
    )
    _bwd_reduce_kernel[(cdiv(num_groups, plan.reduce_k),)](
        sums,
        weight,
        rstd_NG,
        means,
        dweight,
        dbias,
        daddend_NC if has_addend else means,
        num_samples,
        *shape,
        plan.num_splits,
        BLOCK_P=REDUCE_SPLITS,
        **{**options, "BLOCK_K": plan.reduce_k},
    )
    _bwd_dx_kernel[plan.grid](
        flat_dy,
        flat_ds,
        *saved,
        means,
        flat_dx,
        *shape,
        *strides,
        plan.chunk,
        HAS_DS=has_ds,
        SILU=silu,
        BLOCK_S=plan.block_s,
        **options,
    )
    return dx, dweight, dbias, daddend_NC, *([channel_sum(ds)] if sum_ds else ())


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


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """Return y in plain PyTorch; arguments as `group_norm_silu`."""
    z = to_compute(x)
    if addend_NC is not None:
        z = z + to_compute(addend_NC).reshape(*addend_NC.shape, *[1] * (x.dim() - 2))
    u = F.group_norm(z, num_groups, to_compute(weight), to_compute(bias), eps)
    return (F.silu(u) if silu else u).to(x.dtype)


def check_group_norm(x: Tensor, weight: Tensor, addend_NC: Tensor | None, num_groups: int) -> None:
    """Raise ValueError if the shapes do not fit each other."""
    if x.dim() < 3 or x.numel() == 0:
        raise ValueError(f"group norm takes (N, C, pixels), none of them empty; got {tuple(x.shape)}")
    if x.shape[1] % num_groups or weight.shape != x.shape[1:2]:
        raise ValueError(f"{x.shape[1]} channels do not fit {num_groups} groups and {tuple(weight.shape)} weights")
    if addend_NC is not None and addend_NC.shape != x.shape[:2]:
        raise ValueError(f"the addend has shape {tuple(addend_NC.shape)}; give it (N, C) = {tuple(x.shape[:2])}")


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    addend_NC: Tensor | None = None,
) -> Tensor:
    """Return silu(group_norm(x + addend)), or group_norm(x + addend) with silu=False.

    x: (N, C, H, W) or (N, C, L), fp32 | fp16 | bf16, channels-last or not -> the same shape, dtype and memory order.
    weight, bias: (C,); addend_NC: (N, C), added in fp32. Raises ValueError for shapes that do not fit.
    Source: Wu and He 2018, arXiv:1803.08494; matches torch.nn.functional.group_norm.
    """
    check_group_norm(x, weight, addend_NC, num_groups)
    addend_NC = None if addend_NC is None else addend_NC.contiguous()
    return _GroupNormSiLU.apply(with_flat_pixels(x), weight, bias, addend_NC, num_groups, eps, silu)
