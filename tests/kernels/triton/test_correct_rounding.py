"""Reciprocals and roots without a slow path: correctly rounded, whatever the approximation that they begin with."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from safelight.kernels.triton.correct_rounding import reciprocal, square_root
from safelight.kernels.triton.jit import kernel
from tests.kernels.ptx_emulator import fma

if TYPE_CHECKING:
    import triton.language as tl

# the largest errors that NVIDIA's PTX manual gives: of rcp.approx in units in the last place, of rsqrt.approx relative
RCP_ERROR_ULP, RSQRT_ERROR = 1.0, 2.0**-22.9


@kernel(fp_fusion=False)
def _both_kernel(x_ptr, reciprocal_ptr, root_ptr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(reciprocal_ptr + i, reciprocal(x))
    tl.store(root_ptr + i, square_root(x))


def mantissas(first: int, number: int, exponent: int) -> np.ndarray:
    return (np.arange(first, first + number, dtype=np.int32) | np.int32(exponent << 23)).view(np.float32)


def test_they_round_correctly(device):
    """On a GPU for every mantissa, with even and odd exponents and those at the limits; else for some."""
    number = 2**23 if device.type == "cuda" else 2**12
    for exponent in (26, 127, 128, 200, 251):
        x = torch.from_numpy(mantissas(0, number, exponent)).to(device)
        outputs = [torch.empty_like(x) for _ in range(2)]
        _both_kernel[(number // 1024,)](x, *outputs, SIZE=1024)
        values = x.cpu().numpy()
        assert np.array_equal(outputs[0].cpu().numpy(), np.float32(1) / values)
        assert np.array_equal(outputs[1].cpu().numpy(), np.sqrt(values))


def test_fma_rounds_once():
    a, b, c = np.random.default_rng(1).standard_normal((3, 1000)).astype(np.float32)
    c[::2] = -(a * b)[::2]
    for x, y, z, got in zip(*(v.astype(float) for v in (a, b, c, fma(a, b, c))), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = np.float32(got)
        others = [np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)]
        assert all(abs(exact - Fraction(float(near))) <= abs(exact - Fraction(float(o))) for o in others)


def candidates(exact: np.ndarray, error: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (numbers near the exact ones, whether each is an approximation within the absolute error)."""
    near = exact.astype(np.float32)
    numbers = [(near.view(np.int32) + np.int32(k)).view(np.float32) for k in (-2, -1, 0, 1, 2)]
    return [(y, np.abs(y - exact) <= error) for y in numbers]


@pytest.mark.slow
def test_every_approximation_leads_to_the_correct_rounding():
    """For every mantissa and every result that NVIDIA's bounds permit, but for three, all of which are known.

    For these the kernels rely on what ptxas does: its own rcp.rn.f32 and sqrt.rn.f32 are the same instructions.
    """
    wrong = set()
    step = 2**20
    for first in range(0, 2**23, step):
        x = mantissas(first, step, 127)
        exact = 1 / x.astype(np.float64)
        for y, is_permitted in candidates(exact, RCP_ERROR_ULP * np.spacing(exact.astype(np.float32)).astype(float)):
            is_wrong = fma(y, fma(-x, y, np.float32(1)), y) != np.float32(1) / x
            wrong |= {("reciprocal", float(v).hex()) for v in x[is_permitted & is_wrong]}
        for exponent in (127, 128):
            x = mantissas(first, step, exponent)
            exact = 1 / np.sqrt(x.astype(np.float64))
            for y, is_permitted in candidates(exact, RSQRT_ERROR * exact):
                root = x * y
                is_wrong = fma(fma(-root, root, x), np.float32(0.5) * y, root) != np.sqrt(x)
                wrong |= {("root", float(v).hex()) for v in x[is_permitted & is_wrong]}
    assert wrong == {
        ("reciprocal", "0x1.fffffe0000000p+0"),
        ("root", "0x1.f822940000000p+0"),
        ("root", "0x1.dd26e40000000p+1"),
    }
