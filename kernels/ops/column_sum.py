"""The last step of every parameter gradient: sums over rows, in a fixed order and without atomics.

Programs of a backward pass each leave one row of partial sums; one small kernel adds the rows up.
Letters: K arrays summed alike, P partial rows, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.kernels.triton.jit import cdiv, kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK_P = 64
BLOCK_C = 64


@kernel(varying=("P",))
def _column_sum_kernel(parts_ptr, out_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    k = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.full((BLOCK_C,), 0.0, tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        rows = (k * P + p[:, None]) * C
        mask = (p[:, None] < P) & (c[None, :] < C)
        total += tl.reduce(tl.load(parts_ptr + rows + c[None, :], mask=mask, other=0.0), 0, tl.standard._sum_combine)
    tl.store(out_ptr + k * C + c, total.to(out_ptr.dtype.element_ty), mask=c < C)


def column_sum(parts_KPC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums over P, (K, C) in dtype. parts_KPC: (K, P, C) float32, contiguous, on a device that runs kernels."""
    K, P, C = parts_KPC.shape
    out_KC = torch.empty(K, C, dtype=dtype, device=parts_KPC.device)
    _column_sum_kernel[(cdiv(C, BLOCK_C), K)](parts_KPC, out_KC, P, C, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C)
    return out_KC
