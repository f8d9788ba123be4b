"""Splitting an fp32 weight into a 16-bit weight and a remainder, and joining the two again.

The memory modes, by what is stored besides the 16-bit weight:

    exact    an int16 remainder: the pair is the fp32 value
    near     an int8 remainder, what lies below it rounded stochastically: unbiased
    rounded  nothing; the weight itself is rounded stochastically
    fp32     an fp32 master, of which the weight is the rounded copy

bf16: `w = (bits + 0x8000) >> 16`, `remainder = bits - (w << 16)`. The weight is the nearest bf16, away from zero at a
tie, and one addition joins the pair. Truncation would bias every weight; ties to even would make the inverse ambiguous.
fp16: the weight is the nearest fp16, and the remainder counts units of ulp(w) 2^-15 (exact) or ulp(w) 2^-7 (near),
where subnormals use the ulp of the smallest normal. Exact for magnitudes of 2^-16 and more; below that, off by at most
2^-40.

A finite value never becomes an infinite weight: it saturates at the largest finite 16-bit number, or with a remainder
at the largest value that rounds to it. A NaN stays NaN. Stochastic rounding goes to the farther neighbour with a
probability equal to the fraction that is cut off, so a value that needs no rounding never moves. Its random words are
Philox of (seed, step, parameter index, element in memory order).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.kernels.philox import MASK_32, Purpose, philox_torch
from safelight.kernels.philox_triton import philox_words
from safelight.kernels.triton.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

REMAINDERS = {"fp32": torch.float32, "exact": torch.int16, "near": torch.int8, "rounded": None}
PURPOSE = int(Purpose.ROUNDING)

MAGNITUDE = 0x7FFFFFFF  # all bits but the sign
SIGN = -0x80000000
INFINITY, NAN = 0x7F800000, 0x7FC00000
# by mode, the largest fp32 bits that round to a finite bf16
LARGEST_EXACT, LARGEST_NEAR, LARGEST_ROUNDED = 0x7F7F7FFF, 0x7F7F7F00, 0x7F7F0000
LARGEST_FP16 = 65504.0
LARGEST_TO_FP16 = 65520.0 - 2.0**-8  # the largest fp32 that rounds to it
SMALLEST_NORMAL_EXPONENT = 113  # fp32's biased exponent of 2^-14, the smallest normal fp16
UNIT_EXACT, UNIT_NEAR, UNIT_ULP = 25, 17, 10  # fp16 remainders count units of 2^(exponent - this)
ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even


def rounding_words(seed: int, step: Tensor, parameter: int, num: int) -> Tensor:
    """Return the random words of a parameter's elements in memory order, (num,) int64 in 0 .. 2^32 - 1.

    step: an int64 scalar, of which 32 bits are used. parameter: its index in the optimizer.
    """
    block = torch.arange((num + 3) // 4, dtype=torch.int64, device=step.device)
    c1, c2 = (torch.full_like(step, x) for x in (parameter & MASK_32, (parameter >> 32) << 8 | PURPOSE))
    words = philox_torch((block, c1, c2, step & MASK_32), (seed & MASK_32, seed >> 32))
    return torch.stack(words, dim=-1).view(-1)[:num]


def _saturated(x: Tensor, largest: int) -> Tensor:
    """Return x's bits, int32, with the magnitude limited to `largest`; NaN becomes the quiet NaN."""
    bits = x.view(torch.int32)
    size = bits & MAGNITUDE
    size = torch.where(size > INFINITY, NAN, size.clamp(max=largest))
    return size | (bits & ~MAGNITUDE)


def _exponent(x: Tensor) -> Tensor:
    """Return fp32's biased exponents of fp16 values given as float32; a subnormal has that of the smallest normal."""
    return ((x.view(torch.int32) >> 23) & 255).clamp_(min=SMALLEST_NORMAL_EXPONENT)


def _unit(x: Tensor, below: int) -> Tensor:
    """Return 2^(e - below), float32; e is the exponent of the fp16 value x."""
    return (_exponent(x).sub_(below) << 23).view(torch.float32)


def _inverse_unit(x: Tensor, below: int) -> Tensor:
    """Return 1 / _unit(x, below)."""
    return ((254 + below - _exponent(x)) << 23).view(torch.float32)


def _as_bf16(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


def _limited_to(x: Tensor, largest: float) -> Tensor:
    return torch.where(torch.isnan(x), x, x.clamp(-largest, largest))


def split(x: Tensor, dtype: torch.dtype, memory: str, words: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return (weight, remainder) of float32 values.

    dtype: the weight's, bfloat16 or float16. memory: decides the remainder: exact int16, near int8, rounded None, fp32
    x itself. words: `rounding_words` in x's shape, for near and rounded.
    """
    if dtype == torch.bfloat16:
        return _split_bf16(x, memory, words)
    if memory == "rounded":
        bounded = _limited_to(x, LARGEST_FP16)
        size = bounded.abs() * _inverse_unit(bounded, UNIT_ULP)
        count = torch.floor(size + (words >> 19).float() * 2.0**-13)
        return torch.copysign(count * _unit(bounded, UNIT_ULP), bounded).half(), None
    bounded = _limited_to(x, LARGEST_TO_FP16)
    weight = bounded.half()
    if memory == "fp32":
        return weight, x
    near = weight.float()
    rest = (bounded - near) * _inverse_unit(near, UNIT_EXACT if memory == "exact" else UNIT_NEAR)
    count = (rest + ROUND) - ROUND if memory == "exact" else torch.floor(rest + (words >> 16).float() * 2.0**-16)
    return weight, torch.where(torch.isnan(x), 0.0, count).to(REMAINDERS[memory])


def _split_bf16(x: Tensor, memory: str, words: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if memory == "rounded":
        return _as_bf16((_saturated(x, LARGEST_ROUNDED) + (words >> 16).int()) >> 16), None
    if memory == "near":
        kept = (_saturated(x, LARGEST_NEAR) + (words >> 24).int()) >> 8
        weight = (kept + 0x80) >> 8
        return _as_bf16(weight), (kept - (weight << 8)).to(torch.int8)
    bits = _saturated(x, LARGEST_EXACT)
    weight = (bits + 0x8000) >> 16
    return _as_bf16(weight), x if memory == "fp32" else (bits - (weight << 16)).to(torch.int16)


def split_nearest(x: Tensor, dtype: torch.dtype, memory: str) -> tuple[Tensor, Tensor | None]:
    """Return (weight, remainder) of float32 values, rounded to the nearest that the mode holds; nothing is random."""
    if memory in ("exact", "fp32"):
        return split(x, dtype, memory)
    weight, rest = split(x, dtype, "exact")
    return weight, None if memory == "rounded" else ((rest.int() + 0x80) >> 8).clamp(max=127).to(torch.int8)


def join(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """Return the float32 value of a weight and its remainder (or master); None: of the weight alone."""
    if remainder is None:
        return weight.float()
    if remainder.dtype == torch.float32:
        return remainder
    if weight.dtype == torch.bfloat16:
        rest = remainder.int() << (0 if remainder.dtype == torch.int16 else 8)
        return ((weight.view(torch.int16).int() << 16) + rest).view(torch.float32)
    near = weight.float()
    unit = _unit(near, UNIT_EXACT if remainder.dtype == torch.int16 else UNIT_NEAR)
    # -0 + 0 would be +0
    return torch.where(remainder == 0, near, near + remainder.float() * unit)


# The same operations for kernels. Weights are passed as their 16 bits, int16.


@kernel(fp_fusion=False)
def rounding_words_of_tile(quad, parameter, step, seed_ptr):
    """Return the random words, uint32, of four elements of a parameter for each number in quad.

    quad: (..., n) int64, the elements' place in memory divided by four -> (..., 4 n), flat if quad is.
    """
    c1 = (parameter & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((parameter >> 32) << 8 | PURPOSE).to(tl.uint32)
    c3 = (step & 0xFFFFFFFF).to(tl.uint32)
    k0, k1 = tl.load(seed_ptr).to(tl.uint32), tl.load(seed_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(quad.to(tl.uint32), c1, c2, c3, k0, k1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if len(quad.shape) == 1:
        words = tl.reshape(words, (4 * quad.shape[0],))
    else:
        words = tl.reshape(words, (quad.shape[0], 4 * quad.shape[1]))
    return words


@kernel(fp_fusion=False)
def _saturated_bits(x, largest):
    size = tl.minimum(tl.abs(x), tl.full(x.shape, largest, tl.int32).to(tl.float32, bitcast=True))
    signed = size.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & SIGN)
    return tl.where(x != x, NAN, signed)


@kernel(fp_fusion=False)
def _limited(x, largest):
    """Return x limited to -largest .. largest; NaN stays NaN."""
    ends = tl.full(x.shape, largest, tl.float32).to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & SIGN)
    return tl.where(tl.abs(x) > largest, ends.to(tl.float32, bitcast=True), x)


@kernel(fp_fusion=False)
def join_bits(weight, remainder, WEIGHT: tl.constexpr, MEMORY: tl.constexpr):
    """Return float32 values. weight: its 16 bits as int16; remainder: int32, 0 for rounded."""
    if WEIGHT == "bf16":
        rest = remainder << 8 if MEMORY == "near" else remainder
        value = ((weight.to(tl.int32) << 16) + rest).to(tl.float32, bitcast=True)
    elif MEMORY == "rounded":
        value = weight.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        near = weight.to(tl.float16, bitcast=True).to(tl.float32)
        below: tl.constexpr = UNIT_NEAR if MEMORY == "near" else UNIT_EXACT
        middle: tl.constexpr = 1 << 7 if MEMORY == "near" else 1 << 15
        # Minus the remainder in units of 2^-below: a number less the same number whose last digits are the remainder.
        # binade is negative: a remainder of 0 thus gives 0, times binade -0, and adding -0 keeps a weight of -0.
        digits = (remainder & (2 * middle - 1)) ^ (((150 - below) << 23) | middle)
        negated = (2.0 ** (23 - below) + middle * 2.0**-below) - digits.to(tl.float32, bitcast=True)
        binade = (near.to(tl.int32, bitcast=True) & INFINITY) | SIGN
        binade = tl.maximum(binade, (SMALLEST_NORMAL_EXPONENT << 23) | SIGN).to(tl.float32, bitcast=True)
        # the product is exact, so fusing it with the sum rounds no differently
        value = tl.fma(negated, binade, near)
    return value


@kernel(fp_fusion=False)
def split_bits(x, words, WEIGHT: tl.constexpr, MEMORY: tl.constexpr):
    """Return (the weight's 16 bits as int16, remainder int32) of float32 x. words: uint32, used by near and rounded."""
    remainder = tl.full(x.shape, 0, tl.int32)
    if WEIGHT == "bf16":
        if MEMORY == "rounded":
            bits = (_saturated_bits(x, LARGEST_ROUNDED) + (words >> 16).to(tl.int32)) >> 16
        elif MEMORY == "near":
            kept = (_saturated_bits(x, LARGEST_NEAR) + (words >> 24).to(tl.int32)) >> 8
            bits = (kept + 0x80) >> 8
            remainder = kept - (bits << 8)
        else:
            all_bits = _saturated_bits(x, LARGEST_EXACT)
            bits = (all_bits + 0x8000) >> 16
            remainder = all_bits - (bits << 16)
        weight = bits.to(tl.int16)
    elif MEMORY == "rounded":
        within = _limited(x, LARGEST_FP16)
        exponent = tl.maximum((within.to(tl.int32, bitcast=True) >> 23) & 255, SMALLEST_NORMAL_EXPONENT)
        inverse = ((254 - exponent + UNIT_ULP) << 23).to(tl.float32, bitcast=True)
        ulp = ((exponent - UNIT_ULP) << 23).to(tl.float32, bitcast=True)
        count = tl.floor(tl.abs(within) * inverse + (words >> 19).to(tl.float32) * 0.0001220703125)
        size = (count * ulp).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        weight = (size | ((within.to(tl.int32, bitcast=True) >> 16) & 0x8000)).to(tl.int16)
    else:
        within = _limited(x, LARGEST_TO_FP16)
        rounded = within.to(tl.float16)
        near = rounded.to(tl.float32)
        # bits of 2^(1 - e) for a weight in 2^e .. 2^(e + 1), by the complement of its exponent
        binade = tl.minimum(~near.to(tl.int32, bitcast=True) & INFINITY, (255 - SMALLEST_NORMAL_EXPONENT) << 23)
        # products with powers of two are exact, so fusing them with the sums rounds no differently
        if MEMORY == "near":
            inverse = (binade + ((UNIT_NEAR - 1) << 23)).to(tl.float32, bitcast=True)
            count = tl.floor(tl.fma(within - near, inverse, (words >> 16).to(tl.float32) * 0.0000152587890625))
            remainder = tl.where(x != x, 0.0, count).to(tl.int32)
        else:
            # the last digit of numbers near 3/4 is 2^-24, so that the sum's last 16 are the remainder
            digits = tl.fma(within - near, binade.to(tl.float32, bitcast=True), 0.75)
            remainder = digits.to(tl.int32, bitcast=True) << 16 >> 16
        weight = rounded.to(tl.int16, bitcast=True)
    return weight, remainder
