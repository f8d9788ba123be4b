"""Blockwise quantization: bitsandbytes' maps, and nearest codes by look-up, search and the kernels' arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from safelight.kernels.optim.blockwise_8bit import (
    FRACTION_BITS,
    NUM_BINS,
    SCALE,
    SIGNED_BIN_SHIFT,
    TINY,
    UNSIGNED_BIN_SHIFT,
    _bins,
    code_bounds,
    code_tables,
    dequantize,
    dynamic_map,
    nearest_code,
    nearest_codes,
    quantize,
)
from safelight.kernels.triton.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

bitsandbytes = pytest.importorskip("bitsandbytes")
both_maps = pytest.mark.parametrize("signed", [True, False])


@both_maps
def test_the_maps_are_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed), bitsandbytes.functional.create_dynamic_map(signed=signed))


@kernel(fp_fusion=False)
def _codes_kernel(x_ptr, lines_ptr, bounds_ptr, codes_ptr, SIGNED: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    entry = tl.arange(0, 256)
    codes = nearest_code(tl.load(x_ptr + i), tl.load(lines_ptr + entry), tl.load(bounds_ptr + entry), SIGNED)
    tl.store(codes_ptr + i, codes.to(tl.uint8))


def kernel_codes(x: Tensor, signed: bool) -> Tensor:
    """Return the codes that the kernels find, in the interpreter."""
    size = 2**16
    padded = torch.nn.functional.pad(x, (0, -len(x) % size)) * SCALE
    codes = torch.empty(len(padded), dtype=torch.uint8)
    _codes_kernel[(len(padded) // size,)](padded, *code_tables(signed), codes, SIGNED=signed, SIZE=size)
    return codes[: len(x)]


def within(x: Tensor, signed: bool) -> Tensor:
    """Return those of positive numbers that a scaled moment can be, and in the signed map their negatives too."""
    # absmax times its rounded inverse is up to two units above 1
    x = x[x <= 1 + 2**-22]
    return torch.cat([x, -x]) if signed else x


def neighbours(x: Tensor, number: int) -> Tensor:
    """Return positive float32 numbers and so many on either side of each."""
    bits = x.float().abs().view(torch.int32)
    return torch.cat([(bits + n).clamp(min=0).view(torch.float32) for n in range(-number, number + 1)])


@both_maps
def test_the_kernels_arithmetic_finds_the_codes_of_the_search(signed, interpreted):
    """At eight fp32 neighbours of every bound and code on either side, of both signs, and at 500,000 random numbers."""
    special = torch.cat([code_bounds(signed), dynamic_map(signed), torch.tensor([0.0, 1e-45, 1e-38, 1.0])])
    generator = torch.Generator().manual_seed(1)
    random = torch.rand(500_000, generator=generator) ** (1 + 9 * torch.rand(500_000, generator=generator))
    x = within(torch.cat([neighbours(special, 8), random]), signed)
    assert torch.equal(kernel_codes(x, signed), torch.bucketize(x, code_bounds(signed)).to(torch.uint8))


@both_maps
def test_the_ends_of_all_bins_prove_it_for_every_number(signed, interpreted):
    """Between neighbouring bounds and within a bin, codes are constant and estimates monotonic: the ends tell.

    At them the lines are also far enough from a wrong estimate that it does not matter how a GPU rounds, once or twice.
    """
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    shift = SIGNED_BIN_SHIFT if signed else UNSIGNED_BIN_SHIFT
    last = halves[(1 << shift) - 1 :: 1 << shift][:-1]
    # the number between two fp16 values at which rounding goes to the next bin
    edges = (last + halves[1 << shift :: 1 << shift][: len(last)]) / 2 / SCALE
    x = within(torch.cat([neighbours(edges, 2), neighbours(code_bounds(signed), 1), torch.tensor([0.0, 1.0])]), signed)
    codes = torch.bucketize(x, code_bounds(signed))
    assert torch.equal(kernel_codes(x, signed), codes.to(torch.uint8))
    lines = code_tables(signed)[0].view(torch.float32).view(256, 2).double()
    assert (lines[:, 0] >= 0).all()
    scaled = x * SCALE
    line = lines[(scaled.half().view(torch.int16).int() & 0xFFFF) >> shift]
    estimate = scaled * line[:, 0] + line[:, 1] - 2 ** (23 - FRACTION_BITS)
    margin = 2.0 ** (1 - FRACTION_BITS)
    assert ((estimate > codes - 1 + margin) | (codes == 0)).all()
    assert (estimate > margin).all()
    assert (estimate < codes + 1 - margin).all()


@pytest.mark.slow
@both_maps
def test_the_kernels_arithmetic_is_right_for_every_number(signed, interpreted):
    """All 2^30 fp32 numbers from 0 to 1, and their negatives in the signed map. Minutes."""
    step, end = 2**22, torch.tensor(1.0).view(torch.int32).item() + 4
    bounds = code_bounds(signed)
    for first in range(0, end, step):
        x = torch.arange(first, min(first + step, end), dtype=torch.int32).view(torch.float32)
        for values in (x, -x.flip(0)) if signed else (x,):
            # of ascending numbers, where the bounds lie among them
            counts = torch.diff(torch.searchsorted(values, bounds, right=True), prepend=torch.tensor([0]))
            counts = torch.cat([counts, len(values) - counts.sum()[None]])
            expected = torch.repeat_interleave(torch.arange(256, dtype=torch.uint8), counts)
            assert torch.equal(kernel_codes(values, signed), expected), f"from {first:#x} on"


@both_maps
def test_the_look_up_equals_the_search(signed):
    """At every bound and code, their fp32 neighbours, the ends of every bin, and random numbers."""
    bounds = code_bounds(signed)
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(50_000, generator=generator) * 10 ** (-8 * torch.rand(50_000, generator=generator))
    ends = (torch.arange(NUM_BINS, dtype=torch.int64) << 14).to(torch.int32)
    ends = torch.cat([ends, ends + 0x3FFF]).view(torch.float32)
    special = torch.cat([bounds, dynamic_map(signed), torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38])])
    far = torch.tensor(9.0)
    x = torch.cat([special, torch.nextafter(special, far), torch.nextafter(special, -far), random, ends])
    x = x[x.abs() <= 1]
    assert torch.equal(nearest_codes(x, signed), torch.bucketize(x, bounds).to(torch.uint8))


@both_maps
def test_no_bin_holds_two_bounds(signed):
    codes, _ = _bins(signed)
    # from 0 to 1 and from -1 to 0: between the lowest values of neighbouring bins there is at most one bound
    for part in (slice(0, 0x3F800000 >> 14), slice(NUM_BINS // 2, (NUM_BINS // 2) + (0x3F800000 >> 14))):
        assert codes[part].int().diff().abs().max() <= 1


@both_maps
def test_quantize_returns_the_nearest_code(signed):
    code_map = dynamic_map(signed)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    x = x if signed else x.square()
    codes, absmax = quantize(x, signed)
    scaled = x / absmax.repeat_interleave(256)[:1000]
    nearest = (scaled[:, None] - code_map).abs().argmin(dim=1)
    assert torch.equal(codes.long(), nearest)
    zeros, absmax = quantize(torch.zeros(300), signed)
    assert not dequantize(zeros, absmax, signed).any()
    # quantizing again changes nothing
    again = quantize(dequantize(codes, quantize(x, signed)[1], signed), signed)
    assert torch.equal(again[0], codes)


@both_maps
def test_a_block_too_small_to_scale_is_stored_as_zeros(signed):
    for absmax, is_kept in ((TINY, True), (TINY * 0.999, False), (1e-45, False), (3e38, True)):
        codes, stored = quantize(torch.tensor([absmax, absmax / 2]), signed)
        assert stored.tolist() == [torch.tensor(absmax).item()]
        back = dequantize(codes, stored, signed)
        assert back[0] == (stored[0] if is_kept else 0)
        assert (back[1] > 0) == is_kept
