"""The Triton kernels of kernels/group_norm_silu.py: the backward pass, in tiles as the forward pass.

Split, a group takes three launches: each split's sums over its pixels, their merging in the splits' order, dx. Where a group
is one program's ("whole"), that goes over it twice and does all three.
Letters: N batch, C channels, S pixels, G groups; P splits of S; K groups of a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.kernels.group_norm_triton import _channels, _flat_channels, _load_columns, _load_tile, _store_tile, _sum
from safelight.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel
def _saved(
    addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group, channel, valid, C, num_groups, HAS_ADDEND: tl.constexpr
):
    """Return (addend, weight, bias, mean, rstd) of a program's sample and groups, each to go with a tile."""
    n = tl.program_id(2).to(tl.int64)
    at, in_range = n * num_groups + group, group < num_groups
    mean = tl.load(mean_ptr + at, mask=in_range, other=0.0)[None, :, None]
    rstd = tl.load(rstd_ptr + at, mask=in_range, other=0.0)[None, :, None]
    weight, bias = _load_columns(weight_ptr, channel, valid), _load_columns(bias_ptr, channel, valid)
    addend = _load_columns(addend_ptr + n * C, channel, valid) if HAS_ADDEND else 0.0
    return addend, weight, bias, mean, rstd


@kernel
def _du(dy, xhat, weight, bias, SILU: tl.constexpr):
    """Return the gradient of u, the norm's output before SiLU; zero where dy is, as beyond a tile's end."""
    if SILU:
        u = xhat * weight + bias
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        # du = dy * sigmoid(u) * (1 + u * (1 - sigmoid(u)))
        dy = dy * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return dy


@kernel
def _sums(
    dy_ptr, x_ptr, addend, weight, bias, mean, rstd, num_groups,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, begin, end,
    HAS_ADDEND: tl.constexpr, SILU: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the sums over pixels from begin to end of du, du * xhat and (with an addend) xhat, (BLOCK_K, BLOCK_C)."""
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
            dy_ptr, num_groups, stride_gn, stride_gc, stride_gs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        xhat = tl.where(mask, (z - mean) * rstd, 0.0)
        du = _du(dy, xhat, weight, bias, SILU)
        sum_du += _sum(du, 0)
        sum_du_xhat += _sum(du * xhat, 0)
        if HAS_ADDEND:
            sum_xhat += _sum(xhat, 0)
    return sum_du, sum_du_xhat, sum_xhat


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
    addend, weight, bias, mean, rstd = _saved(
        addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group, channel, valid, C, num_groups, HAS_ADDEND
    )
    sum_du, sum_du_xhat, sum_xhat = _sums(
        dy_ptr, x_ptr, addend, weight, bias, mean, rstd, num_groups,
        stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, split * chunk,
        tl.minimum((split + 1) * chunk, S), HAS_ADDEND, SILU, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C,
    )  # fmt: skip
    row = (n * tl.num_programs(1) + split) * 3 * C
    tl.store(sums_ptr + row + channel, sum_du, mask=valid)
    tl.store(sums_ptr + row + C + channel, sum_du_xhat, mask=valid)
    if HAS_ADDEND:
        tl.store(sums_ptr + row + 2 * C + channel, sum_xhat, mask=valid)


@kernel
def _group_means(weight, sum_du, sum_du_xhat, size):
    """Return the two means over a group's elements that dx needs, (BLOCK_K,)."""
    # mean_1 = mean(weight * du), mean_2 = mean(weight * du * xhat)
    return _sum(weight * sum_du, 1) / size, _sum(weight * sum_du_xhat, 1) / size


@kernel
def _daddend(weight, rstd, mean_1, mean_2, sum_du, sum_xhat, S):
    """Return the addend's gradient, (BLOCK_K, BLOCK_C)."""
    # daddend = sum over s of dx = rstd * (weight * sum du - S * mean_1 - mean_2 * sum xhat)
    return rstd[:, None] * (weight * sum_du - S * mean_1[:, None] - mean_2[:, None] * sum_xhat)


@kernel
def _sum_of_parts(at, mask, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the sums over splits, (BLOCK_K, BLOCK_C), of what lies at addresses (BLOCK_P, BLOCK_K * BLOCK_C)."""
    return _sum(tl.reshape(tl.load(at, mask=mask, other=0.0), (BLOCK_P, BLOCK_K, BLOCK_C)), 0)


@kernel(varying=("N", "C", "S", "num_groups", "num_splits"))
def _bwd_reduce_kernel(
    sums_ptr, weight_ptr, rstd_ptr, means_ptr, dweight_ptr, dbias_ptr, daddend_ptr, N, C, S, num_groups, num_splits,
    HAS_ADDEND: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write dweight, dbias (C,), daddend (N, C), and the two means dx needs: means (N, G, 2)."""
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    flat_channel, flat_valid = _flat_channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
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
    dy_ptr, ds_ptr, x_ptr, dx_ptr, addend, weight, bias, mean, rstd, mean_1, mean_2, num_groups,
    stride_gn, stride_gc, stride_gs, stride_hn, stride_hc, stride_hs, stride_xn, stride_xc, stride_xs,
    stride_dn, stride_dc, stride_ds, begin, end,
    HAS_ADDEND: tl.constexpr, HAS_DS: tl.constexpr, SILU: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write dx of the pixels from begin to end, with ds in it if there is one; return ds' sum over them."""
    sum_ds = tl.full((BLOCK_K, BLOCK_C), 0.0, tl.float32)
    for start in range(begin, end, BLOCK_S):
        z, _mask = _load_tile(
            x_ptr, num_groups, stride_xn, stride_xc, stride_xs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        dy, _mask = _load_tile(
            dy_ptr, num_groups, stride_gn, stride_gc, stride_gs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
        if HAS_ADDEND:
            z = z + addend
        xhat = (z - mean) * rstd
        du = _du(dy, xhat, weight, bias, SILU)
        # dx = rstd * (weight * du - mean_1 - xhat * mean_2) + ds
        dx = rstd * (weight * du - mean_1[None, :, None] - xhat * mean_2[None, :, None])
        if HAS_DS:
            ds, _mask = _load_tile(
                ds_ptr, num_groups, stride_hn, stride_hc, stride_hs, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
            )
            dx += ds
            sum_ds += _sum(ds, 0)
        _store_tile(
            dx_ptr, dx, num_groups, stride_dn, stride_dc, stride_ds, start, end, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C
        )
    return sum_ds


@kernel(varying=("C", "S", "num_groups", "chunk"))
def _bwd_dx_kernel(
    dy_ptr, ds_ptr, x_ptr, addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr, C, S, num_groups,
    stride_gn, stride_gc, stride_gs, stride_hn, stride_hc, stride_hs, stride_xn, stride_xc, stride_xs,
    stride_dn, stride_dc, stride_ds, chunk,
    HAS_ADDEND: tl.constexpr, HAS_DS: tl.constexpr, SILU: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    addend, weight, bias, mean, rstd = _saved(
        addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group, channel, valid, C, num_groups, HAS_ADDEND
    )
    at = (tl.program_id(2).to(tl.int64) * num_groups + group) * 2
    mean_1 = tl.load(means_ptr + at, mask=group < num_groups, other=0.0)
    mean_2 = tl.load(means_ptr + at + 1, mask=group < num_groups, other=0.0)
    _store_dx(
        dy_ptr, ds_ptr, x_ptr, dx_ptr, addend, weight, bias, mean, rstd, mean_1, mean_2, num_groups,
        stride_gn, stride_gc, stride_gs, stride_hn, stride_hc, stride_hs, stride_xn, stride_xc, stride_xs,
        stride_dn, stride_dc, stride_ds, split * chunk, tl.minimum((split + 1) * chunk, S),
        HAS_ADDEND, HAS_DS, SILU, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C,
    )  # fmt: skip


@kernel(varying=("C", "S", "num_groups"))
def _bwd_whole_kernel(
    dy_ptr, ds_ptr, x_ptr, addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    dweight_ptr, dbias_ptr, daddend_ptr, sum_ds_ptr, dx_ptr, C, S, num_groups,
    stride_gn, stride_gc, stride_gs, stride_hn, stride_hc, stride_hs, stride_xn, stride_xc, stride_xs,
    stride_dn, stride_dc, stride_ds,
    HAS_ADDEND: tl.constexpr, HAS_DS: tl.constexpr, SILU: tl.constexpr, GROUP_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write dx, and this sample's dweight, dbias, daddend and sum of ds, (N, C) each: all of the backward pass."""
    # the first pixel, of the only split
    begin = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    group, channel, valid = _channels(num_groups, GROUP_C, BLOCK_K, BLOCK_C)
    addend, weight, bias, mean, rstd = _saved(
        addend_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group, channel, valid, C, num_groups, HAS_ADDEND
    )
    sum_du, sum_du_xhat, sum_xhat = _sums(
        dy_ptr, x_ptr, addend, weight, bias, mean, rstd, num_groups,
        stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, begin, S,
        HAS_ADDEND, SILU, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C,
    )  # fmt: skip
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
        dy_ptr, ds_ptr, x_ptr, dx_ptr, addend, weight, bias, mean, rstd, mean_1, mean_2, num_groups,
        stride_gn, stride_gc, stride_gs, stride_hn, stride_hc, stride_hs, stride_xn, stride_xc, stride_xs,
        stride_dn, stride_dc, stride_ds, begin, S, HAS_ADDEND, HAS_DS, SILU, GROUP_C, BLOCK_S, BLOCK_K, BLOCK_C,
    )  # fmt: skip
    if HAS_DS:
        tl.store(sum_ds_ptr + n * C + channel, sum_ds.to(sum_ds_ptr.dtype.element_ty), mask=valid)
