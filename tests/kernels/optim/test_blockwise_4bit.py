"""4-bit moments: every code, the kernel's bins, and the map of the root that has no zero."""

import numpy as np
import torch

from safelight.kernels.optim.blockwise_4bit import (
    ZERO_CODE,
    bin_table,
    dequantize_4bit,
    quantize_4bit,
    signed_bounds,
    signed_map,
)
from safelight.kernels.optim.blockwise_8bit import SCALE


def test_the_maps_are_those_of_the_paper():
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = torch.tensor([*(-x for x in positive[::-1]), 0.0, *positive, 1.0])
    torch.testing.assert_close(signed_map(), expected)
    assert signed_map()[ZERO_CODE] == 0


def test_every_pair_of_codes_is_kept():
    codes = torch.arange(256, dtype=torch.uint8)
    one = torch.ones(1)
    # 0xff stands for both largest values, so that the block's scales are 1
    m, v = dequantize_4bit(codes, one, one)
    again, absmax1, absmax2 = quantize_4bit(m, v.sqrt())
    assert torch.equal(again, codes)
    assert absmax1 == absmax2 == 1
    assert v.min() == 1 / 256


def test_the_kernels_bins_lead_to_the_code_of_every_float16_and_of_the_values_beside_it():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves) & (np.abs(halves) <= SCALE)]
    bounds = (signed_bounds().double() * SCALE).float().numpy()
    centres = np.concatenate([halves, bounds])
    # a third of the way to the next float16, and the float32 on either side
    between = (halves * np.float32(1 + 1 / 3072)).clip(-SCALE, SCALE)
    x = np.concatenate(
        [centres, np.nextafter(centres, np.float32(-1e9)), np.nextafter(centres, np.float32(1e9)), between]
    )
    x = x[np.abs(x) <= SCALE].astype(np.float32)
    entries = bin_table().numpy()[x.astype(np.float16).view(np.uint16) >> 8]
    bound = (entries & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    codes = (entries >> 32) + (x > bound)
    expected = torch.bucketize(torch.from_numpy(x), signed_bounds() * SCALE).numpy()
    assert np.array_equal(codes, expected)


def test_a_second_moment_far_below_its_blocks_largest_is_never_zero():
    root = torch.full((256,), 1e-12)
    root[7] = 1.0
    _, v = dequantize_4bit(*(lambda codes, a, b: (codes, a, b.square()))(*quantize_4bit(torch.zeros(256), root)))
    assert v.min() == 1 / 256
    assert v[7] == 1
