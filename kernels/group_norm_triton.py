"""The Triton kernels of kernels/group_norm_silu.py: the forward pass, and the tiles that both passes go by.

A program takes some groups of one sample, (BLOCK_K, BLOCK_C) channels, and the pixels of one split, BLOCK_S at a time; its
place in the grid is (groups, split, sample). The splits of a sample leave partial results, which are merged in their order.
Where a group is one program's, that goes over it twice and leaves no parts ("whole").
Letters: N batch, C channels, S pixels, G groups; P splits of S; K groups of a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel
def _channels(num_groups, GROUP_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the program's groups, (BLOCK_K,), its channels, (BLOCK_K, BLOCK_C), and their mask."""
    group = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    within = tl.arange(0, BLOCK_C)
    valid = (group[:, None] < num_groups) & (within[None, :] < GROUP_C)
    return group, group[:, None] * GROUP_C + within[None, :], valid


@kernel
def _flat_channels(num_groups, GROUP_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the program's channels and their mask as one dimension, (BLOCK_K * BLOCK_C,).

    Memory is read and written by them: of a tile's three dimensions Triton 3.6 would give each thread one pixel of all the
    groups, whose sums and parameters take it up to 242 registers, and a warp's loads would be short.
    """
    flat = tl.arange(0, BLOCK_K * BLOCK_C)
    group, within = tl.program_id(0) * BLOCK_K + flat // BLOCK_C, flat % BLOCK_C
    return group * GROUP_C + within, (group < num_groups) & (within < GROUP_C)


@kernel
def _tile(
    num_groups, stride_c, stride_s, start, end,
    GROUP_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return a tile's element offsets within its sample, and its mask, (BLOCK_S, BLOCK_K * BLOCK_C)."""
    channel, valid = _flat_channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    s = start + tl.arange(0, BLOCK_S)
    offsets = s.to(tl.int64)[:, None] * stride_s + channel.to(tl.int64)[None, :] * stride_c
    return offsets, (s < end)[:, None] & valid[None, :]


@kernel
def _load_tile(
    ptr, num_groups, stride_n, stride_c, stride_s, start, end,
    GROUP_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return a tile of the program's sample in fp32, (BLOCK_S, BLOCK_K, BLOCK_C), zero beyond its end, and its mask."""
    offsets, mask = _tile(num_groups, stride_c, stride_s, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
    values = tl.load(ptr + tl.program_id(2).to(tl.int64) * stride_n + offsets, mask=mask, other=0.0)
    values, mask = tl.reshape(values, (BLOCK_S, BLOCK_K, BLOCK_C)), tl.reshape(mask, (BLOCK_S, BLOCK_K, BLOCK_C))
    return values.to(tl.float32), mask


@kernel
def _store_tile(
    ptr, values, num_groups, stride_n, stride_c, stride_s, start, end,
    GROUP_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a tile of the program's sample, (BLOCK_S, BLOCK_K, BLOCK_C), in the tensor's dtype."""
    offsets, mask = _tile(num_groups, stride_c, stride_s, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C)
    at = ptr + tl.program_id(2).to(tl.int64) * stride_n + offsets
    values = tl.reshape(values.to(ptr.dtype.element_ty), (BLOCK_S, BLOCK_K * BLOCK_C))
    tl.store(at, values, mask=mask)


@kernel
def _load_columns(ptr, channel, valid):
    """Return a value a channel in fp32, (1, BLOCK_K, BLOCK_C)."""
    return tl.load(ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :, :]


@kernel
def _sum(x, AXIS: tl.constexpr):
    """Return the sums over one axis."""
    return tl.reduce(x, AXIS, tl.standard._sum_combine)


@kernel
def _moments(
    x_ptr, addend, num_groups, stride_n, stride_c, stride_s, begin, end,
    HAS_ADDEND: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return mean and sum of squared deviations of the pixels from begin to end, (BLOCK_K,)."""
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
        # merged mean = mean + delta n_b / n;  merged m2 = m2_a + m2_b + delta^2 n_a n_b / n
        delta = tile_mean - mean
        mean += delta * (count / (before + count))
        m2 += tile_m2 + delta * delta * (before * count / (before + count))
    return mean, m2


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
    addend = _load_columns(addend_ptr + n * C, channel, valid) if HAS_ADDEND else 0.0
    end = tl.minimum((split + 1) * chunk, S)
    mean, m2 = _moments(
        x_ptr, addend, num_groups, stride_xn, stride_xc, stride_xs, split * chunk, end,
        HAS_ADDEND, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C,
    )  # fmt: skip
    part = ((n * tl.num_programs(1) + split) * num_groups + group) * 2
    tl.store(parts_ptr + part, mean, mask=group < num_groups)
    tl.store(parts_ptr + part + 1, m2, mask=group < num_groups)


@kernel
def _merged_stats(
    parts_ptr, n, group, S, num_groups, chunk, num_splits, eps, GROUP_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Return mean and rstd of the splits' parts, (BLOCK_K,)."""
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


@kernel(varying=("C", "S", "num_groups", "chunk", "num_splits"))
def _apply_kernel(
    x_ptr, addend_ptr, weight_ptr, bias_ptr, parts_ptr, mean_ptr, rstd_ptr, y_ptr, C, S, num_groups,
    stride_xn, stride_xc, stride_xs, stride_yn, stride_yc, stride_ys, chunk, num_splits, eps,
    STATS: tl.constexpr, HAS_ADDEND: tl.constexpr, SILU: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write y. STATS: mean and rstd, (N, G), are "given", or written: merged of "parts", or made of x where it is "whole"."""
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
                x_ptr, addend, num_groups, stride_xn, stride_xc, stride_xs, split * chunk, end,
                HAS_ADDEND, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C,
            )  # fmt: skip
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
