"""The exponential moving average of the weights, of all tensors in one launch.

    average = average + (1 - decay) * (weight - average)

The averages are fp32, the weights fp32 or 16-bit, alone or with the remainders that complete them to fp32
(kernels/optim/split_weights.py). A table of addresses, made once, tells each program its tensor and its chunk of it; the decay is a
number on the device, so that a captured graph can be replayed under another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.kernels.optim.split_weights import join, join_bits
from safelight.kernels.triton.jit import KERNEL_DTYPES, is_dense, kernel, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

CHUNK = 4096
NUM_WARPS = 8  # 16 elements a thread
WEIGHTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MEMORIES = {torch.int16: "exact", torch.int8: "near"}


def ema_reference(averages: Iterable[Tensor], weights: Iterable[Tensor], decay: Tensor) -> None:
    """Update the averages in place, in plain PyTorch."""
    for average, weight in zip(averages, weights, strict=True):
        average.add_((1 - decay) * (weight.to(average.dtype) - average))


@kernel
def _ema_kernel(
    table_ptr, like_ptr, beside_like_ptr, decay_ptr, WEIGHT: tl.constexpr, MEMORY: tl.constexpr, CHUNK: tl.constexpr
):
    """table: (programs, 5) int64: addresses of average, weight and remainder, first element, number of elements.

    MEMORY: exact | near, of the remainders; none: there are none.
    """
    row = table_ptr + tl.program_id(0).to(tl.int64) * 5
    average_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    i = tl.load(row + 3) + tl.arange(0, CHUNK)
    mask = i < tl.load(row + 4)
    decay = tl.load(decay_ptr)
    average = tl.load(average_ptr + i, mask=mask, other=0.0)
    if MEMORY == "none":
        weight_ptr = tl.load(row + 1).to(tl.pointer_type(like_ptr.dtype.element_ty))
        weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    else:
        bits = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int16)) + i, mask=mask, other=0)
        beside_ptr = tl.load(row + 2).to(tl.pointer_type(beside_like_ptr.dtype.element_ty))
        weight = join_bits(bits, tl.load(beside_ptr + i, mask=mask, other=0).to(tl.int32), WEIGHT, MEMORY)
    tl.store(average_ptr + i, average + (1.0 - decay) * (weight - average), mask=mask)


class EMA:
    """The averages of some weights. averages: fp32 tensors, updated in place; weights: tensors of one dtype, only read.

    remainders: int16 or int8 ones, of 16-bit weights and in their memory order; None: what is followed are the weights
    alone. All are held: their memory must stay where it is (assign with copy_). Raises ValueError where they do not
    match, or where one is not dense in the other's memory order.
    """

    def __init__(self, averages: list[Tensor], weights: list[Tensor], remainders: list[Tensor] | None = None):
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
        for weight, beside in zip(weights, remainders or [], strict=remainders is not None):
            if weight.dtype == torch.float32 or beside.dtype not in MEMORIES or beside.stride() != weight.stride():
                raise ValueError(
                    f"a remainder is int16 or int8 beside a 16-bit weight, in its memory order; got {beside.dtype} with "
                    f"strides {beside.stride()} beside {weight.dtype} with {weight.stride()}"
                )
        self.averages, self.weights, self.remainders = averages, weights, remainders
        self._table: Tensor | None = None

    def _make_table(self) -> Tensor:
        besides = self.remainders or [None] * len(self.weights)
        rows = [
            (average.data_ptr(), weight.data_ptr(), 0 if beside is None else beside.data_ptr(), first, weight.numel())
            for average, weight, beside in zip(self.averages, self.weights, besides, strict=True)
            for first in range(0, weight.numel(), CHUNK)
        ]
        return torch.tensor(rows, dtype=torch.int64, device=self.weights[0].device).reshape(-1, 5)

    @torch.no_grad()
    def update(self, decay: Tensor) -> None:
        """Move every average towards its weight. decay: one float32 number on the weights' device."""
        first, beside = self.weights[0], self.remainders[0] if self.remainders else None
        if not runs_kernel(first):
            # joined one after the other: together they are a copy of the model
            weights = map(join, self.weights, self.remainders) if self.remainders else self.weights
            ema_reference(self.averages, weights, decay)
            return
        if self._table is None:
            self._table = self._make_table()
        if len(self._table):
            _ema_kernel[(len(self._table),)](
                self._table,
                first,
                first if beside is None else beside,
                decay,
                WEIGHT=WEIGHTS[first.dtype],
                MEMORY="none" if beside is None else MEMORIES[beside.dtype],
                CHUNK=CHUNK,
                num_warps=NUM_WARPS,
            )
