"""Numbers as 8-bit codes into a map, scaled by the largest absolute value of their block of 256: bitsandbytes' states.

A value belongs to the nearest code, the lower one at a tie: code = how many of the 255 bounds, the middles between
neighbours in the map, lie below it. Source: Dettmers et al. 2022, arXiv:2110.02861.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.kernels.moment_blocks import BLOCK_SIZE
from safelight.kernels.triton.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

TINY = 1.2e-38  # the smallest normal fp32: a block of zeros is divided by this
# of a value's 32 bits the sign, the exponent and 9 bits of the fraction choose a bin; no bin holds two bounds
BIN_SHIFT = 14
NUM_BINS = 1 << (32 - BIN_SHIFT)


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """Return bitsandbytes' dynamic map, (256,) float32, ascending: seven decades, the largest with the finest steps."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1, dtype=torch.float32)
        centres = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += centres.tolist() + ((-centres).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def bounds_of(signed: bool) -> Tensor:
    """Return the values halfway between a map's codes, (255,)."""
    code_map = dynamic_map(signed)
    return (code_map[:-1] + code_map[1:]) / 2


@functools.cache
def _bins(signed: bool) -> tuple[Tensor, Tensor]:
    """Return per bin the code of its lowest value, uint8, and the one bound that may lie within it (infinity after the last)."""
    lowest = torch.arange(NUM_BINS, dtype=torch.int64) << BIN_SHIFT
    # of negative numbers the lowest is the one with all lower bits set
    lowest = torch.where(lowest >= 1 << 31, (lowest | (1 << BIN_SHIFT) - 1) - (1 << 32), lowest)
    codes = torch.bucketize(lowest.to(torch.int32).view(torch.float32), bounds_of(signed))
    bounds = torch.nn.functional.pad(bounds_of(signed), (0, 1), value=float("inf"))
    return codes.to(torch.uint8), bounds[codes]


def nearest_codes(scaled: Tensor, signed: bool) -> Tensor:
    """Return the codes, uint8, of float32 values in -1 .. 1; on the CPU in two look-ups instead of a search."""
    if scaled.device.type != "cpu":
        return torch.bucketize(scaled, bounds_of(signed).to(scaled.device)).to(torch.uint8)
    codes, bounds = _bins(signed)
    flat = scaled.reshape(-1)
    # an arithmetic shift leaves the sign in the upper bits: negative bins count from the end
    bins = (flat.view(torch.int32) >> BIN_SHIFT) & (NUM_BINS - 1)
    found = codes.index_select(0, bins)
    found += (flat > bounds.index_select(0, bins)).view(torch.uint8)
    return found.view(scaled.shape)


def in_blocks(values: Tensor) -> Tensor:
    """Return flat values as (blocks, 256), the last block filled with zeros; a view where nothing is to be filled."""
    short = -len(values) % BLOCK_SIZE
    return (torch.nn.functional.pad(values, (0, short)) if short else values).view(-1, BLOCK_SIZE)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return (codes uint8, absmax) of flat float32 values. signed: which map; without it no value may be negative."""
    blocks = in_blocks(values)
    absmax = (blocks.abs() if signed else blocks).amax(dim=1)
    codes = nearest_codes(blocks / absmax.clamp(min=TINY)[:, None], signed)
    return codes.view(-1)[: len(values)], absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Return flat float32 values of flat codes."""
    values = dynamic_map(signed).to(codes.device).index_select(0, codes.int())
    return in_blocks(values).mul(absmax[:, None]).view(-1)[: len(codes)]


def in_memory_order(x: Tensor) -> Tensor:
    """Return a dense tensor's elements as they lie in memory, flat; a view."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


@kernel(fp_fusion=False)
def nearest_code(x, bounds_ptr):
    """Return how many of the 255 bounds lie below x, by halving."""
    code = tl.full(x.shape, 0, tl.int32)
    for i in tl.static_range(8):
        half = 128 >> i
        code = tl.where(tl.load(bounds_ptr + code + (half - 1)) < x, code + half, code)
    return code
