"""Splitting into 16-bit weights and remainders: exact inverse, unbiased rounding, saturation, kernel = reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.kernels.optim.split_weights import join, join_bits, rounding_words, split, split_bits
from safelight.kernels.philox import Key, Purpose, words
from safelight.kernels.triton.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

HALVES = [torch.bfloat16, torch.float16]
LARGEST = {torch.bfloat16: 3.3895313892515355e38, torch.float16: 65504.0}
any_bits = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)


def floats(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())


def bits_of(x: torch.Tensor) -> list[int]:
    return x.numpy().view(np.uint32).tolist()


def some_words(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << 32, (num,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(any_bits)
def test_a_bf16_pair_holds_any_fp32_value_exactly(bits):
    """All bit patterns, subnormals and both zeros included, up to the largest value whose bf16 is finite."""
    bits = [b for b in bits if b & 0x7FFFFFFF <= 0x7F7F7FFF] or [0x80000000]
    weight, rest = split(floats(bits), torch.bfloat16, "exact")
    assert rest.dtype == torch.int16
    assert bits_of(join(weight, rest)) == bits
    # no other bf16 is closer than the weight
    error = (weight.double() - floats(bits).double()).abs()
    assert (error <= (floats(bits).bfloat16().double() - floats(bits).double()).abs()).all()


@settings(max_examples=200, deadline=None)
@given(any_bits)
def test_an_fp16_pair_holds_any_fp32_value_in_fp16s_range(bits):
    """Exact from 2^-16 to the largest fp16; below, off by at most 2^-40. Signs of zeros are kept."""
    x = floats(bits)
    x = x[x.abs() <= 65504.0]
    weight, rest = split(x, torch.float16, "exact")
    assert torch.equal(weight, x.half())
    back = join(weight, rest)
    large = x.abs() >= 2.0**-16
    assert torch.equal(back[large], x[large])
    assert ((back - x).abs() <= 2.0**-40).all()
    zeros = x == 0
    assert bits_of(back[zeros]) == bits_of(x[zeros])


@pytest.mark.parametrize("memory", ["exact", "near", "rounded", "fp32"])
@pytest.mark.parametrize("dtype", HALVES)
def test_large_values_saturate_and_nan_stays_nan(dtype, memory):
    top = LARGEST[dtype]
    x = torch.tensor([top, -top, 3.4028e38, -3.4028e38, float("inf"), float("-inf"), float("nan"), -float("nan")])
    x = torch.cat([x, torch.tensor([65519.0, 65520.0, -70000.0, 1e30])])
    for w in (torch.zeros(12, dtype=torch.int64), torch.full((12,), (1 << 32) - 1)):
        weight, rest = split(x, dtype, memory, w)
        assert torch.equal(torch.isnan(weight), torch.isnan(x))
        assert not torch.isinf(weight).any()
        assert float(weight[0]) == float(weight[2]) == float(weight[4]) == top
        assert float(weight[1]) == float(weight[3]) == float(weight[5]) == -top
        if memory in ("exact", "near"):
            back = join(weight, rest)
            assert torch.equal(torch.isfinite(back), ~torch.isnan(x))
            # the remainder may add to the largest weight but must not wrap around
            assert (back[[0, 2, 4]] >= top).all()
            assert (back[[1, 3, 5]] <= -top).all()


@pytest.mark.parametrize("memory", ["near", "rounded"])
@pytest.mark.parametrize("dtype", HALVES)
def test_representable_values_are_never_moved(dtype, memory):
    """Otherwise weights without an update would take a random walk."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, generator=generator) * 10 ** (-6 * torch.rand(4000, generator=generator))
    x = torch.cat([x, torch.tensor([0.0, -0.0, 65504.0, 2.0**-24, -(2.0**-14)])])
    once = join(*split(x, dtype, memory, some_words(len(x))))
    for seed in range(3):
        again = join(*split(once, dtype, memory, some_words(len(x), seed)))
        assert bits_of(again) == bits_of(once)


def spacing(x: torch.Tensor, dtype: torch.dtype, memory: str) -> torch.Tensor:
    """Return the distance between neighbouring values of a mode, at x."""
    bits, lowest = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}[dtype]
    extra = {"rounded": 0, "near": 8 if dtype == torch.bfloat16 else 7}[memory]
    exponent = torch.floor(torch.log2(x.abs().double())).clamp(min=lowest)
    return 2.0 ** (exponent - bits - extra)


@pytest.mark.parametrize("memory", ["near", "rounded"])
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_is_unbiased(dtype, memory):
    """Chi-square test of how often 200 values round up in 2,000 draws each against the fraction that is cut off."""
    num_values, num_draws = 200, 2000
    generator = torch.Generator().manual_seed(4)
    # away from powers of two, where the two neighbours are not equally far
    x = (1.1 + 0.8 * torch.rand(num_values, generator=generator)) * 2.0 ** torch.randint(
        -12, 3, (num_values,), generator=generator
    )
    x = torch.where(torch.arange(num_values) % 2 == 0, x, -x)
    repeated = x.repeat(num_draws)
    random = rounding_words(11, torch.tensor(3), 5, len(repeated))
    rounded = join(*split(repeated, dtype, memory, random)).view(num_draws, -1).double()
    gap = spacing(x, dtype, memory)
    low = torch.floor(x.double() / gap) * gap
    share = (x.double() - low) / gap
    ups = (rounded - low) / gap
    assert ((ups == 0) | (ups == 1)).all()
    inside = (share > 0.01) & (share < 0.99)
    expected, count = share[inside] * num_draws, ups.sum(dim=0)[inside]
    chi2 = ((count - expected).square() / (expected * (1 - share[inside]))).sum()
    degrees = int(inside.sum())
    assert degrees > 150
    # mean k, variance 2k: five standard deviations
    assert abs(float(chi2) - degrees) < 5 * (2 * degrees) ** 0.5
    # and the sum over all values, whose standard error is the root of the summed variances
    bias = float((count - expected).sum())
    assert abs(bias) < 5 * float((expected * (1 - share[inside])).sum()) ** 0.5


def test_rounding_words_are_philox_of_seed_step_parameter_and_element():
    step = (3 << 16) + 7
    key = Key((9 << 32) + 4, Purpose.ROUNDING, sample_id=686, epoch=3, occurrence=7)
    assert rounding_words((9 << 32) + 4, torch.tensor(step), 686, 10).tolist() == words(key, 10).tolist()
    assert not torch.equal(rounding_words(1, torch.tensor(1), 0, 8), rounding_words(1, torch.tensor(2), 0, 8))
    assert not torch.equal(rounding_words(1, torch.tensor(1), 0, 8), rounding_words(1, torch.tensor(1), 1, 8))


def test_bf16_rounds_to_nearest_with_ties_away_from_zero():
    """Truncation would pull every weight towards zero by half an ulp."""
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625])
    weight, rest = split(ties, torch.bfloat16, "exact")
    assert weight.tolist() == [1.0078125, 1.015625, -1.0078125]
    assert rest.tolist() == [-(1 << 15)] * 3
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(100_000, generator=generator) + 1
    assert abs(float((split(x, torch.bfloat16, "exact")[0].double() - x.double()).mean())) < 1e-5


@kernel(fp_fusion=False)
def _split_and_join_kernel(
    x_ptr, words_ptr, weight_ptr, remainder_ptr, joined_ptr, WEIGHT: tl.constexpr, MEMORY: tl.constexpr
):
    i = tl.arange(0, 512)
    weight, remainder = split_bits(tl.load(x_ptr + i), tl.load(words_ptr + i).to(tl.uint32), WEIGHT, MEMORY)
    tl.store(weight_ptr + i, weight)
    tl.store(remainder_ptr + i, remainder)
    tl.store(joined_ptr + i, join_bits(weight, remainder, WEIGHT, MEMORY))


@pytest.mark.parametrize("memory", ["exact", "near", "rounded"])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_kernel_equals_the_reference(device, dtype, memory):
    """Bit for bit, over random bit patterns and all special ones."""
    patterns = np.random.default_rng(6).integers(0, 2**32, 512, dtype=np.uint64).astype(np.uint32)
    patterns[:256] = (patterns[:256] & 0x8FFFFFFF) | 0x30000000  # half of them within fp16's range
    ends = [
        0,
        1,
        0x7FFF,
        0x8000,
        0x33000000,
        0x387FFFFF,
        0x477FE000,
        0x477FEFFF,
        0x477FF000,
        0x7F7F7FFF,
        0x7F7F8000,
        0x7F7FFFFF,
    ]
    ends += [0x7F800000, 0x7F800001, 0x7FC00000]
    patterns[-2 * len(ends) :] = np.array(ends + [end | 0x80000000 for end in ends], dtype=np.uint32)
    x, w = floats(patterns.tolist()), some_words(512, 7)
    outputs = [torch.zeros(512, dtype=t, device=device) for t in (torch.int16, torch.int32, torch.float32)]
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    _split_and_join_kernel[(1,)](x.to(device), w.to(device), *outputs, WEIGHT=name, MEMORY=memory)
    weight, rest = split(x, dtype, memory, w)
    back, from_kernel = join(weight, rest), [y.cpu() for y in outputs]
    number = ~torch.isnan(x)
    assert torch.equal(from_kernel[0][number], weight.view(torch.int16)[number])
    if rest is not None:
        assert torch.equal(from_kernel[1][number], rest.int()[number])
    assert bits_of(from_kernel[2][number]) == bits_of(back[number])
    # which NaN it is depends on the conversion
    assert torch.isnan(from_kernel[2][~number]).all()
    assert torch.isnan(back[~number]).all()
