"""AdamW with 8-bit or 4-bit moments over all tensors of a model, in two launches per group of tensors.

    m = beta_1 m + (1 - beta_1) g        v = beta_2 v + (1 - beta_2) g^2
    w = w - lr (m / c_1 / (sqrt(v / c_2) + eps) + weight_decay w),  c_i = 1 - beta_i^step

written with fewer operations an element, by joining the factors that are the same for a whole tensor:

    w = w - (a m / (sqrt(v) + e) + b w),  a = lr sqrt(c_2) / c_1,  b = lr weight_decay,  e = eps sqrt(c_2)

Moments. A tensor of 4,096 elements or more stores m and v as 8-bit codes into bitsandbytes' dynamic maps, with one
absmax for each block of 256 elements (kernels/optim/blockwise_8bit.py). Blocks follow memory order and never cross a
tensor. A smaller tensor keeps fp32 moments. The update uses the new moments before they are quantized. The state of a
contiguous tensor is therefore bitsandbytes' state byte for byte; that of a channels-last tensor is requantized on
export and import. With moments 4bit one byte holds the codes of m and of sqrt(v) (kernels/optim/blockwise_4bit.py).

Weights are fp32, or 16-bit with a remainder that completes them to fp32 (kernels/optim/split_weights.py): joined,
updated in fp32 and split again.

Launches. One kernel handles the tensors with 8-bit moments (ROWS blocks a program), one those with fp32 moments (CHUNK
elements a program). A program finds its tensor and first block in a work table (kernels/optim/launch_tables.py) and
that tensor's addresses and size in an address table, one row of COLUMNS int64 per tensor.

No host-device synchronization: lr, weight decay, gradient scales, step counts and skip flags live on the device. A
skipped tensor keeps its weight, moments and step count. Everything a step reads or writes keeps its address, so a step
can be captured as a CUDA graph: take one uncaptured step first, call `finish_capture` after the capture and `set_hyper`
before a replay.

Bits. The kernels and the PyTorch reference give equal bits: the compiler may fuse no multiplication and addition, which
would round once instead of twice, and reciprocals and roots are correctly rounded (kernels/triton/correct_rounding.py).
They do not take tiny numbers, so the update takes a v below MIN_V as MIN_V.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101; Dettmers et al. 2022, arXiv:2110.02861.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from safelight.kernels.moment_blocks import BLOCK_SIZE, CODE_BYTES, MIN_8BIT_ELEMENTS, num_blocks
from safelight.kernels.optim.blockwise_4bit import (
    ZERO_CODE,
    bin_table,
    dequantize_4bit,
    mapped_pair,
    nearest_pair,
    quantize_4bit,
    value_table,
)
from safelight.kernels.optim.blockwise_8bit import (
    SCALE,
    TINY,
    code_tables,
    dequantize,
    dynamic_map,
    in_memory_order,
    mapped,
    nearest_code,
    quantize,
)
from safelight.kernels.optim.launch_tables import WorkTable
from safelight.kernels.optim.paged_state import NUM_SLOTS, Pages
from safelight.kernels.optim.split_weights import (
    REMAINDERS,
    join,
    join_bits,
    rounding_words,
    rounding_words_of_tile,
    split,
    split_bits,
    split_nearest,
)
from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.kernels.philox import MASK_32
from safelight.kernels.reference import correctly_rounded_sqrt
from safelight.kernels.triton.correct_rounding import reciprocal, square_root
from safelight.kernels.triton.jit import is_dense, kernel, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

ROWS = 8  # blocks per program, two for each of its four warps
WIDTH = 8  # elements in a row that a thread moves at once
LANES = BLOCK_SIZE // (2 * WIDTH)  # threads that share a block; each has two such pieces
CHUNK = 512  # elements per program of the kernel for fp32 moments
ALIGNMENT = 16  # bytes that addresses are a multiple of for wide accesses
MIN_V = 2.0**-100  # the update takes a smaller second moment as this; its root, 8.9e-16, is far below any usual eps
ZERO_SIGNED = 127  # the code of zero in the signed map; it is 0 in the unsigned one
# of the address table: weight, remainder, state1 or the packed codes, state2, absmax1, absmax2, number of elements
COLUMNS = 7
WEIGHTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@kernel(fp_fusion=False)
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer that an address-table entry holds. ALIGNED: it is a multiple of 16."""
    pointer = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@kernel(fp_fusion=False)
def _read(pointer, i, mask, ALIGNED: tl.constexpr):
    """Return a tensor's elements i, zeros where mask is not set; with ALIGNED all i must be within the tensor."""
    return tl.load(pointer + i) if ALIGNED else tl.load(pointer + i, mask=mask, other=0)


@kernel(fp_fusion=False)
def _load(row, i, mask, WEIGHT: tl.constexpr, MEMORY: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the fp32 weights at elements i of the tensor with this address-table row."""
    if WEIGHT == "fp32":
        value = _read(_pointer(tl.load(row), tl.float32, ALIGNED), i, mask, ALIGNED)
    elif MEMORY == "fp32":
        value = _read(_pointer(tl.load(row + 1), tl.float32, ALIGNED), i, mask, ALIGNED)
    else:
        weight = _read(_pointer(tl.load(row), tl.int16, ALIGNED), i, mask, ALIGNED)
        if MEMORY == "exact":
            left = _read(_pointer(tl.load(row + 1), tl.int16, ALIGNED), i, mask, ALIGNED).to(tl.int32)
        elif MEMORY == "near":
            left = _read(_pointer(tl.load(row + 1), tl.int8, ALIGNED), i, mask, ALIGNED).to(tl.int32)
        else:
            left = tl.full(i.shape, 0, tl.int32)
        value = join_bits(weight, left, WEIGHT, MEMORY)
    return value


@kernel(fp_fusion=False)
def _load_gradient(address, like_ptr, i, mask, ALIGNED: tl.constexpr):
    """Return the fp32 values of a gradient's elements i; like_ptr has its dtype."""
    if like_ptr.dtype.element_ty == tl.bfloat16:
        # bits instead of values: of a pair of bf16 values Triton would take two instructions to widen the second
        bits = _read(_pointer(address, tl.int16, ALIGNED), i, mask, ALIGNED).to(tl.int32) << 16
        gradient = bits.to(tl.float32, bitcast=True)
    else:
        gradient = _read(_pointer(address, like_ptr.dtype.element_ty, ALIGNED), i, mask, ALIGNED).to(tl.float32)
    return gradient


@kernel(fp_fusion=False)
def _store(row, i, mask, value, words, WEIGHT: tl.constexpr, MEMORY: tl.constexpr, ALIGNED: tl.constexpr):
    """Write fp32 weights in the form the tensor stores: rounded to WEIGHT, the rest to its remainder."""
    if WEIGHT == "fp32":
        tl.store(_pointer(tl.load(row), tl.float32, ALIGNED) + i, value, mask=mask)
    else:
        weight, left = split_bits(value, words, WEIGHT, MEMORY)
        tl.store(_pointer(tl.load(row), tl.int16, ALIGNED) + i, weight, mask=mask)
        if MEMORY == "fp32":
            tl.store(_pointer(tl.load(row + 1), tl.float32, ALIGNED) + i, value, mask=mask)
        elif MEMORY == "exact":
            tl.store(_pointer(tl.load(row + 1), tl.int16, ALIGNED) + i, left.to(tl.int16), mask=mask)
        elif MEMORY == "near":
            tl.store(_pointer(tl.load(row + 1), tl.int8, ALIGNED) + i, left.to(tl.int8), mask=mask)


@kernel(fp_fusion=False)
def _updated(weight, gradient, decayed_m, decayed_v, hyper_ptr, correction_ptr, one_minus_beta1, root_one_minus_beta2):
    """Return the new (weight, m, v), and the root of v.

    decayed_m, decayed_v: beta_1 m, beta_2 v; hyper: lr, weight decay; correction: a row of `AdamW8bit._corrections`.
    """
    scale = tl.load(correction_ptr + 2)
    # m = beta_1 m + (1 - beta_1) g
    m = decayed_m + one_minus_beta1 * scale * gradient
    # v = beta_2 v + (sqrt(1 - beta_2) g)^2
    root = root_one_minus_beta2 * scale * gradient
    v = decayed_v + root * root
    # w = w - (lr sqrt(c_2) / c_1 m / (sqrt(v) + eps sqrt(c_2)) + lr weight_decay w)
    root_of_v = square_root(tl.maximum(v, MIN_V))
    inverse = reciprocal(root_of_v + tl.load(correction_ptr + 1))
    lr = tl.load(hyper_ptr)
    # decay is added to the update, not multiplied into the weight: at lr 1e-6, w * (1 - lr * decay) rounds to w
    weight = weight - (lr * tl.load(correction_ptr) * (m * inverse) + lr * tl.load(hyper_ptr + 1) * weight)
    return weight, m, v, root_of_v


@kernel(fp_fusion=False)
def _times_blocks(x, factors):
    """Return a tile of ROWS blocks, each times its factor."""
    return tl.reshape(tl.reshape(x, (2, ROWS, LANES, WIDTH)) * factors[None, :, None, None], x.shape)


@kernel(fp_fusion=False)
def _absmax(x):
    """Return the largest value of each block of a tile of ROWS blocks without negative values."""
    of_pieces = tl.reduce(tl.reshape(x, (2, ROWS, LANES, WIDTH)), 3, tl.standard._elementwise_max)
    of_threads = tl.reduce(of_pieces, 0, tl.standard._elementwise_max)
    return tl.reduce(of_threads, 1, tl.standard._elementwise_max)


@kernel(fp_fusion=False)
def _factor(absmax):
    """Return what scales blocks to -SCALE .. SCALE: SCALE / absmax, or 0 where absmax is below TINY."""
    return tl.where(absmax < TINY, 0.0, reciprocal(tl.maximum(absmax, TINY) * (1 / SCALE)))


@kernel(fp_fusion=False)
def _adamw8bit_kernel(
    tensors_ptr,
    gradients_ptr,
    programs_ptr,
    like_ptr,
    hyper_ptr,
    corrections_ptr,
    skips_ptr,
    steps_ptr,
    seed_ptr,
    map1_ptr,
    map2_ptr,
    lines1_ptr,
    bounds1_ptr,
    lines2_ptr,
    bounds2_ptr,
    beta1,
    beta2,
    one_minus_beta1,
    root_one_minus_beta2,
    WEIGHT: tl.constexpr,
    MEMORY: tl.constexpr,
    MOMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update ROWS blocks of one tensor with 8-bit or 4-bit moments.

    tensors: the address table, (tensors, COLUMNS) int64; gradients: (tensors,) int64 addresses; programs: the work
    table, (programs, 2) int32 of tensor and first block; like: any gradient, for its dtype. hyper: lr, weight decay;
    corrections: (tensors, 3) float32, rows of `AdamW8bit._corrections`; skips: (tensors,) int32; steps: (tensors,)
    int64, taken before this one; seed: of stochastic rounding, two words. map, lines, bounds: of both moments
    (kernels/optim/blockwise_8bit.py); with MOMENTS 4bit map1 and lines1 are `value_table` and `bin_table`
    (kernels/optim/blockwise_4bit.py), and the others None. ALIGNED: the tensors' addresses are multiples of 16 bytes
    and their blocks whole, so that a thread moves WIDTH elements at once.
    """
    program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(program).to(tl.int64)
    if tl.load(skips_ptr + tensor) == 0:
        row = tensors_ptr + tensor * COLUMNS
        absmax1_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
        absmax2_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
        size = tl.load(row + 6)
        if ALIGNED:
            size = tl.multiple_of(size, BLOCK_SIZE)
        state1_ptr = _pointer(tl.load(row + 2), tl.uint8, ALIGNED)
        if MOMENTS == "8bit":
            state2_ptr = _pointer(tl.load(row + 3), tl.uint8, ALIGNED)
        first = tl.load(program + 1).to(tl.int64)
        # a tile is pieces of WIDTH elements: the first halves of all blocks, then their second halves. So half a warp
        # shares a block, and each thread has one piece of its first half and one of its second
        number = tl.arange(0, ROWS * BLOCK_SIZE // WIDTH)
        half = (number // (ROWS * LANES))[:, None]
        of_piece = number // LANES % ROWS
        block = first + tl.arange(0, ROWS)
        in_range = block * BLOCK_SIZE < size
        if ALIGNED:
            # threads of a block beyond the end read the first block, and write nothing
            is_piece_in_range = (first + of_piece) * BLOCK_SIZE < size
            of_piece = tl.where(is_piece_in_range, of_piece, 0)
        piece = (of_piece * (2 * LANES) + number % LANES)[:, None]
        # a thread's two addresses differ by a constant, which comes last
        i = first * BLOCK_SIZE + (piece * WIDTH + tl.arange(0, WIDTH)[None, :]) + half * (LANES * WIDTH)
        if ALIGNED:
            mask = tl.broadcast_to(is_piece_in_range[:, None], i.shape)
        else:
            mask = i < size
        weight = _load(row, i, mask, WEIGHT, MEMORY, ALIGNED)
        gradient = _load_gradient(tl.load(gradients_ptr + tensor), like_ptr, i, mask, ALIGNED)
        entry = tl.arange(0, 256)
        code1 = _read(state1_ptr, i, mask, ALIGNED)
        # a masked element would else have code 0, which is no zero in the signed map
        if MOMENTS == "8bit":
            if not ALIGNED:
                code1 = tl.where(mask, code1, ZERO_SIGNED)
            m = mapped(code1, tl.load(map1_ptr + entry))
            v = mapped(_read(state2_ptr, i, mask, ALIGNED), tl.load(map2_ptr + entry))
        else:
            # a masked v is at most 1/256 of its block's largest one, and so never the new largest
            if not ALIGNED:
                code1 = tl.where(mask, code1, ZERO_CODE)
            m, v = mapped_pair(code1, tl.load(map1_ptr + entry))
        # loaded late: they would take registers while the codes are looked up
        m = _times_blocks(m, tl.load(absmax1_ptr + block, mask=in_range, other=0.0) * beta1)
        absmax2 = tl.load(absmax2_ptr + block, mask=in_range, other=0.0)
        if MOMENTS == "4bit":
            absmax2 = absmax2 * absmax2
        v = _times_blocks(v, absmax2 * beta2)
        correction_ptr = corrections_ptr + tensor * 3
        weight, m, v, root = _updated(
            weight, gradient, m, v, hyper_ptr, correction_ptr, one_minus_beta1, root_one_minus_beta2
        )
        words = tl.full(i.shape, 0, tl.uint32)
        if MEMORY == "near" or MEMORY == "rounded":
            quad = (piece + half * LANES) * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]
            quad = first * (BLOCK_SIZE // 4) + quad
            words = rounding_words_of_tile(quad, tensor, tl.load(steps_ptr + tensor) + 1, seed_ptr)
        _store(row, i, mask, weight, words, WEIGHT, MEMORY, ALIGNED)
        if MOMENTS == "4bit":
            v = root
        absmax1 = _absmax(tl.abs(m))
        absmax2 = _absmax(v)
        scaled1 = _times_blocks(m, _factor(absmax1))
        scaled2 = _times_blocks(v, _factor(absmax2))
        if MOMENTS == "8bit":
            code1 = nearest_code(scaled1, tl.load(lines1_ptr + entry), tl.load(bounds1_ptr + entry), True)
            code2 = nearest_code(scaled2, tl.load(lines2_ptr + entry), tl.load(bounds2_ptr + entry), False)
            tl.store(state1_ptr + i, code1.to(tl.uint8), mask=mask)
            tl.store(state2_ptr + i, code2.to(tl.uint8), mask=mask)
        else:
            packed = nearest_pair(scaled1, scaled2, tl.load(lines1_ptr + entry))
            tl.store(state1_ptr + i, packed.to(tl.uint8), mask=mask)
        # All threads of half a warp hold their block's absmax. Stored as a (ROWS, LANES) tile of which only the first
        # lane is written, it needs no exchange between threads.
        lane = tl.arange(0, LANES)[None, :]
        place = block[:, None] + lane
        is_first = in_range[:, None] & (lane == 0)
        tl.store(absmax1_ptr + place, tl.broadcast_to(absmax1[:, None], place.shape), mask=is_first)
        tl.store(absmax2_ptr + place, tl.broadcast_to(absmax2[:, None], place.shape), mask=is_first)


@kernel(fp_fusion=False)
def _adamw32bit_kernel(
    tensors_ptr,
    gradients_ptr,
    programs_ptr,
    like_ptr,
    hyper_ptr,
    corrections_ptr,
    skips_ptr,
    steps_ptr,
    seed_ptr,
    beta1,
    beta2,
    one_minus_beta1,
    root_one_minus_beta2,
    WEIGHT: tl.constexpr,
    MEMORY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Update CHUNK elements of one tensor with fp32 moments.

    Arguments as above. Its rows of the address table have absmax addresses of 0; programs: tensor and first chunk.
    """
    program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(program).to(tl.int64)
    if tl.load(skips_ptr + tensor) == 0:
        row = tensors_ptr + tensor * COLUMNS
        state1_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        state2_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        first = tl.load(program + 1).to(tl.int64)
        i = first * CHUNK + tl.arange(0, CHUNK)
        mask = i < tl.load(row + 6)
        weight = _load(row, i, mask, WEIGHT, MEMORY, False)
        gradient = _load_gradient(tl.load(gradients_ptr + tensor), like_ptr, i, mask, False)
        m = tl.load(state1_ptr + i, mask=mask, other=0.0)
        v = tl.load(state2_ptr + i, mask=mask, other=0.0)
        correction_ptr = corrections_ptr + tensor * 3
        weight, m, v, _ = _updated(
            weight, gradient, m * beta1, v * beta2, hyper_ptr, correction_ptr, one_minus_beta1, root_one_minus_beta2
        )
        words = tl.full(i.shape, 0, tl.uint32)
        if MEMORY == "near" or MEMORY == "rounded":
            quad = first * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
            words = rounding_words_of_tile(quad, tensor, tl.load(steps_ptr + tensor) + 1, seed_ptr)
        _store(row, i, mask, weight, words, WEIGHT, MEMORY, False)
        tl.store(state1_ptr + i, m, mask=mask)
        tl.store(state2_ptr + i, v, mask=mask)


@dataclass(frozen=True)
class Moments:
    """A tensor's two moments in its shape and memory order: uint8 codes with absmax (blocks,), or float32 and None.

    With 4-bit moments state1 has the codes of both, state2 is None, and absmax2 is of the second moment's root.
    """

    state1: Tensor
    state2: Tensor | None
    absmax1: Tensor | None
    absmax2: Tensor | None

    @property
    def is_packed(self) -> bool:
        """Whether they are 4-bit."""
        return self.state2 is None

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by the names that they have in checkpoints and pages."""
        first = "packed" if self.is_packed else "state1"
        parts = {first: self.state1, "absmax1": self.absmax1, "state2": self.state2, "absmax2": self.absmax2}
        return {name: part for name, part in parts.items() if part is not None}


def adamw8bit_reference(
    p: Tensor,
    remainder: Tensor | None,
    moments: Moments,
    gradient: Tensor,
    hyper: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    memory: str,
    words: Tensor | None,
) -> None:
    """Take one step of one tensor in place, in plain PyTorch: operation by operation what the kernels do, equal bits.

    p: the weight; remainder: what completes it to fp32, or None. gradient: in the weight's memory order. hyper: lr,
    weight decay. corrections: a row of `AdamW8bit._corrections`. memory: a mode of kernels/optim/split_weights.py;
    words: its random words, for near and rounded.
    """
    lr, weight_decay = hyper
    step_factor, eps, scale = corrections
    beta1, beta2 = betas
    g = in_memory_order(gradient).float()
    states = tuple(map(_flat, (moments.state1, moments.state2)))
    absmaxes = moments.absmax1, moments.absmax2
    if moments.is_packed:
        m, v = dequantize_4bit(states[0], absmaxes[0] * beta1, absmaxes[1].square() * beta2)
    elif absmaxes[0] is None:
        m, v = states[0] * beta1, states[1] * beta2
    else:
        m, v = (
            dequantize(state, absmax * beta, signed)
            for state, absmax, beta, signed in zip(states, absmaxes, betas, (True, False), strict=True)
        )
    m = m.add_(g * (scale * (1 - beta1)))
    v = v.add_((g * (scale * math.sqrt(1 - beta2))).square_())
    update = m * correctly_rounded_sqrt(v.clamp(min=MIN_V)).add_(eps).reciprocal_()
    weight = in_memory_order(p)
    value = weight if p.dtype == torch.float32 else join(weight, _flat(remainder))
    value = value - update.mul_(lr * step_factor).add_(lr * weight_decay * value)
    if p.dtype == torch.float32:
        weight.copy_(value)
    else:
        rounded, rest = split(value, p.dtype, memory, words)
        weight.copy_(rounded)
        if rest is not None:
            in_memory_order(remainder).copy_(rest)
    if moments.is_packed:
        # taken again: held until here, it would be 4 bytes an element more, with 8-bit moments too
        root = correctly_rounded_sqrt(v.clamp(min=MIN_V))
        for target, new in zip((states[0], *absmaxes), quantize_4bit(m, root), strict=True):
            target.copy_(new)
        return
    for state, absmax, values, signed in zip(states, absmaxes, (m, v), (True, False), strict=True):
        if absmax is None:
            state.copy_(values)
        else:
            codes, new_absmax = quantize(values, signed)
            state.copy_(codes)
            absmax.copy_(new_absmax)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else in_memory_order(x)


class _LaunchPlan(NamedTuple):
    """One launch: over tensors whose moments are in blocks or fp32, with their lr and weight decay.

    is_aligned: ALIGNED of the kernel for moments in blocks.
    """

    is_blockwise: bool
    is_aligned: bool
    hyper: Tensor
    work: WorkTable


class AdamW8bit:
    """AdamW over weights of one dtype, updated in place. Their memory must not move: assign with copy_.

    parameters: dense, in any memory order, on one device, float32, bfloat16 or float16.
    memory: how 16-bit weights keep their fp32 value, a mode of kernels/optim/split_weights.py; float32 weights take
    only fp32.
    moments: 8bit | 4bit, of the moments of tensors that are not small.
    seed: of stochastic rounding, whose random words also depend on a tensor's index in the list.
    remainders: what `split_nearest` returned with the weights; made here if None.
    pages: host memory for the remainders and 8-bit moments; only with memory exact. `moments` and `remainders` are then
    views of it, to be read and written only after `synchronize`.
    stream: where some of the parameters are streamed from; they must be on the device in `update`.
    lr_factors: what each parameter's learning rate is multiplied by; None: 1. Each factor has launches of its own.
    owned: indices of the parameters that are stepped here; None: all. The others keep no state, but their places in the
    list, so that stochastic rounding is the same in whichever process a parameter is stepped. whole_sizes: numbers of
    elements that decide whether moments are 8-bit, if the parameters are pieces of larger ones.

    Attributes: step_counts, (tensors,) int64 on the device, steps taken; skips, (tensors,) int32, flags of the current
    step.
    Raises ValueError for other dtypes, tensors with gaps, or a memory mode that does not fit.
    Source: see the module's docstring; state as in bitsandbytes.optim.AdamW8bit.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        memory: str = "fp32",
        seed: int = 0,
        remainders: list[Tensor | None] | None = None,
        pages: Pages | None = None,
        stream: StreamedWeights | None = None,
        lr_factors: Sequence[float] | None = None,
        owned: Collection[int] | None = None,
        whole_sizes: Sequence[int] | None = None,
        moments: str = "8bit",
    ):
        dtype = parameters[0].dtype
        self.owned = range(len(parameters)) if owned is None else frozenset(owned)
        for i, p in enumerate(parameters):
            is_empty = p.numel() == 0 and i in self.owned
            if p.dtype not in WEIGHTS or p.dtype != dtype or not is_dense(p) or is_empty:
                raise ValueError(
                    f"AdamW8bit takes dense float32, bfloat16 or float16 weights of one dtype, got {tuple(p.shape)} "
                    f"{p.dtype} with strides {p.stride()}; the first weight is {dtype}"
                )
        if memory not in REMAINDERS or (dtype == torch.float32 and memory != "fp32"):
            raise ValueError(
                f"memory {memory!r} does not fit {dtype} weights; use fp32"
                + ("" if dtype == torch.float32 else ", exact, near or rounded")
            )
        if moments not in CODE_BYTES:
            raise ValueError(f"moments {moments!r} are none of {', '.join(CODE_BYTES)}")
        if pages is not None and memory != "exact":
            raise ValueError(f"memory {memory!r} cannot live in pages of host memory; use exact")
        self.parameters, self.betas, self.eps, self.memory, self.seed = parameters, betas, eps, memory, seed
        self.pages, self.stream = pages, stream
        self._is_packed = moments == "4bit"
        # streamed weights are in host memory
        device = parameters[0].device if stream is None else stream.ring[0].device
        self._is_blockwise = [size >= MIN_8BIT_ELEMENTS for size in whole_sizes or [p.numel() for p in parameters]]
        self.moments = [self._init_moments(i) if i in self.owned else None for i in range(len(parameters))]
        if remainders is None:
            remainders = [self._init_remainder(i) if i in self.owned else None for i in range(len(parameters))]
        if pages is not None and pages.host is None:
            # on meta there is no host memory: paged tensors have nothing but the ring's slots
            remainders = [None if i in pages else remainder for i, remainder in enumerate(remainders)]
        self.remainders = remainders
        num = len(parameters)
        self.step_counts = torch.zeros(num, dtype=torch.int64, device=device)
        self.skips = torch.zeros(num, dtype=torch.int32, device=device)
        if self._is_packed:
            # in the kernel's order of arguments: both maps, then lines and bounds of each
            tables = (value_table(), None, bin_table(), None, None, None)
        else:
            maps = (dynamic_map(signed) for signed in (True, False))
            tables = (*maps, *(x for signed in (True, False) for x in code_tables(signed)))
        self._tables = tuple(None if x is None else x.to(device) for x in tables)
        # sqrt(c_2) / c_1, eps sqrt(c_2), and what multiplies the gradient
        self._corrections = torch.ones(num, 3, device=device)
        self._factors = [1.0] * num if lr_factors is None else list(lr_factors)
        # lr and weight decay by factor of the learning rate
        self._hyper = {factor: torch.zeros(2, device=device) for factor in dict.fromkeys(self._factors)}
        # while True, steps run every kernel but skip every tensor: warm-up before a capture
        self.is_dry_run = False
        self._seed = torch.tensor([seed & MASK_32, seed >> 32], dtype=torch.int64, device=device)
        # by the slot of the pages' ring and the slot of the streamed weights
        self._address_tables: dict[tuple[int, int], Tensor] = {}
        # whether a tensor may be moved 16 bytes at a time, in all slots; known once there are address tables
        self._is_aligned = [True] * num
        # by the indices of the tensors that are updated together
        self._work_tables: dict[tuple[int, ...], list[_LaunchPlan]] = {}
        self._device_indices: dict[tuple[int, ...], Tensor] = {}
        self._by_page: dict[tuple[int, ...], list[tuple[int | None, tuple[int, ...]]]] = {}

    def _is_paged(self, index: int) -> bool:
        return self.pages is not None and index in self.pages

    def _init_moments(self, index: int) -> Moments:
        p = self.parameters[index]
        if self._is_paged(index):
            return _moments(self.pages.at_home(index))
        if not self._is_blockwise[index]:
            return Moments(
                *(torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for _ in range(2)), None, None
            )
        num_states = 1 if self._is_packed else 2
        states = [torch.zeros_like(p, dtype=torch.uint8, requires_grad=False) for _ in range(num_states)]
        # with absmax 0 every code stands for zero
        scales = [torch.zeros(num_blocks(p.numel()), dtype=torch.float32, device=p.device) for _ in range(2)]
        return Moments(states[0], None if self._is_packed else states[1], *scales)

    @torch.no_grad()
    def _init_remainder(self, index: int) -> Tensor | None:
        """Return a weight's remainder for its present value, or None if its mode keeps none."""
        p = self.parameters[index].detach()
        if p.dtype == torch.float32:
            return None
        source = torch.empty_like(p, dtype=torch.float32).copy_(p)
        weight, rest = split_nearest(in_memory_order(source), p.dtype, self.memory)
        in_memory_order(p).copy_(weight)
        if rest is None:
            return None
        is_paged = self._is_paged(index)
        remainder = self.pages.at_home(index)["remainder"] if is_paged else torch.empty_like(p, dtype=rest.dtype)
        in_memory_order(remainder).copy_(rest)
        return remainder

    def synchronize(self) -> None:
        """Wait until state in host memory, if there is any, may be read and written."""
        if self.pages is not None:
            self.pages.synchronize()
        if self.stream is not None:
            self.stream.synchronize()

    def value(self, index: int) -> Tensor:
        """Return a parameter's float32 value, weight and remainder joined, in its memory order."""
        self.synchronize()
        p, remainder = self.parameters[index].detach(), self.remainders[index]
        return p if p.dtype == torch.float32 else join(p, None if remainder is None else remainder.to(p.device))

    @torch.no_grad()
    def assign(self, index: int, value: Tensor) -> None:
        """Set a parameter to a float32 value, rounded to what its memory mode can hold."""
        self.synchronize()
        p, remainder = self.parameters[index].detach(), self.remainders[index]
        if p.dtype == torch.float32:
            p.copy_(value)
            return
        source = torch.empty_like(p, dtype=torch.float32).copy_(value)
        weight, rest = split_nearest(in_memory_order(source), p.dtype, self.memory)
        in_memory_order(p).copy_(weight)
        if rest is not None:
            in_memory_order(remainder).copy_(rest)

    @torch.no_grad()
    def step(
        self,
        gradients: list[Tensor],
        lr: float | Tensor,
        weight_decay: float | Tensor = 0.0,
        gradient_scale: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take one step of all tensors: begin, update, end. Arguments as there."""
        self.begin(lr, weight_decay)
        self.update(gradients, gradient_scale, found_inf)
        self.end()

    @torch.no_grad()
    def set_hyper(self, lr: float | Tensor, weight_decay: float | Tensor = 0.0) -> None:
        """Copy lr and weight decay to the device for the next steps."""
        for factor, hyper in self._hyper.items():
            for column, number in enumerate((lr if factor == 1 else lr * factor, weight_decay)):
                # a fill can be captured in a CUDA graph, a copy from the host cannot
                hyper[column].copy_(number) if isinstance(number, Tensor) else hyper[column].fill_(number)

    @torch.no_grad()
    def begin(self, *hyper: float | Tensor) -> None:
        """Begin a step: compute every tensor's bias corrections and clear the skip flags.

        hyper: lr and weight decay, passed to `set_hyper`; none leaves them as they are.
        """
        if hyper:
            self.set_hyper(*hyper)
        # float64, or 1 - beta^step loses digits in the first steps
        steps = (self.step_counts + 1).double()
        first, second = (1 - torch.pow(beta, steps) for beta in self.betas)
        root = second.sqrt()
        self._corrections[:, :2].copy_(torch.stack([root / first, self.eps * root], dim=1))
        self.skips.zero_()
        if self.pages is not None:
            self.pages.begin()

    @torch.no_grad()
    def update(
        self,
        gradients: list[Tensor],
        gradient_scale: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
        members: Sequence[int] | None = None,
    ) -> None:
        """Update some tensors, each at most once between `begin` and `end`.

        members: indices into the list of parameters; None for all. gradients: one per member, all of one dtype.
        gradient_scale: multiplies the gradients; one number, or one per member. found_inf: one number on the device, or
        one per member; where it is not 0, the tensor is skipped.
        Raises ValueError for gradients that do not fit.
        """
        members = tuple(range(len(self.parameters))) if members is None else tuple(members)
        if len(gradients) != len(members) or len({g.dtype for g in gradients}) != 1:
            raise ValueError(f"{len(gradients)} gradients for {len(members)} weights; give one each, of one dtype")
        where = self.indices_on_device(members)
        scales = gradient_scale
        if not isinstance(scales, Tensor):
            scales = torch.full((), scales, device=self.skips.device)
        scales = scales.to(self.skips.device, torch.float32).reshape(-1).expand(len(members))
        self._corrections[:, 2].index_copy_(0, where, scales)
        if found_inf is not None:
            flags = (found_inf != 0).to(torch.int32).reshape(-1).expand(len(members))
            self.skips.index_copy_(0, where, flags)
        if self.is_dry_run:
            self.skips.fill_(1)
        gradient_of = {}
        for index, g in zip(members, gradients, strict=True):
            p = self.parameters[index]
            if g.shape != p.shape:
                raise ValueError(f"a gradient has shape {tuple(g.shape)}, its weight {tuple(p.shape)}")
            is_usable = _same_memory_order(g, p) and g.data_ptr() % ALIGNMENT == 0
            gradient_of[index] = g if is_usable else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for page, indices in self._split_by_page(members):
            slot = 0 if page is None else self.pages.take(page)
            if runs_kernel(self._corrections):
                self._launch(indices, gradient_of, slot)
            else:
                skipped = self.skips.tolist()
                for index in indices:
                    if not skipped[index]:
                        self._update_in_pytorch(index, gradient_of[index], slot)
            if page is not None:
                self.pages.put(page)

    @torch.no_grad()
    def end(self) -> None:
        """End a step: increment the step count of every tensor that was not skipped."""
        self.step_counts += self.skips == 0
        if self.pages is not None:
            self.pages.end()

    def finish_capture(self) -> None:
        """Copy the captured gradients' addresses to the table that the graph reads, kept until `release_captures`.

        Call after every capture of a step as a CUDA graph: outside of the capture, and before its first replay.
        """
        for launch in itertools.chain(*self._work_tables.values()):
            launch.work.finish_capture()

    def release_captures(self) -> None:
        """Free the tables of all captured graphs, none of which may be replayed afterwards."""
        for launch in itertools.chain(*self._work_tables.values()):
            launch.work.release_captures()

    def indices_on_device(self, members: Sequence[int]) -> Tensor:
        """Return indices into the list of parameters as a device tensor, copied there only at the first call."""
        members = tuple(members)
        if members not in self._device_indices:
            self._device_indices[members] = torch.tensor(members, device=self.skips.device)
        return self._device_indices[members]

    def _split_by_page(self, members: tuple[int, ...]) -> list[tuple[int | None, tuple[int, ...]]]:
        """Return (page, members whose state it holds) pairs; page None for state that stays on the device."""
        if members not in self._by_page:
            members_of: dict[int | None, list[int]] = {}
            for index in members:
                page = self.pages.page_of[index] if self._is_paged(index) else None
                members_of.setdefault(page, []).append(index)
            self._by_page[members] = [(page, tuple(indices)) for page, indices in members_of.items()]
        return self._by_page[members]

    def _address_table(self, slot: int) -> Tensor:
        """Return the address table, (tensors, COLUMNS) int64.

        Paged state is at its addresses in a slot of the ring; streamed weights are in the slot of the block that is
        taken.
        """
        if not self._address_tables:
            page_slots = range(1 if self.pages is None else NUM_SLOTS)
            weight_slots = range(1 if self.stream is None else len(self.stream.ring))
            for place in itertools.product(page_slots, weight_slots):
                rows = []
                for index, p in enumerate(self.parameters):
                    weight = self.stream.in_slot(p, place[1]) if self.stream is not None and p in self.stream else p
                    remainder, m = self._state(index, place[0])
                    moments = (None,) * 4 if m is None else (m.state1, m.state2, m.absmax1, m.absmax2)
                    parts = (weight, remainder, *moments)
                    rows.append((*(0 if x is None else x.data_ptr() for x in parts), p.numel()))
                    is_aligned = all(address % ALIGNMENT == 0 for address in rows[-1][:-1])
                    self._is_aligned[index] &= is_aligned and p.numel() % BLOCK_SIZE == 0
                self._address_tables[place] = torch.tensor(rows, dtype=torch.int64, device=self.skips.device)
        return self._address_tables[slot, 0 if self.stream is None else self.stream.slot or 0]

    def _state(self, index: int, slot: int) -> tuple[Tensor | None, Moments | None]:
        """Return the (remainder, moments) that a step works on; a paged tensor's are those in a slot of the ring."""
        if not self._is_paged(index):
            return self.remainders[index], self.moments[index]
        pieces = self.pages.in_slot(index, slot)
        return pieces["remainder"], _moments(pieces)

    def _work_tables_of(self, members: tuple[int, ...]) -> list[_LaunchPlan]:
        """Return the launches over some tensors."""
        if members not in self._work_tables:
            # by whether moments are in blocks, whether the tensor is aligned, and the factor of its learning rate
            groups: dict[tuple[bool, bool, float], dict[int, int]] = {}
            for i in members:
                is_blockwise = self.moments[i].absmax1 is not None
                key = (is_blockwise, is_blockwise and self._is_aligned[i], self._factors[i])
                groups.setdefault(key, {})[i] = self.parameters[i].numel()
            launches = []
            for (is_blockwise, is_aligned, factor), sizes in sorted(groups.items(), reverse=True):
                elements, unit = (ROWS * BLOCK_SIZE, BLOCK_SIZE) if is_blockwise else (CHUNK, CHUNK)
                work = WorkTable(sizes, len(self.parameters), elements, unit, self.skips.device)
                launches.append(_LaunchPlan(is_blockwise, is_aligned, self._hyper[factor], work))
            self._work_tables[members] = launches
        return self._work_tables[members]

    def _launch(self, members: tuple[int, ...], gradients: dict[int, Tensor], slot: int) -> None:
        beta1, beta2 = self.betas
        constants = (beta1, beta2, 1 - beta1, math.sqrt(1 - beta2))
        options = {"WEIGHT": WEIGHTS[self.parameters[0].dtype], "MEMORY": self.memory}
        like = next(iter(gradients.values()))
        addresses = self._address_table(slot)
        moments = "4bit" if self._is_packed else "8bit"
        for is_blockwise, is_aligned, hyper, work in self._work_tables_of(members):
            shared = (
                addresses,
                work.gradient_addresses(gradients),
                work.rows,
                like,
                hyper,
                self._corrections,
                self.skips,
                self.step_counts,
                self._seed,
            )
            grid = (len(work.rows),)
            if is_blockwise:
                _adamw8bit_kernel[grid](
                    *shared, *self._tables, *constants, **options, MOMENTS=moments, ALIGNED=is_aligned
                )
            else:
                _adamw32bit_kernel[grid](*shared, *constants, **options, CHUNK=CHUNK)

    def _update_in_pytorch(self, index: int, gradient: Tensor, slot: int) -> None:
        words = None
        if self.memory in ("near", "rounded"):
            words = rounding_words(self.seed, self.step_counts[index] + 1, index, gradient.numel())
        adamw8bit_reference(
            self.parameters[index].detach(),
            *self._state(index, slot),
            gradient,
            self._hyper[self._factors[index]],
            self._corrections[index],
            self.betas,
            self.memory,
            words,
        )


def _moments(pieces: dict[str, Tensor]) -> Moments:
    codes = (pieces["packed"], None) if "packed" in pieces else (pieces["state1"], pieces["state2"])
    return Moments(*codes, pieces["absmax1"], pieces["absmax2"])


def _same_memory_order(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors of one shape have the same memory order.

    Strides of dimensions of size 1 do not count: cuDNN's differ for the gradient of a 1x1 kernel.
    """
    if x.stride() == y.stride():
        return True
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True))
