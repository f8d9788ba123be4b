"""Blockwise 8-bit quantization in bitsandbytes' format: codes into a map, scaled by the absmax of each block of 256.

A value gets the nearest code, the lower one at a tie: its code is the number of bounds below it, where the 255 bounds
are the midpoints between neighbouring values of the map.
Source: Dettmers et al. 2022, arXiv:2110.02861.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from safelight.kernels.moment_blocks import BLOCK_SIZE
from safelight.kernels.triton.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

TINY = 2.0**-110  # a block whose absmax is below this is stored as zeros
# the kernels scale blocks to this instead of 1: wherever codes differ, values are then normal fp16 numbers
SCALE = 2.0**15
# a bin of the kernels' search is an fp16 value's upper 8 bits: with the sign, or of the 15 without it
SIGNED_BIN_SHIFT, UNSIGNED_BIN_SHIFT = 8, 7
FRACTION_BITS = 8  # of an estimate, so that its integer part is a byte
# nearest_codes on the CPU: sign, exponent and 9 fraction bits of an fp32 value choose a bin; no bin contains two bounds
BIN_SHIFT = 14
NUM_BINS = 1 << (32 - BIN_SHIFT)


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """Return bitsandbytes' dynamic map, (256,) float32, ascending: seven decades, with finer steps in larger ones."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1, dtype=torch.float32)
        centres = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += centres.tolist() + ((-centres).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def code_bounds(signed: bool) -> Tensor:
    """Return the midpoints between neighbouring values of a map, (255,) float32."""
    code_map = dynamic_map(signed)
    return (code_map[:-1] + code_map[1:]) / 2


@functools.cache
def code_tables(signed: bool) -> tuple[Tensor, Tensor]:
    """Return what the kernels' search reads: the line of each bin, (256,) int64, and the bounds, (256,) float32.

    Both are for values times SCALE. A line is two float32 in one int64, so that one look-up gets both: its slope in the
    lower half and its offset in the upper one. The last bound is infinite.
    """
    shift = SIGNED_BIN_SHIFT if signed else UNSIGNED_BIN_SHIFT
    bounds = code_bounds(signed).double().numpy() * SCALE
    edges = (np.arange(257) << shift).clip(max=0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)
    lines = np.zeros((256, 2), dtype=np.float32)
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        if not (np.isfinite(first) and np.isfinite(last)):
            first = last = np.copysign(SCALE, first)
        x = np.array([first, *(b for b in bounds if min(first, last) < b < max(first, last)), last])
        count = np.interp(x, bounds, np.arange(255.0))
        slope = (count[-1] - count[0]) / (last - first or 1.0)
        # the line through the ends, moved to the middle of what it misses in between
        missed = count - count[0] - slope * (x - first)
        start = count[0] - slope * first + (missed.max() + missed.min()) / 2
        # 1/2: the estimate's integer part is right or one too low if the line is within half a code of the count.
        # 2^(23 - FRACTION_BITS): in a sum with it, that integer part stands in bits 8 to 15.
        lines[number] = slope, start + 0.5 + 2.0 ** (23 - FRACTION_BITS)
    padded = np.append(bounds, np.inf).astype(np.float32)
    return torch.from_numpy(lines.reshape(-1).view(np.int64)), torch.from_numpy(padded)


@functools.cache
def _bins(signed: bool) -> tuple[Tensor, Tensor]:
    """Return for each bin the code of its lowest value, uint8, and the next bound above that value (inf if none)."""
    lowest = torch.arange(NUM_BINS, dtype=torch.int64) << BIN_SHIFT
    # a negative bin's lowest value is the one with all lower bits set
    lowest = torch.where(lowest >= 1 << 31, (lowest | (1 << BIN_SHIFT) - 1) - (1 << 32), lowest)
    codes = torch.bucketize(lowest.to(torch.int32).view(torch.float32), code_bounds(signed))
    bounds = torch.nn.functional.pad(code_bounds(signed), (0, 1), value=float("inf"))
    return codes.to(torch.uint8), bounds[codes]


def nearest_codes(scaled: Tensor, signed: bool) -> Tensor:
    """Return the uint8 codes of float32 values in [-1, 1]; on the CPU by two table look-ups instead of a search."""
    if scaled.device.type != "cpu":
        return torch.bucketize(scaled, code_bounds(signed).to(scaled.device)).to(torch.uint8)
    codes, bounds = _bins(signed)
    flat = scaled.reshape(-1)
    # the shift is arithmetic and copies the sign into the upper bits, so they are masked off
    bins = (flat.view(torch.int32) >> BIN_SHIFT) & (NUM_BINS - 1)
    nearest = codes.index_select(0, bins)
    nearest += (flat > bounds.index_select(0, bins)).view(torch.uint8)
    return nearest.view(scaled.shape)


def in_blocks(values: Tensor) -> Tensor:
    """Return flat values as (blocks, 256), the last block zero-padded; a view if no padding is needed."""
    padding = -len(values) % BLOCK_SIZE
    return (torch.nn.functional.pad(values, (0, padding)) if padding else values).view(-1, BLOCK_SIZE)


def block_factors(absmax: Tensor) -> Tensor:
    """Return what scales blocks to -SCALE .. SCALE, 0 where absmax is below TINY: divided as in the kernels, whose
    reciprocal takes numbers from 2^-126 to 2^125 only."""
    return torch.where(absmax < TINY, 0.0, 1 / (absmax * (1 / SCALE)))


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return (uint8 codes, float32 absmax per block) of flat float32 values; unsigned values must not be negative."""
    blocks = in_blocks(values)
    absmax = (blocks.abs() if signed else blocks).amax(dim=1)
    codes = nearest_codes(blocks * (block_factors(absmax) * (1 / SCALE))[:, None], signed)
    return codes.view(-1)[: len(values)], absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Return the flat float32 values of flat codes."""
    values = dynamic_map(signed).to(codes.device).index_select(0, codes.int())
    return in_blocks(values).mul(absmax[:, None]).view(-1)[: len(codes)]


def in_memory_order(x: Tensor) -> Tensor:
    """Return a flat view of a dense tensor's elements in memory order."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


# The same search for kernels: an estimate that is right or one too low, and a comparison that tells which. The number
# of bounds below a value rises along a line within a decade of the map. So each bin of the values has a line of its
# own, where the upper bits of a value as fp16 choose the bin: sign, exponent and the first digits.
#
# Indices come out of inline assembly. LLVM would otherwise merge their shifts and masks with the multiplication by the
# size of an entry, which a load from shared memory does for free, and take three instructions instead of one.


@kernel(fp_fusion=False)
def _unchanged(x):
    return x


@kernel(fp_fusion=False, interpreted_as=_unchanged)
def _opaque(x):
    """Return an int32 tile as it is, with its origin hidden from LLVM."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1)


@kernel(fp_fusion=False)
def _second_byte_interpreted(x):
    return (x >> 8) & 255


@kernel(fp_fusion=False, interpreted_as=_second_byte_interpreted)
def _second_byte(x):
    """Return bits 8 to 15 of an int32 tile."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x4441;", "=r,r", [x], tl.int32, is_pure=True, pack=1)


@kernel(fp_fusion=False)
def _without_7_bits_interpreted(x):
    return x >> 7


@kernel(fp_fusion=False, interpreted_as=_without_7_bits_interpreted)
def _without_7_bits(x):
    """Return x >> 7 of an int32 tile, none of it negative."""
    return tl.inline_asm_elementwise("shr.u32 $0, $1, 7;", "=r,r", [x], tl.int32, is_pure=True, pack=1)


@kernel(fp_fusion=False)
def _half_bits(x):
    """Return the bits of a float32 tile's values as fp16, int32."""
    return x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)


@kernel(fp_fusion=False)
def upper_byte_of_half(x):
    """Return the upper byte of a float32 tile's values as fp16, int32: sign, exponent and two digits."""
    return _second_byte(_half_bits(x))


@kernel(fp_fusion=False)
def look_up(table, index):
    """Return a tile of a flat table's entries, which go through shared memory."""
    return tl.reshape(tl.gather(table, tl.reshape(index, (index.numel,)), 0), index.shape)


@kernel(fp_fusion=False)
def mapped(codes, code_map):
    """Return the float32 values of a tile of codes. code_map: `dynamic_map`, (256,)."""
    return look_up(code_map, _opaque(codes.to(tl.int32)))


@kernel(fp_fusion=False)
def nearest_code(scaled, lines, bounds, SIGNED: tl.constexpr):
    """Return the codes, int32, of a tile of values in -SCALE .. SCALE. lines, bounds: `code_tables` of the map."""
    if SIGNED:
        line = look_up(lines, upper_byte_of_half(scaled))
    else:
        # of the magnitude: with its sign -0, or a NaN that has one, would be in a bin beyond the table
        line = look_up(lines, _without_7_bits(_half_bits(tl.abs(scaled))))
    slope = line.to(tl.int32).to(tl.float32, bitcast=True)
    start = (line >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    estimate = _second_byte(tl.fma(scaled, slope, start).to(tl.int32, bitcast=True))
    # the sign of the difference is 1 where the value is above the bound
    above = (look_up(bounds, estimate) - scaled).to(tl.uint32, bitcast=True) >> 31
    return estimate + above.to(tl.int32)
