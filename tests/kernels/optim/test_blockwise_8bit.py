"""Blockwise quantization: bitsandbytes' maps, and nearest codes by look-up and by search."""

import pytest
import torch

from safelight.kernels.optim.blockwise_8bit import (
    NUM_BINS,
    _bins,
    code_bounds,
    dequantize,
    dynamic_map,
    nearest_codes,
    quantize,
)

bitsandbytes = pytest.importorskip("bitsandbytes")
both_maps = pytest.mark.parametrize("signed", [True, False])


@both_maps
def test_the_maps_are_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed), bitsandbytes.functional.create_dynamic_map(signed=signed))


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
