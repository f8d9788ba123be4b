"""The last step of a parameter gradient: adding up rows of partial sums, in a fixed order and without atomics.

Each program of a backward kernel writes one row of partial sums in fp32; this small kernel adds the rows.
Letters: K arrays, P rows of partial sums in each, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.kernels.triton.jit import cdiv, kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK_P = 128
BLOCK_C = 32  # 128 bytes of a row, one line of the cache; the arrays are narrow, and this gives them more programs


@kernel(do_not_specialize=("P",))
def _column_sum_kernel(parts_ptr, out_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write the column sums of array k for BLOCK_C columns; the grid is (column blocks, arrays).

    Tiles are added up element by element and reduced once, so that the loads of one tile need not wait for the
    barriers of another's reduction.
    """
    k = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        rows = (k * P + p[:, None]) * C
        mask = (p[:, None] < P) & (c[None, :] < C)
        tile += tl.load(parts_ptr + rows + c[None, :], mask=mask, other=0.0)
    total = tl.reduce(tile, 0, tl.standard._sum_combine)
    tl.store(out_ptr + k * C + c, total.to(out_ptr.dtype.element_ty), mask=c < C)


def column_sum(parts_KPC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums over P, (K, C) in dtype.

    parts_KPC: (K, P, C) float32, contiguous, on a device that runs kernels.
    """
    K, P, C = parts_KPC.shape
    out_KC = torch.empty(K, C, dtype=dtype, device=parts_KPC.device)
    _column_sum_kernel[(cdiv(C, BLOCK_C), K)](parts_KPC, out_KC, P, C, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C)
    return out_KC
