"""AdamW with 8-bit moments over all of a model's tensors, in two launches a group.

    m = beta_1 m + (1 - beta_1) g        v = beta_2 v + (1 - beta_2) g^2
    w = w - lr (m / c_1 / (sqrt(v) / sqrt(c_2) + eps) + weight_decay w),  c_i = 1 - beta_i^step

Moments are codes into bitsandbytes' dynamic maps (kernels/optim/blockwise_8bit.py). Blocks follow memory order, never cross a tensor,
and the update takes the moments before they are rounded. A tensor under 4,096 elements keeps fp32 moments. So a contiguous
tensor's state is bitsandbytes' state, byte for byte; a channels-last one's is requantised on the way out and in.
Weights are fp32, or 16-bit with a remainder (kernels/optim/split_weights.py), joined, updated in fp32 and split again.

lr, weight decay, gradient scale, steps and skip flags are numbers on the device: nothing is synchronised. A tensor that is
skipped keeps its weights, moments and step. Tensors' addresses stand in tables. Everything that a step reads or changes
stays where it is, so that one can be captured as a CUDA graph: after a step that was not, `set_hyper` before a replay,
`finish_capture` after a capture. The kernels round every operation on its
own, so they and the PyTorch reference give equal bits.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101; Dettmers et al. 2022, arXiv:2110.02861.

An AdamW step of one tensor in plain PyTorch, operation by operation as kernels/optim/adamw8bit.py does it: equal bits.

The kernels of kernels/optim/adamw8bit.py: one for tensors with 8-bit moments, one for those with fp32 moments.

Equal bits with the PyTorch reference: no fused multiply-add, quotients and roots correctly rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from safelight.kernels.moment_blocks import BLOCK_SIZE, MIN_8BIT_ELEMENTS
from safelight.kernels.optim.blockwise_8bit import (
    TINY,
    bounds_of,
    dequantize,
    dynamic_map,
    in_memory_order,
    nearest_code,
    quantize,
)
from safelight.kernels.optim.launch_tables import Programs
from safelight.kernels.optim.paged_state import NUM_SLOTS, Pages
from safelight.kernels.optim.split_weights import (
    REMAINDERS,
    draws,
    draws_of_rows,
    join,
    join_bits,
    split,
    split_bits,
    start,
)
from safelight.kernels.philox import MASK_32
from safelight.kernels.triton.jit import cdiv, is_dense, kernel, runs_kernel


@dataclass(frozen=True)
class Moments:
    """A tensor's moments, in its shape and memory order: codes with absmax (blocks,), or float32 without."""

    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None


def adamw8bit_reference(
    p: Tensor,
    beside: Tensor | None,
    moments: Moments,
    gradient: Tensor,
    hyper: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
    memory: str,
    words: Tensor | None,
) -> None:
    """Update a weight, its remainder `beside` and its moments.

    gradient: in the weight's memory order. hyper: lr, weight decay. corrections: 1 - beta_1^t, sqrt(1 - beta_2^t), the gradient's
    scale. memory: of kernels/optim/split_weights.py; words: its draws, for near and rounded.
    """
    lr, weight_decay = hyper
    correction1, root_correction2, scale = corrections
    beta1, beta2 = betas
    g = in_memory_order(gradient).float() * scale
    states = in_memory_order(moments.state1), in_memory_order(moments.state2)
    absmaxes = moments.absmax1, moments.absmax2
    m, v = states
    if absmaxes[0] is not None:
        m, v = (dequantize(*x, signed) for *x, signed in zip(states, absmaxes, (True, False), strict=True))
    m = (m * beta1).add_(g * (1 - beta1))
    v = (v * beta2).add_((g * (1 - beta2)).mul_(g))
    update = m / _sqrt(v).div_(root_correction2).add_(eps).mul_(correction1)
    weight = in_memory_order(p)
    value = weight if p.dtype == torch.float32 else join(weight, None if beside is None else in_memory_order(beside))
    value = value - update.add_(weight_decay * value).mul_(lr)
    if p.dtype == torch.float32:
        weight.copy_(value)
    else:
        found, left = split(value, p.dtype, memory, words)
        weight.copy_(found)
        if left is not None:
            in_memory_order(beside).copy_(left)
    for state, absmax, values, signed in zip(states, absmaxes, (m, v), (True, False), strict=True):
        if absmax is None:
            state.copy_(values)
        else:
            codes, largest = quantize(values, signed)
            state.copy_(codes)
            absmax.copy_(largest)


def _sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded root; torch's vectorised one on the CPU is not (docs/decisions.md, 3)."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


if TYPE_CHECKING:
    import triton.language as tl

COLUMNS = 7  # of the table of tensors


@kernel(fp_fusion=False)
def _load(row, i, mask, WEIGHT: tl.constexpr, MEMORY: tl.constexpr):
    """Return the fp32 values of the weights at `i` of the tensor whose table row this is."""
    if WEIGHT == "fp32":
        value = tl.load(tl.load(row).to(tl.pointer_type(tl.float32)) + i, mask=mask, other=0.0)
    elif MEMORY == "fp32":
        value = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.float32)) + i, mask=mask, other=0.0)
    else:
        weight = tl.load(tl.load(row).to(tl.pointer_type(tl.int16)) + i, mask=mask, other=0)
        if MEMORY == "exact":
            left = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int16)) + i, mask=mask, other=0).to(tl.int32)
        elif MEMORY == "near":
            left = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int8)) + i, mask=mask, other=0).to(tl.int32)
        else:
            left = tl.full(i.shape, 0, tl.int32)
        value = join_bits(weight, left, WEIGHT, MEMORY)
    return value


@kernel(fp_fusion=False)
def _store(row, i, mask, value, words, WEIGHT: tl.constexpr, MEMORY: tl.constexpr):
    """Write the fp32 values as the tensor keeps them."""
    if WEIGHT == "fp32":
        tl.store(tl.load(row).to(tl.pointer_type(tl.float32)) + i, value, mask=mask)
    else:
        weight, left = split_bits(value, words, WEIGHT, MEMORY)
        tl.store(tl.load(row).to(tl.pointer_type(tl.int16)) + i, weight, mask=mask)
        if MEMORY == "fp32":
            tl.store(tl.load(row + 1).to(tl.pointer_type(tl.float32)) + i, value, mask=mask)
        elif MEMORY == "exact":
            tl.store(tl.load(row + 1).to(tl.pointer_type(tl.int16)) + i, left.to(tl.int16), mask=mask)
        elif MEMORY == "near":
            tl.store(tl.load(row + 1).to(tl.pointer_type(tl.int8)) + i, left.to(tl.int8), mask=mask)


@kernel(fp_fusion=False)
def _updated(weight, gradient, m, v, hyper_ptr, correction, beta1, beta2, one_minus_beta1, one_minus_beta2, eps):
    """Return the new (weight, m, v); hyper: lr, weight decay; correction: c_1, sqrt(c_2), gradient scale."""
    gradient = gradient * tl.load(correction + 2)
    m = m * beta1 + one_minus_beta1 * gradient
    v = v * beta2 + one_minus_beta2 * gradient * gradient
    update = tl.div_rn(m, tl.load(correction) * (tl.div_rn(tl.sqrt_rn(v), tl.load(correction + 1)) + eps))
    # the decay joins the update before the weight is touched: at lr 1e-6, weight * (1 - lr * decay) rounds to weight
    weight = weight - tl.load(hyper_ptr) * (update + tl.load(hyper_ptr + 1) * weight)
    return weight, m, v


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
    bounds1_ptr,
    bounds2_ptr,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    WEIGHT: tl.constexpr,
    MEMORY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """tensors: (tensors, 7) int64 addresses of weight, remainder, states, absmaxes, and the size; programs: (tensor, first block).

    corrections: (tensors, 3) float32; skips: (tensors,) int32; steps: (tensors,) int64 steps taken before this one.
    """
    program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(program).to(tl.int64)
    if tl.load(skips_ptr + tensor) == 0:
        row = tensors_ptr + tensor * COLUMNS
        state1_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
        state2_ptr = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
        absmax1_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
        absmax2_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
        size = tl.load(row + 6)
        gradient_ptr = tl.load(gradients_ptr + tensor).to(tl.pointer_type(like_ptr.dtype.element_ty))
        first = tl.load(program + 1).to(tl.int64)
        block = first + tl.arange(0, ROWS)
        i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        mask = i < size
        in_range = block * BLOCK_SIZE < size
        weight = _load(row, i, mask, WEIGHT, MEMORY)
        gradient = tl.load(gradient_ptr + i, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(map1_ptr + tl.load(state1_ptr + i, mask=mask, other=0).to(tl.int32))
        v = tl.load(map2_ptr + tl.load(state2_ptr + i, mask=mask, other=0).to(tl.int32))
        m = m * tl.load(absmax1_ptr + block, mask=in_range, other=0.0)[:, None]
        v = v * tl.load(absmax2_ptr + block, mask=in_range, other=0.0)[:, None]
        correction = corrections_ptr + tensor * 3
        weight, m, v = _updated(
            weight, gradient, m, v, hyper_ptr, correction, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
        )
        words = tl.full(i.shape, 0, tl.uint32)
        if MEMORY == "near" or MEMORY == "rounded":
            words = draws_of_rows(first, tensor, tl.load(steps_ptr + tensor) + 1, seed_ptr, ROWS, BLOCK_SIZE)
        _store(row, i, mask, weight, words, WEIGHT, MEMORY)
        # code 0, which stands beyond the tensor's end, is no zero in the signed map
        m = tl.where(mask, m, 0.0)
        absmax1 = tl.reduce(tl.abs(m), 1, tl.standard._elementwise_max)
        absmax2 = tl.reduce(v, 1, tl.standard._elementwise_max)
        code1 = nearest_code(tl.div_rn(m, tl.maximum(absmax1, TINY)[:, None]), bounds1_ptr)
        code2 = nearest_code(tl.div_rn(v, tl.maximum(absmax2, TINY)[:, None]), bounds2_ptr)
        tl.store(state1_ptr + i, code1.to(tl.uint8), mask=mask)
        tl.store(state2_ptr + i, code2.to(tl.uint8), mask=mask)
        tl.store(absmax1_ptr + block, absmax1, mask=in_range)
        tl.store(absmax2_ptr + block, absmax2, mask=in_range)


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
    one_minus_beta2,
    eps,
    WEIGHT: tl.constexpr,
    MEMORY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """As above, without absmaxes (addresses 0); programs: (tensor, first chunk)."""
    program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(program).to(tl.int64)
    if tl.load(skips_ptr + tensor) == 0:
        row = tensors_ptr + tensor * COLUMNS
        state1_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        state2_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        gradient_ptr = tl.load(gradients_ptr + tensor).to(tl.pointer_type(like_ptr.dtype.element_ty))
        first = tl.load(program + 1).to(tl.int64)
        i = (first * CHUNK + tl.arange(0, CHUNK))[None, :]
        mask = i < tl.load(row + 6)
        weight = _load(row, i, mask, WEIGHT, MEMORY)
        gradient = tl.load(gradient_ptr + i, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(state1_ptr + i, mask=mask, other=0.0)
        v = tl.load(state2_ptr + i, mask=mask, other=0.0)
        correction = corrections_ptr + tensor * 3
        weight, m, v = _updated(
            weight, gradient, m, v, hyper_ptr, correction, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
        )
        words = tl.full(i.shape, 0, tl.uint32)
        if MEMORY == "near" or MEMORY == "rounded":
            words = draws_of_rows(first, tensor, tl.load(steps_ptr + tensor) + 1, seed_ptr, 1, CHUNK)
        _store(row, i, mask, weight, words, WEIGHT, MEMORY)
        tl.store(state1_ptr + i, m, mask=mask)
        tl.store(state2_ptr + i, v, mask=mask)


ROWS = 2  # blocks a program: 4 elements a thread; 8 of them spill a register in some variants
CHUNK = 512  # elements a program of the kernel for fp32 moments
WEIGHTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class AdamW8bit:
    """AdamW over weights of one dtype, updated in place; their memory must stay where it is (assign with copy_).

    parameters: dense, of any memory order, on one device, float32, bfloat16 or float16. memory: of kernels/optim/split_weights.py;
    float32 weights take fp32 alone. values: float32 to start from, in place of what 16-bit weights hold; or remainders, what
    remainder.start gave beside them. seed: of stochastic rounding, whose draws also depend on a tensor's place in the list.
    pages: for exact alone, the host memory that remainders and 8-bit moments live in; `moments` and `remainders` are then
    views of it, to be read and written after `synchronize`.

    step_counts: steps taken, (tensors,) int64 on the device. skips: (tensors,) int32, of the step under way.
    Raises ValueError for other dtypes, for tensors with gaps, and for a memory mode that does not fit.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        memory: str = "fp32",
        seed: int = 0,
        values: list[Tensor] | None = None,
        remainders: list[Tensor | None] | None = None,
        pages: Pages | None = None,
    ):
        dtype = parameters[0].dtype
        for p in parameters:
            if p.dtype not in WEIGHTS or p.dtype != dtype or not is_dense(p) or p.numel() == 0:
                raise ValueError(
                    f"AdamW8bit takes dense float32, bfloat16 or float16 weights of one dtype, got {tuple(p.shape)} "
                    f"{p.dtype} with strides {p.stride()} beside {dtype}"
                )
        if memory not in REMAINDERS or (dtype == torch.float32 and memory != "fp32"):
            raise ValueError(
                f"memory {memory!r} does not fit {dtype} weights; use fp32"
                + ("" if dtype == torch.float32 else ", exact, near or rounded")
            )
        if pages is not None and memory != "exact":
            raise ValueError(f"memory {memory!r} has no pages in host memory; use exact")
        self.parameters, self.betas, self.eps, self.memory, self.seed = parameters, betas, eps, memory, seed
        self.pages = pages
        device = parameters[0].device
        self.moments = [self._empty(i) for i in range(len(parameters))]
        if remainders is None:
            remainders = [self._beside(i, None if values is None else values[i]) for i in range(len(parameters))]
        if pages is not None and pages.host is None:
            # of meta tensors nothing is kept beside the ring
            remainders = [None if i in pages else beside for i, beside in enumerate(remainders)]
        self.remainders = remainders
        num = len(parameters)
        self.step_counts = torch.zeros(num, dtype=torch.int64, device=device)
        self.skips = torch.zeros(num, dtype=torch.int32, device=device)
        self.maps = tuple(dynamic_map(signed).to(device) for signed in (True, False))
        self._bounds = tuple(bounds_of(signed).to(device) for signed in (True, False))
        self._corrections = torch.ones(num, 3, device=device)
        self._hyper = torch.zeros(2, device=device)
        # a step goes through everything and skips every tensor
        self.is_dry_run = False
        self._seed = torch.tensor([seed & MASK_32, seed >> 32], dtype=torch.int64, device=device)
        self._tables: list[Tensor] = []
        self._programs: dict[tuple[int, ...], list[tuple[bool, Programs]]] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._by_page: dict[tuple[int, ...], list[tuple[int | None, tuple[int, ...]]]] = {}

    def _is_paged(self, index: int) -> bool:
        return self.pages is not None and index in self.pages

    def _empty(self, index: int) -> Moments:
        p = self.parameters[index]
        if self._is_paged(index):
            return _moments(self.pages.at_home(index))
        if p.numel() < MIN_8BIT_ELEMENTS:
            return Moments(
                *(torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for _ in range(2)), None, None
            )
        num_blocks = cdiv(p.numel(), BLOCK_SIZE)
        states = [torch.zeros_like(p, dtype=torch.uint8, requires_grad=False) for _ in range(2)]
        # absmax 0 makes every code a zero
        return Moments(*states, *(torch.zeros(num_blocks, dtype=torch.float32, device=p.device) for _ in range(2)))

    @torch.no_grad()
    def _beside(self, index: int, value: Tensor | None) -> Tensor | None:
        """Return the memory that completes a weight to fp32, filled; rounds the weight to `value`."""
        p = self.parameters[index].detach()
        if p.dtype == torch.float32:
            if value is not None:
                p.copy_(value)
            return None
        source = torch.empty_like(p, dtype=torch.float32).copy_(p if value is None else value)
        weight, left = start(in_memory_order(source), p.dtype, self.memory)
        in_memory_order(p).copy_(weight)
        if left is None:
            return None
        paged = self._is_paged(index)
        beside = self.pages.at_home(index)["remainder"] if paged else torch.empty_like(p, dtype=left.dtype)
        in_memory_order(beside).copy_(left)
        return beside

    def synchronize(self) -> None:
        """Wait until pages in host memory, where there are some, may be read and written to."""
        if self.pages is not None:
            self.pages.synchronize()

    def value(self, index: int) -> Tensor:
        """Return a parameter's float32 value, weight and remainder joined, in its memory order."""
        p, beside = self.parameters[index].detach(), self.remainders[index]
        self.synchronize()
        return p if p.dtype == torch.float32 else join(p, None if beside is None else beside.to(p.device))

    @torch.no_grad()
    def assign(self, index: int, value: Tensor) -> None:
        """Give a parameter a float32 value, rounded to what its memory mode holds."""
        p, beside = self.parameters[index].detach(), self.remainders[index]
        self.synchronize()
        if p.dtype == torch.float32:
            p.copy_(value)
            return
        source = torch.empty_like(p, dtype=torch.float32).copy_(value)
        weight, left = start(in_memory_order(source), p.dtype, self.memory)
        in_memory_order(p).copy_(weight)
        if left is not None:
            in_memory_order(beside).copy_(left)

    @torch.no_grad()
    def step(
        self,
        gradients: list[Tensor],
        lr: float | Tensor,
        weight_decay: float | Tensor = 0.0,
        gradient_scale: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take one step over all tensors: begin, update, end."""
        self.begin(lr, weight_decay)
        self.update(gradients, gradient_scale, found_inf)
        self.end()

    @torch.no_grad()
    def set_hyper(self, lr: float | Tensor, weight_decay: float | Tensor = 0.0) -> None:
        """Write the numbers of the steps to come where they are read on the device."""
        for place, number in enumerate((lr, weight_decay)):
            # a fill can be captured in a graph, a copy from the host cannot
            self._hyper[place].copy_(number) if isinstance(number, Tensor) else self._hyper[place].fill_(number)

    @torch.no_grad()
    def begin(self, *hyper: float | Tensor) -> None:
        """Begin a step: corrections of the bias for every tensor, none skipped yet. hyper: for set_hyper, if it is to change."""
        if hyper:
            self.set_hyper(*hyper)
        # in float64, for 1 - beta^step at step 1
        steps = (self.step_counts + 1).double()
        first, second = (1 - torch.pow(beta, steps) for beta in self.betas)
        self._corrections[:, :2].copy_(torch.stack([first, second.sqrt()], dim=1))
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
        """Update some tensors; each at most once between begin and end.

        gradients: one a member, of one dtype; they are multiplied by gradient_scale, one number or one a member. members:
        places in the list of parameters; None is all. found_inf: one number on the device, or one a member; a tensor
        where it is not 0 is skipped.
        Raises ValueError for gradients that do not fit.
        """
        members = tuple(range(len(self.parameters))) if members is None else tuple(members)
        if len(gradients) != len(members) or len({g.dtype for g in gradients}) != 1:
            raise ValueError(f"{len(gradients)} gradients for {len(members)} weights; give one each, of one dtype")
        where = self.places(members)
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
        ordered = {}
        for index, g in zip(members, gradients, strict=True):
            p = self.parameters[index]
            if g.shape != p.shape:
                raise ValueError(f"a gradient has shape {tuple(g.shape)}, its weight {tuple(p.shape)}")
            ordered[index] = g if _lie_alike(g, p) else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for page, inside in self._pages_of(members):
            slot = 0 if page is None else self.pages.take(page)
            if runs_kernel(self.parameters[0]):
                self._launch(inside, ordered, slot)
            else:
                skipped = self.skips.tolist()
                for index in inside:
                    if not skipped[index]:
                        self._update_in_pytorch(index, ordered[index], slot)
            if page is not None:
                self.pages.put(page)

    @torch.no_grad()
    def end(self) -> None:
        """End a step: count it for every tensor that was not skipped."""
        self.step_counts += self.skips == 0
        if self.pages is not None:
            self.pages.end()

    def finish_capture(self) -> None:
        """Call after every capture of a step as a CUDA graph, outside of it and before its first replay.

        Its gradients' addresses are known now and are copied to the table it reads, which is kept until release_captures.
        """
        for _, programs in itertools.chain(*self._programs.values()):
            programs.finish_capture()

    def release_captures(self) -> None:
        """Free the tables of all captured graphs; none of them may be replayed again."""
        for _, programs in itertools.chain(*self._programs.values()):
            programs.release_captures()

    def places(self, members: Sequence[int]) -> Tensor:
        """Return places in the list of parameters as an index on the device, copied there at the first call alone."""
        members = tuple(members)
        if members not in self._indices:
            self._indices[members] = torch.tensor(members, device=self.skips.device)
        return self._indices[members]

    def _pages_of(self, members: tuple[int, ...]) -> list[tuple[int | None, tuple[int, ...]]]:
        """Return (page, the tensors in it) of some tensors; page None for those whose state stays on the device."""
        if members not in self._by_page:
            found: dict[int | None, list[int]] = {}
            for index in members:
                page = self.pages.page_of[index] if self._is_paged(index) else None
                found.setdefault(page, []).append(index)
            self._by_page[members] = [(page, tuple(inside)) for page, inside in found.items()]
        return self._by_page[members]

    def _table(self, slot: int) -> Tensor:
        """Return the kernels' table of tensors: (tensors, COLUMNS) addresses, of pages as they are in a slot."""
        if not self._tables:
            for place in range(1 if self.pages is None else NUM_SLOTS):
                rows = []
                for index, p in enumerate(self.parameters):
                    beside, m = self._state(index, place)
                    parts = (p, beside, m.state1, m.state2, m.absmax1, m.absmax2)
                    rows.append((*(0 if x is None else x.data_ptr() for x in parts), p.numel()))
                self._tables.append(torch.tensor(rows, dtype=torch.int64, device=self.skips.device))
        return self._tables[slot]

    def _state(self, index: int, slot: int) -> tuple[Tensor | None, Moments]:
        """Return (remainder, moments) that a step works on: of a page the ones in a slot."""
        if not self._is_paged(index):
            return self.remainders[index], self.moments[index]
        pieces = self.pages.in_slot(index, slot)
        return pieces["remainder"], _moments(pieces)

    def _programs_of(self, members: tuple[int, ...]) -> list[tuple[bool, Programs]]:
        """Return the launches over some tensors: (has it 8-bit moments, programs)."""
        if members not in self._programs:
            found = []
            for coded, elements, unit in ((True, ROWS * BLOCK_SIZE, BLOCK_SIZE), (False, CHUNK, CHUNK)):
                sizes = {
                    i: self.parameters[i].numel() for i in members if (self.moments[i].absmax1 is not None) == coded
                }
                if sizes:
                    found.append((coded, Programs(sizes, len(self.parameters), elements, unit, self.skips.device)))
            self._programs[members] = found
        return self._programs[members]

    def _launch(self, members: tuple[int, ...], gradients: dict[int, Tensor], slot: int) -> None:
        beta1, beta2 = self.betas
        numbers = (beta1, beta2, 1 - beta1, 1 - beta2, self.eps)
        options = {"WEIGHT": WEIGHTS[self.parameters[0].dtype], "MEMORY": self.memory}
        like = next(iter(gradients.values()))
        for coded, programs in self._programs_of(members):
            shared = (
                self._table(slot),
                programs.gradients(gradients),
                programs.table,
                like,
                self._hyper,
                self._corrections,
                self.skips,
                self.step_counts,
                self._seed,
            )
            grid = (len(programs.table),)
            if coded:
                maps = (*self.maps, *self._bounds)
                _adamw8bit_kernel[grid](*shared, *maps, *numbers, **options, BLOCK_SIZE=BLOCK_SIZE, ROWS=ROWS)
            else:
                _adamw32bit_kernel[grid](*shared, *numbers, **options, CHUNK=CHUNK)

    def _update_in_pytorch(self, index: int, gradient: Tensor, slot: int) -> None:
        words = None
        if self.memory in ("near", "rounded"):
            words = draws(self.seed, self.step_counts[index] + 1, index, gradient.numel())
        adamw8bit_reference(
            self.parameters[index].detach(),
            *self._state(index, slot),
            gradient,
            self._hyper,
            self._corrections[index],
            self.betas,
            self.eps,
            self.memory,
            words,
        )


def _moments(pieces: dict[str, Tensor]) -> Moments:
    return Moments(*(pieces[name] for name in ("state1", "state2", "absmax1", "absmax2")))


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors of a shape have one memory order; cuDNN gives a 1x1 kernel's gradient other strides of size 1."""
    if x.stride() == y.stride():
        return True
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True))
