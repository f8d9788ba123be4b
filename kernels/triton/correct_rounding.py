"""Correctly rounded reciprocals and square roots without a slow path, for kernels whose numbers are within limits.

`tl.div_rn` and `tl.sqrt_rn` check every number's exponent and call a subroutine for the rare ones, which takes more
instructions than the arithmetic. These are what ptxas makes of `rcp.rn.f32` and `sqrt.rn.f32` for all other numbers:
an approximation, and one step of Newton's with fused multiply-adds. Beyond the limits results are undefined.

The interpreter has neither approximations nor fused multiply-adds; it divides and takes the root.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.kernels.triton.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel(fp_fusion=False)
def _reciprocal_interpreted(x):
    return tl.div_rn(1.0, x)


@kernel(fp_fusion=False, interpreted_as=_reciprocal_interpreted)
def reciprocal(x):
    """Return 1 / x, correctly rounded, of a float32 tile with magnitudes in 2^-126 .. 2^125."""
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.fma(y, tl.fma(x * -1.0, y, 1.0), y)


@kernel(fp_fusion=False)
def _square_root_interpreted(x):
    return tl.sqrt_rn(x)


@kernel(fp_fusion=False, interpreted_as=_square_root_interpreted)
def square_root(x):
    """Return sqrt(x), correctly rounded, of a float32 tile with values from 2^-101 on, all finite."""
    y = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    root = x * y
    return tl.fma(tl.fma(root * -1.0, root, x), 0.5 * y, root)
