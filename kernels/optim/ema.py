"""The exponential moving average of a model's weights: all tensors in one launch, or two.

    average = average + (1 - decay) * (weight - average)

Averages are fp32. Weights are fp32 or 16-bit; 16-bit weights may come with the remainders that complete them to fp32
(kernels/optim/split_weights.py). Each program updates CHUNK elements of one tensor, whose addresses it reads from a
table built at the first update. A loaded address tells the compiler nothing of its alignment, so the tensors that are
aligned, nearly all, have a launch of their own with accesses of 16 bytes. The decay lives on the device, so a captured
CUDA graph can be replayed with another value.
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
ALIGNMENT = 16  # bytes that addresses are a multiple of, and elements that sizes are, for wide accesses
WEIGHTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MEMORIES = {torch.int16: "exact", torch.int8: "near"}


def ema_reference(averages: Iterable[Tensor], weights: Iterable[Tensor], decay: Tensor) -> None:
    """Update the averages in place, in plain PyTorch; decay as `EMA.update`."""
    for average, weight in zip(averages, weights, strict=True):
        average.add_((1 - decay) * (weight.to(average.dtype) - average))


@kernel
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer that a table entry holds."""
    pointer = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, ALIGNMENT) if ALIGNED else pointer


@kernel
def _ema_kernel(
    table_ptr,
    like_ptr,
    remainder_like_ptr,
    decay_ptr,
    WEIGHT: tl.constexpr,
    MEMORY: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Update CHUNK elements of one tensor's average.

    table: (programs, 5) int64: addresses of average, weight and remainder, first element, number of elements. like,
    remainder_like: a weight and a remainder, for their dtypes. MEMORY: exact | near, the remainders' form; none
    without. ALIGNED: addresses and numbers of elements are multiples of ALIGNMENT.
    """
    row = table_ptr + tl.program_id(0).to(tl.int64) * 5
    first, size = tl.load(row + 3), tl.load(row + 4)
    if ALIGNED:
        first, size = tl.multiple_of(first, ALIGNMENT), tl.multiple_of(size, ALIGNMENT)
    i = first + tl.arange(0, CHUNK)
    mask = i < size
    average_ptr = _pointer(tl.load(row), tl.float32, ALIGNED)
    decay = tl.load(decay_ptr)
    average = tl.load(average_ptr + i, mask=mask, other=0.0)
    if MEMORY == "none":
        weight_ptr = _pointer(tl.load(row + 1), like_ptr.dtype.element_ty, ALIGNED)
        weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    else:
        bits = tl.load(_pointer(tl.load(row + 1), tl.int16, ALIGNED) + i, mask=mask, other=0)
        remainder_ptr = _pointer(tl.load(row + 2), remainder_like_ptr.dtype.element_ty, ALIGNED)
        weight = join_bits(bits, tl.load(remainder_ptr + i, mask=mask, other=0).to(tl.int32), WEIGHT, MEMORY)
    tl.store(average_ptr + i, average + (1.0 - decay) * (weight - average), mask=mask)


class EMA:
    """Moving averages of some weights.

    averages: float32, updated in place; weights: of one dtype, only read. remainders: int16 | int8, in the memory order
    of their 16-bit weights; None averages the weights as they are. The tensors' memory must not move: assign with
    copy_.
    Raises ValueError unless each average has its weight's shape, device and memory order, and is dense.
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
                    f"strides {average.stride()} of an average and {weight.stride()} of its weight differ or leave "
                    "gaps; give the average its weight's memory order"
                )
        dtypes = {weight.dtype for weight in weights}
        if len(dtypes) != 1 or not dtypes <= set(KERNEL_DTYPES):
            raise ValueError(
                f"the weights must be of one dtype, float32, float16 or bfloat16, got {sorted(map(str, dtypes))}"
            )
        for weight, rest in zip(weights, remainders or [], strict=remainders is not None):
            if weight.dtype == torch.float32 or rest.dtype not in MEMORIES or rest.stride() != weight.stride():
                raise ValueError(
                    "a remainder must be int16 or int8 and have its 16-bit weight's memory order; got "
                    f"{rest.dtype} with strides {rest.stride()} for {weight.dtype} with {weight.stride()}"
                )
        self.averages, self.weights, self.remainders = averages, weights, remainders
        self._tables: dict[bool, Tensor] | None = None

    def _make_tables(self) -> dict[bool, Tensor]:
        """Return the programs' tables by whether their tensors are aligned, without empty ones."""
        rows: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        remainders = self.remainders or [None] * len(self.weights)
        for average, weight, rest in zip(self.averages, self.weights, remainders, strict=True):
            addresses = (average.data_ptr(), weight.data_ptr(), 0 if rest is None else rest.data_ptr())
            is_aligned = all(number % ALIGNMENT == 0 for number in (*addresses, weight.numel()))
            rows[is_aligned] += [(*addresses, first, weight.numel()) for first in range(0, weight.numel(), CHUNK)]
        device = self.weights[0].device
        return {key: torch.tensor(some, dtype=torch.int64, device=device) for key, some in rows.items() if some}

    @torch.no_grad()
    def update(self, decay: Tensor) -> None:
        """Move every average towards its weight. decay: a float32 scalar on the weights' device."""
        weight, remainder = self.weights[0], self.remainders[0] if self.remainders else None
        if not runs_kernel(weight):
            # lazily, one tensor at a time: all joined weights together would be an fp32 copy of the model
            weights = map(join, self.weights, self.remainders) if self.remainders else self.weights
            ema_reference(self.averages, weights, decay)
            return
        if self._tables is None:
            self._tables = self._make_tables()
        for is_aligned, table in self._tables.items():
            _ema_kernel[(len(table),)](
                table,
                weight,
                weight if remainder is None else remainder,
                decay,
                WEIGHT=WEIGHTS[weight.dtype],
                MEMORY="none" if remainder is None else MEMORIES[remainder.dtype],
                ALIGNED=is_aligned,
                CHUNK=CHUNK,
                num_warps=NUM_WARPS,
            )
