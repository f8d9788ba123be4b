"""Philox4x32-10 and its normals for Triton kernels, with the same bits as kernels/philox.py, which explains both.

A kernel that calls these must be declared with `@kernel(fp_fusion=False)`: a fused multiply-add rounds once where numpy
and torch round twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.kernels import philox
from safelight.kernels.triton.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

MULTIPLIER_0, MULTIPLIER_1 = philox.MULTIPLIER_0, philox.MULTIPLIER_1
WEYL_0, WEYL_1 = philox.WEYL_0, philox.WEYL_1
LN2 = philox.LN2
SQRT_HALF_BITS = philox.SQRT_HALF_BITS
QUARTER_TURN = 3.141592653589793 / 2 / 2**30
L0, L1, L2, L3, L4, L5, L6, L7, L8 = philox.LOG_COEFFICIENTS
S0, S1, S2 = philox.SIN_COEFFICIENTS
C0, C1, C2 = philox.COS_COEFFICIENTS


@kernel
def philox_words(c0, c1, c2, c3, k0, k1):
    """Return the four words of counter (c0, c1, c2, c3) under key (k0, k1); all uint32, of one shape or scalar."""
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, MULTIPLIER_0)
        low_0 = c0 * MULTIPLIER_0
        high_1 = tl.umulhi(c2, MULTIPLIER_1)
        low_1 = c2 * MULTIPLIER_1
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 = k0 + WEYL_0
        k1 = k1 + WEYL_1
    return c0, c1, c2, c3


@kernel
def box_muller(first, second):
    """Return two fp32 standard normals from two uint32 words, step by step as philox._box_muller."""
    bits = (first | 1).to(tl.float32).to(tl.int32, bitcast=True)
    offset = bits - SQRT_HALF_BITS
    exponent = ((offset >> 23) - 32).to(tl.float32)
    f = ((offset & 0x007FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    p = (((((((L0 * f + L1) * f + L2) * f + L3) * f + L4) * f + L5) * f + L6) * f + L7) * f + L8
    log = f - 0.5 * f2 + f2 * f * p + exponent * LN2
    radius = tl.sqrt_rn(-2.0 * log)
    quadrant = second >> 30
    x = ((second & 0x3FFFFFFF).to(tl.int32) - 536870912).to(tl.float32) * QUARTER_TURN
    z = x * x
    sin = x + x * z * ((S0 * z + S1) * z + S2)
    cos = 1.0 - 0.5 * z + z * z * ((C0 * z + C1) * z + C2)
    swap = (quadrant & 1) == 1
    turned_sin = tl.where(swap, cos, sin)
    turned_cos = tl.where(swap, -sin, cos)
    negate = (quadrant & 2) == 2
    return radius * tl.where(negate, -turned_cos, turned_cos), radius * tl.where(negate, -turned_sin, turned_sin)


@kernel
def philox_normals(block, c1, c2, c3, k0, k1, BLOCK: tl.constexpr):
    """Return the normals of element blocks, (4 * BLOCK,) in element order. block: (BLOCK,) uint32."""
    w0, w1, w2, w3 = philox_words(block, c1, c2, c3, k0, k1)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    # join stacks along a new last dimension: [[n0, n1], [n2, n3]] for each block
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (4 * BLOCK,))


@kernel
def philox_normal_at(element, first_block, c1, c2, c3, k0, k1):
    """Return the normals of single elements, which need not follow each other. element: int64; first_block: uint32.

    Elements are counted from first_block on.
    """
    zero = tl.full(element.shape, 0, tl.uint32)
    w0, w1, w2, w3 = philox_words((element // 4).to(tl.uint32) + first_block, zero + c1, zero + c2, c3, k0, k1)
    place = element % 4
    n0, n1 = box_muller(tl.where(place < 2, w0, w2), tl.where(place < 2, w1, w3))
    return tl.where(place % 2 == 0, n0, n1)
