"""Blockwise 8-bit quantization in bitsandbytes' format: codes into a map, scaled by the absmax of each block of 256.

A value gets the nearest code, the lower one at a tie: its code is the number of bounds below it, where the 255 bounds
are the midpoints between neighbouring values of the map.
Source: Dettmers et al. 2022, arXiv:2110.02861.
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

TINY = 1.2e-38  # about the smallest normal fp32: divides blocks of zeros
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


def kernel_bounds(signed: bool) -> Tensor:
    """Return the bounds above zero, which the kernels read, (256,) float32, ascending; infinite beyond the last."""
    bounds = code_bounds(signed)
    bounds = bounds[bounds > 0]
    return torch.nn.functional.pad(bounds, (0, 256 - len(bounds)), value=float("inf"))


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


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return (uint8 codes, float32 absmax per block) of flat float32 values; unsigned values must not be negative."""
    blocks = in_blocks(values)
    absmax = (blocks.abs() if signed else blocks).amax(dim=1)
    codes = nearest_codes(blocks * (1 / absmax.clamp(min=TINY))[:, None], signed)
    return codes.view(-1)[: len(values)], absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Return the flat float32 values of flat codes."""
    values = dynamic_map(signed).to(codes.device).index_select(0, codes.int())
    return in_blocks(values).mul(absmax[:, None]).view(-1)[: len(codes)]


def in_memory_order(x: Tensor) -> Tensor:
    """Return a flat view of a dense tensor's elements in memory order."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


# The same search for kernels, by arithmetic and one look-up. Within a decade the map is a line, and the lines' slopes
# fall by 5 from a decade to the next, so the number of values below x is close to the least of seven lines. It is
# estimated 0 or 1 too low, and comparing x with the bound of that number tells which.
# added to a float below 2^22, it rounds that to an integer, which the low bits then hold
TO_INTEGER = 8388608.0
# what the estimate is lowered by: 0.2 where a bound lies between two decades, and 0.5 because the sum above rounds
LOWERED = 0.75


@kernel(fp_fusion=False)
def _estimated_number(x, SIGNED: tl.constexpr):
    """Return how many bounds above zero lie below x in 0 .. 1, or one fewer."""
    number = tl.full(x.shape, 1024.0, tl.float32)
    for decade in tl.static_range(7):
        # the values of a decade: 0.1 to 1 times 10^(decade - 6), in so many steps
        steps = (1 << decade) * (1 if SIGNED else 2)
        slope = steps / 0.9 * 10.0 ** (6 - decade)
        number = tl.minimum(number, tl.fma(x, slope, steps * 8.0 / 9.0 - LOWERED - (0 if SIGNED else 1)))
    return (number + TO_INTEGER).to(tl.int32, bitcast=True) & 255


@kernel(fp_fusion=False)
def nearest_code_signed(x, bounds):
    """Return the codes of x in -1 .. 1, a flat tile, in the signed map. bounds: `kernel_bounds`, (256,)."""
    estimate = _estimated_number(tl.abs(x), True)
    bits = x.to(tl.int32, bitcast=True)
    # -1 for negative x, which has as many bounds below as those above zero that are larger than -x
    sign = bits >> 31
    bound = tl.gather(bounds, estimate, 0).to(tl.int32, bitcast=True)
    number = estimate + tl.where((bits & 0x7FFFFFFF) - sign > bound, 1, 0)
    # the map has 1, but not -1
    return 127 + tl.where(sign < 0, -tl.minimum(number, 127), number)


@kernel(fp_fusion=False)
def nearest_code_unsigned(x, bounds):
    """Return the codes of x in 0 .. 1, a flat tile, in the unsigned map. bounds: `kernel_bounds`, (256,)."""
    estimate = _estimated_number(x, False)
    return estimate + tl.where(x > tl.gather(bounds, estimate, 0), 1, 0)
