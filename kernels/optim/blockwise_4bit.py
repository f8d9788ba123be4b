"""Blockwise 4-bit moments: both codes of an element in one byte, with one scale of each moment for a block of 256.

The lower four bits are a code of m / absmax(m) in a signed dynamic map, bitsandbytes' with three decades instead of
seven. The upper four bits are a code of r / max(r), where r = sqrt(v): value (code + 1) / 16. Linear codes of the root
reach down to 1/256 of the largest v, those of v itself only to 1/16. Zero is no value
of the map: an element whose v became 0 would move by m / eps.

m gets the nearest code, the lower one at a tie; r the nearest one, the even multiple of 1/16 at a tie.
Source: Li, Chen and Zhu 2023, arXiv:2309.01507, which has the two maps, with v in place of its root.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from safelight.kernels.optim.blockwise_8bit import SCALE, block_factors, in_blocks, look_up, upper_byte_of_half
from safelight.kernels.triton.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

NUM_DECADES = 3
ZERO_CODE = 7  # of m's map
ROOT_SHIFT = 4  # r's code is above m's
TO_SIXTEENTHS = 16 / SCALE  # a power of two
# in a sum with it a number of sixteenths is rounded to its code, in the lowest bits: 2^23 - 1
TO_CODE = 8388607.0


@functools.cache
def signed_map() -> Tensor:
    """Return the values of m's codes, (16,) float32, ascending, from -0.8875 to 1 with zero at ZERO_CODE."""
    values = [0.0, 1.0]
    for decade in range(NUM_DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        centres = 10 ** (decade + 1 - NUM_DECADES) * ((edges[:-1] + edges[1:]) / 2)
        values += [*centres.tolist(), *(-centres).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def signed_bounds() -> Tensor:
    """Return the midpoints between neighbouring values of m's map, (15,) float32."""
    return (signed_map()[:-1] + signed_map()[1:]) / 2


@functools.cache
def value_table() -> Tensor:
    """Return what a byte stands for, (256,) int64: m's value as float32 in the lower half, v's in the upper one."""
    code = torch.arange(256)
    m = signed_map()[code & 15]
    v = ((code >> ROOT_SHIFT) + 1).float().div(16).square()
    return torch.stack([m, v], dim=1).view(torch.int64).view(-1)


@functools.cache
def bin_table() -> Tensor:
    """Return what the kernel's search reads for each bin of m, (256,) int64: in the lower half the bound in the bin as
    float32, infinite if there is none, in the upper half the code below it.

    A bin is the upper byte of a value as fp16. Values are scaled to -SCALE .. SCALE. No bin has two bounds, and no
    bound is so close to a bin's edge that a value beyond it could be rounded into the neighbouring bin.
    """
    bounds = signed_bounds().double().numpy() * SCALE
    edges = (np.arange(256) << 8).astype(np.uint16).view(np.float16).astype(np.float64)
    ends = ((np.arange(256) << 8) | 255).astype(np.uint16).view(np.float16).astype(np.float64)
    entries = np.zeros((256, 2), dtype=np.float32)
    for number, (first, last) in enumerate(zip(edges, ends, strict=True)):
        # the two bins of infinities and NaNs are those of no finite value
        low, high = (min(first, last), max(first, last)) if np.isfinite([first, last]).all() else (SCALE, SCALE)
        within = [b for b in bounds if low < b <= high]
        assert len(within) <= 1
        entries[number] = within[0] if within else np.inf, np.int32(np.sum(bounds <= low)).view(np.float32)
    return torch.from_numpy(entries.reshape(-1).view(np.int64))


def quantize_4bit(m: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (uint8 codes of both, float32 absmax of m, of root, each per block) of flat float32 moments.

    root: sqrt(v), all of it positive.
    """
    blocks = in_blocks(m), in_blocks(root)
    absmaxes = blocks[0].abs().amax(dim=1), blocks[1].amax(dim=1)
    scaled = [x * block_factors(absmax)[:, None] for x, absmax in zip(blocks, absmaxes, strict=True)]
    codes = torch.bucketize(scaled[0], signed_bounds().to(m.device) * SCALE)
    codes_of_root = (scaled[1] * TO_SIXTEENTHS).clamp_(min=1).sub_(1).round_().long()
    packed = (codes | codes_of_root << ROOT_SHIFT).to(torch.uint8)
    return packed.view(-1)[: len(m)], *absmaxes


def dequantize_4bit(codes: Tensor, scale1: Tensor, scale2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat float32 moments (m, v) of flat codes. scale1, scale2: per block, what m is relative to, and v."""
    pairs = value_table().to(codes.device).index_select(0, codes.int()).view(torch.float32).view(-1, 2)
    return tuple(
        in_blocks(values).mul(scale[:, None]).view(-1)[: len(codes)]
        for values, scale in zip(pairs.unbind(1), (scale1, scale2), strict=True)
    )


@kernel(fp_fusion=False)
def mapped_pair(codes, values):
    """Return the float32 values of m and of v of a tile of codes. values: `value_table`, (256,)."""
    pair = look_up(values, codes.to(tl.int32))
    m = pair.to(tl.int32).to(tl.float32, bitcast=True)
    return m, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@kernel(fp_fusion=False)
def nearest_pair(scaled, scaled_root, bins):
    """Return the codes, int32, of tiles of m in -SCALE .. SCALE and of its root in 0 .. SCALE. bins: `bin_table`."""
    entry = look_up(bins, upper_byte_of_half(scaled))
    bound = entry.to(tl.int32).to(tl.float32, bitcast=True)
    # the sign of the difference is 1 where the value is above the bound
    code = (entry >> 32).to(tl.int32) + ((bound - scaled).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    rounded = tl.maximum(scaled_root * TO_SIXTEENTHS, 1.0) + TO_CODE
    return code + ((rounded.to(tl.int32, bitcast=True) & 15) << ROOT_SHIFT)
