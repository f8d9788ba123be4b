"""The exponential moving average of the weights, of all tensors in one launch.

    average = average + (1 - decay) * (weight - average)

The averages are fp32, the weights fp32 or 16-bit. A table of addresses, made once, tells each program its tensor and its
chunk of it; the decay is a number on the device, so that a captured graph can be replayed under another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.kernels.jit import KERNEL_DTYPES, is_dense, kernel, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

CHUNK = 4096
NUM_WARPS = 8  # 16 elements a thread


def ema_reference(averages: list[Tensor], weights: list[Tensor], decay: Tensor) -> None:
    """Update the averages in place, in plain PyTorch."""
    for average, weight in zip(averages, weights, strict=True):
        average.add_((1 - decay) * (weight.to(average.dtype) - average))


@kernel
def _ema_kernel(table_ptr, like_ptr, decay_ptr, CHUNK: tl.constexpr):
    """table: (programs, 4) int64: address of the average, address of the weight, first element, number of elements."""
    row = table_ptr + tl.program_id(0).to(tl.int64) * 4
    average_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    weight_ptr = tl.load(row + 1).to(tl.pointer_type(like_ptr.dtype.element_ty))
    i = tl.load(row + 2) + tl.arange(0, CHUNK)
    mask = i < tl.load(row + 3)
    decay = tl.load(decay_ptr)
    average = tl.load(average_ptr + i, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(average_ptr + i, average + (1.0 - decay) * (weight - average), mask=mask)


class EMA:
    """The averages of some weights. averages: fp32 tensors, updated in place; weights: tensors of one dtype, only read.

    Both are held: their memory must stay where it is (assign with copy_). Raises ValueError where they do not match,
    or where one is not dense in the other's memory order.
    """

    def __init__(self, averages: list[Tensor], weights: list[Tensor]):
        for average, weight in zip(averages, weights, strict=True):
            if average.dtype != torch.float32 or average.shape != weight.shape or average.device != weight.device:
                raise ValueError(
                    f"the average of a {tuple(weight.shape)} weight on {weight.device} must be float32 of its shape on "
                    f"its device, got {tuple(average.shape)} {average.dtype} on {average.device}"
                )
            if average.stride() != weight.stride() or not is_dense(weight):
                raise ValueError(
                    f"strides {average.stride()} and {weight.stride()} differ or leave gaps; average in the weight's memory order"
                )
        dtypes = {weight.dtype for weight in weights}
        if len(dtypes) != 1 or not dtypes <= set(KERNEL_DTYPES):
            raise ValueError(
                f"the weights must be of one dtype, float32, float16 or bfloat16, got {sorted(map(str, dtypes))}"
            )
        self.averages, self.weights = averages, weights
        self._table: Tensor | None = None

    def _make_table(self) -> Tensor:
        rows = [
            (average.data_ptr(), weight.data_ptr(), first, weight.numel())
            for average, weight in zip(self.averages, self.weights, strict=True)
            for first in range(0, weight.numel(), CHUNK)
        ]
        return torch.tensor(rows, dtype=torch.int64, device=self.weights[0].device).reshape(-1, 4)

    @torch.no_grad()
    def update(self, decay: Tensor) -> None:
        """Move every average towards its weight. decay: one float32 number on the weights' device."""
        if not runs_kernel(self.weights[0]):
            ema_reference(self.averages, self.weights, decay)
            return
        if self._table is None:
            self._table = self._make_table()
        if len(self._table):
            _ema_kernel[(len(self._table),)](self._table, self.weights[0], decay, CHUNK=CHUNK, num_warps=NUM_WARPS)
