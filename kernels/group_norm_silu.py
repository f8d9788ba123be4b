"""GroupNorm with an optional addend before it and an optional SiLU behind it: the norms of a UNet's residual blocks.

    z = x + addend      xhat = (z - mean) * rstd      u = weight * xhat + bias      y = silu(u) = u * sigmoid(u), or u

The addend is the time embedding: one value a sample and channel. Statistics are fp32: two passes within a tile, tiles
merged by Welford's update, so a large mean costs no digits. Saved are x, fp32 mean and rstd; the backward pass computes
SiLU again. 32 groups would leave most of a card idle at batch 1, so each group's pixels are split among programs, by a
rule of the shape alone (results do not depend on the card); the parts meet in a fixed order, never by atomics.

A group of at most MAX_WHOLE elements is one program's, which reads it twice, the second time from its processor's cache: one
launch each way instead of two and three. At batch 1 that is 32 programs, and a large card's other processors wait; but the
split form's kernels end within a few microseconds too, and each costs a launch, of which a step at batch 1 has too many.
At larger batches the programs are enough. Larger groups fall out of the cache, and one program would be long at them.

Channels-last and NCHW memory are read and written as they are, through strides.
Letters: N batch, C channels, S pixels, G groups; P splits of S; K groups of a tile.
Source: Wu and He 2018, arXiv:1803.08494; merging of moments: Chan, Golub and LeVeque 1979.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from safelight.kernels.column_sum import column_sum
from safelight.kernels.group_norm_bwd_triton import (
    _bwd_dx_kernel,
    _bwd_reduce_kernel,
    _bwd_sums_kernel,
    _bwd_whole_kernel,
)
from safelight.kernels.group_norm_triton import _apply_kernel, _group_stats_kernel
from safelight.kernels.jit import cdiv, next_power_of_2, runs_kernel, with_flat_pixels
from safelight.kernels.reference import channel_sum, recomputed_gradients, to_compute

TILE = 2048  # elements a program holds at once: 16 a thread
TILE_CHANNELS = 128
MAX_WHOLE = 20480  # elements of a group in one program: 40 KiB in 16 bits, all of SD1.5's norms at 16 x 16 and below
WHOLE_TILE = 4096  # 8 elements a thread of 16 warps: SD1.5's largest such group is gone over in 8 tiles
WHOLE_WARPS = 16
WHOLE_REGISTERS = 128  # the most that 16 warps can have
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


@dataclass(frozen=True)
class _Plan:
    """How a shape is cut into programs, from the shape alone."""

    group_c: int
    block_k: int
    block_c: int
    block_s: int
    reduce_k: int  # groups of a program that adds the splits up
    chunk: int  # pixels of a split
    num_splits: int
    grid: tuple[int, int, int]
    num_warps: int = 4
    is_whole: bool = False  # a group is one program's

    @property
    def blocks(self) -> dict[str, int]:
        warps = {} if self.num_warps == 4 else {"num_warps": self.num_warps}
        return {"GROUP_C": self.group_c, "BLOCK_K": self.block_k, "BLOCK_C": self.block_c, **warps}


def _plan(num_samples: int, num_channels: int, num_pixels: int, num_groups: int, may_be_whole: bool = True) -> _Plan:
    """Return how this shape is cut. may_be_whole: a group that fits is one program's; where nothing is summed it need not."""
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
    wanted = min(MAX_SPLITS, num_tiles, cdiv(NUM_PROGRAMS, num_samples * num_blocks))
    chunk = cdiv(num_tiles, wanted) * block_s
    num_splits = cdiv(num_pixels, chunk)
    return _Plan(group_c, block_k, block_c, block_s, reduce_k, chunk, num_splits, (num_blocks, num_splits, num_samples))


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, num_groups: int, eps: float, silu: bool,
    parts: Tensor | None, mean_NG: Tensor, rstd_NG: Tensor, stats: str,
) -> Tensor:  # fmt: skip
    plan = _plan(x.shape[0], x.shape[1], x[0, 0].numel(), num_groups, may_be_whole=stats != "given")
    y = torch.empty_like(x)
    flat, out = x.flatten(2), y.flatten(2)
    _apply_kernel[plan.grid](
        flat, flat if addend_NC is None else addend_NC, weight, bias, mean_NG if parts is None else parts,
        mean_NG, rstd_NG, out, x.shape[1], flat.shape[2], num_groups, *flat.stride(), *out.stride(),
        plan.chunk, plan.num_splits, eps,
        STATS=stats, HAS_ADDEND=addend_NC is not None, SILU=silu,
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
    mean_NG, rstd_NG = (torch.empty(num_samples, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = (x, weight, bias, addend_NC, num_groups, eps, silu)
    if plan.is_whole:
        return _apply(*arguments, None, mean_NG, rstd_NG, "whole"), mean_NG, rstd_NG
    parts = torch.empty(num_samples, plan.num_splits, num_groups, 2, dtype=torch.float32, device=x.device)
    _group_stats_kernel[plan.grid](
        flat, flat if addend_NC is None else addend_NC, parts, num_channels, num_pixels, num_groups, *flat.stride(),
        plan.chunk, HAS_ADDEND=addend_NC is not None, BLOCK_S=plan.block_s, **plan.blocks,
    )  # fmt: skip
    return _apply(*arguments, parts, mean_NG, rstd_NG, "parts"), mean_NG, rstd_NG


def group_norm_silu_again(
    x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, mean_NG: Tensor, rstd_NG: Tensor,
    num_groups: int, eps: float, silu: bool,
) -> Tensor:  # fmt: skip
    """Return y once more from the statistics of the forward pass, the same bits."""
    if not runs_kernel(x):
        return group_norm_silu_reference(x, weight, bias, addend_NC, num_groups, eps, silu)
    return _apply(x, weight, bias, addend_NC, num_groups, eps, silu, None, mean_NG, rstd_NG, "given")


def group_norm_silu_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, addend_NC: Tensor | None, mean_NG: Tensor, rstd_NG: Tensor,
    num_groups: int, eps: float, silu: bool, *, ds: Tensor | None = None, sum_ds: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return (dx, dweight, dbias, daddend), and if asked for ds' sum over samples and pixels, (C,).

    ds: the gradient of x from elsewhere, which dx then has in it; or None, which has no sum.
    """
    if not runs_kernel(x):

        def again(x, weight, bias, addend_NC):
            return group_norm_silu_reference(x, weight, bias, addend_NC, num_groups, eps, silu)

        dx, *rest = recomputed_gradients(again, (x, weight, bias, addend_NC), dy)
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
        # one sample's gradients are the parameters' own; several samples' are summed behind
        dtype = weight.dtype if num_samples == 1 else torch.float32
        parts = torch.empty(2 + has_ds, num_samples, num_channels, dtype=dtype, device=x.device)
        # left to itself the assembler aims at 64 registers a thread on sm_75 and sm_80, and misses by two
        _bwd_whole_kernel[plan.grid](
            flat_dy, flat_ds, *saved, parts[0], parts[1], daddend_NC if has_addend else parts, parts[-1], flat_dx, *shape,
            *strides, HAS_DS=has_ds, SILU=silu, BLOCK_S=plan.block_s, maxnreg=WHOLE_REGISTERS, **options,
        )  # fmt: skip
        dweight, dbias, *total = parts[:, 0] if num_samples == 1 else column_sum(parts, weight.dtype)
        return dx, dweight, dbias, daddend_NC, *(total if sum_ds else ())
    sums = torch.empty(num_samples, plan.num_splits, 3, num_channels, dtype=torch.float32, device=x.device)
    means = torch.empty(num_samples, num_groups, 2, dtype=torch.float32, device=x.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    _bwd_sums_kernel[plan.grid](
        flat_dy, *saved, sums, *shape, *flat_dy.stride(), *flat.stride(), plan.chunk,
        SILU=silu, BLOCK_S=plan.block_s, **options,
    )  # fmt: skip
    _bwd_reduce_kernel[(cdiv(num_groups, plan.reduce_k),)](
        sums, weight, rstd_NG, means, dweight, dbias, daddend_NC if has_addend else means, num_samples, *shape,
        plan.num_splits, BLOCK_P=REDUCE_SPLITS, **{**options, "BLOCK_K": plan.reduce_k},
    )  # fmt: skip
    _bwd_dx_kernel[plan.grid](
        flat_dy, flat_ds, *saved, means, flat_dx, *shape, *strides, plan.chunk,
        HAS_DS=has_ds, SILU=silu, BLOCK_S=plan.block_s, **options,
    )  # fmt: skip
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
