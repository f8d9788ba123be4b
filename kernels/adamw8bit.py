"""AdamW with 8-bit moments over all of a model's tensors, in two launches.

    m = beta_1 m + (1 - beta_1) g        v = beta_2 v + (1 - beta_2) g^2
    w = w - lr (m / c_1 / (sqrt(v) / sqrt(c_2) + eps) + weight_decay w),  c_i = 1 - beta_i^step

Moments are codes into bitsandbytes' dynamic maps, scaled by the largest absolute value of a block of 256 elements. Blocks
follow memory order, never cross a tensor, and the update takes the moments before they are rounded. A tensor under 4,096
elements keeps fp32 moments. So a contiguous tensor's state is bitsandbytes' state, byte for byte; a channels-last one's
is requantised on the way out and in.

lr, weight decay, gradient scale, step and the found-inf flag are numbers on the device: nothing is synchronised, and a
step with a non-finite gradient changes neither weights nor moments nor the step. A tensor's addresses stand in tables.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101; Dettmers et al. 2022, arXiv:2110.02861.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.kernels.jit import cdiv, is_dense, kernel, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK_SIZE = 256
MIN_8BIT_ELEMENTS = 4096
TINY = 1.2e-38  # the smallest normal fp32: a block of zeros is divided by this
ROWS = 4  # blocks a program: 8 elements a thread
CHUNK = 1024  # elements a program of the fp32 kernel


def dynamic_map(signed: bool) -> Tensor:
    """Return bitsandbytes' dynamic map, (256,) float32, ascending: seven decades, the largest with the finest steps."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1, dtype=torch.float32)
        centres = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += centres.tolist() + ((-centres).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def bounds_of(code_map: Tensor) -> Tensor:
    """Return the values halfway between a map's codes, (255,): a value belongs to the code whose bounds it lies between."""
    return (code_map[:-1] + code_map[1:]) / 2


def quantize(values: Tensor, code_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes uint8, absmax) of flat float32 values in blocks of 256: the nearest code, the lower one at a tie."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    absmax = padded.abs().amax(dim=1)
    codes = torch.bucketize(padded / absmax.clamp(min=TINY)[:, None], bounds_of(code_map).to(values.device))
    return codes.to(torch.uint8).view(-1)[: len(values)], absmax


def dequantize(codes: Tensor, absmax: Tensor, code_map: Tensor) -> Tensor:
    """Return flat float32 values of flat codes."""
    scale = absmax.repeat_interleave(BLOCK_SIZE)[: len(codes)]
    return code_map.to(codes.device)[codes.long()] * scale


def in_memory_order(x: Tensor) -> Tensor:
    """Return a dense tensor's elements as they lie in memory, flat; a view."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


@dataclass(frozen=True)
class Moments:
    """A tensor's moments, in its shape and memory order: codes with absmax (blocks,), or float32 without."""

    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None


@kernel
def _updated(weight, gradient, m, v, hyper_ptr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps):
    """Return the new (weight, m, v); hyper: lr, weight decay, c_1, sqrt(c_2), gradient scale, skip."""
    gradient = gradient * tl.load(hyper_ptr + 4)
    m = m * beta1 + one_minus_beta1 * gradient
    v = v * beta2 + one_minus_beta2 * gradient * gradient
    update = tl.div_rn(m, tl.load(hyper_ptr + 2) * (tl.div_rn(tl.sqrt_rn(v), tl.load(hyper_ptr + 3)) + eps))
    # the decay joins the update before the weight is touched: at lr 1e-6, weight * (1 - lr * decay) rounds to weight
    weight = weight - tl.load(hyper_ptr) * (update + tl.load(hyper_ptr + 1) * weight)
    return weight, m, v


@kernel
def _nearest_code(x, bounds_ptr):
    """Return how many of the 255 bounds lie below x, by halving."""
    code = tl.full(x.shape, 0, tl.int32)
    for i in tl.static_range(8):
        half = 128 >> i
        code = tl.where(tl.load(bounds_ptr + code + (half - 1)) < x, code + half, code)
    return code


@kernel
def _adamw8bit_kernel(
    tensors_ptr, gradients_ptr, programs_ptr, like_ptr, map1_ptr, map2_ptr, bounds1_ptr, bounds2_ptr, hyper_ptr,
    beta1, beta2, one_minus_beta1, one_minus_beta2, eps, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """tensors: (tensors, 6) int64 addresses of weight, states, absmaxes, and the size; programs: (tensor, first block)."""
    if tl.load(hyper_ptr + 5) == 0.0:
        program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
        tensor = tl.load(program).to(tl.int64)
        row = tensors_ptr + tensor * 6
        weight_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
        state1_ptr = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
        state2_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
        absmax1_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        absmax2_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
        size = tl.load(row + 5)
        gradient_ptr = tl.load(gradients_ptr + tensor).to(tl.pointer_type(like_ptr.dtype.element_ty))
        block = tl.load(program + 1).to(tl.int64) + tl.arange(0, ROWS)
        i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        mask = i < size
        in_range = block * BLOCK_SIZE < size
        weight = tl.load(weight_ptr + i, mask=mask, other=0.0)
        gradient = tl.load(gradient_ptr + i, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(map1_ptr + tl.load(state1_ptr + i, mask=mask, other=0).to(tl.int32))
        v = tl.load(map2_ptr + tl.load(state2_ptr + i, mask=mask, other=0).to(tl.int32))
        m = m * tl.load(absmax1_ptr + block, mask=in_range, other=0.0)[:, None]
        v = v * tl.load(absmax2_ptr + block, mask=in_range, other=0.0)[:, None]
        weight, m, v = _updated(weight, gradient, m, v, hyper_ptr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps)
        tl.store(weight_ptr + i, weight, mask=mask)
        # code 0, which stands beyond the tensor's end, is no zero in the signed map
        m = tl.where(mask, m, 0.0)
        absmax1 = tl.reduce(tl.abs(m), 1, tl.standard._elementwise_max)
        absmax2 = tl.reduce(v, 1, tl.standard._elementwise_max)
        code1 = _nearest_code(tl.div_rn(m, tl.maximum(absmax1, TINY)[:, None]), bounds1_ptr)
        code2 = _nearest_code(tl.div_rn(v, tl.maximum(absmax2, TINY)[:, None]), bounds2_ptr)
        tl.store(state1_ptr + i, code1.to(tl.uint8), mask=mask)
        tl.store(state2_ptr + i, code2.to(tl.uint8), mask=mask)
        tl.store(absmax1_ptr + block, absmax1, mask=in_range)
        tl.store(absmax2_ptr + block, absmax2, mask=in_range)


@kernel
def _adamw32bit_kernel(
    tensors_ptr, gradients_ptr, programs_ptr, like_ptr, hyper_ptr,
    beta1, beta2, one_minus_beta1, one_minus_beta2, eps, CHUNK: tl.constexpr,
):  # fmt: skip
    """tensors: as above, without absmaxes (addresses 0); programs: (tensor, first chunk)."""
    if tl.load(hyper_ptr + 5) == 0.0:
        program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
        tensor = tl.load(program).to(tl.int64)
        row = tensors_ptr + tensor * 6
        weight_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
        state1_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        state2_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        gradient_ptr = tl.load(gradients_ptr + tensor).to(tl.pointer_type(like_ptr.dtype.element_ty))
        i = tl.load(program + 1).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
        mask = i < tl.load(row + 5)
        weight = tl.load(weight_ptr + i, mask=mask, other=0.0)
        gradient = tl.load(gradient_ptr + i, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(state1_ptr + i, mask=mask, other=0.0)
        v = tl.load(state2_ptr + i, mask=mask, other=0.0)
        weight, m, v = _updated(weight, gradient, m, v, hyper_ptr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps)
        tl.store(weight_ptr + i, weight, mask=mask)
        tl.store(state1_ptr + i, m, mask=mask)
        tl.store(state2_ptr + i, v, mask=mask)


class _Tables:
    """The addresses a launch needs: of the tensors, once; of the gradients, whenever they move; and who does what."""

    def __init__(self, parameters: list[Tensor], moments: list[Moments], elements_per_program: int, unit: int):
        self.device = parameters[0].device
        rows, programs = [], []
        for index, (p, m) in enumerate(zip(parameters, moments, strict=True)):
            absmaxes = [0 if x is None else x.data_ptr() for x in (m.absmax1, m.absmax2)]
            rows.append((p.data_ptr(), m.state1.data_ptr(), m.state2.data_ptr(), *absmaxes, p.numel()))
            firsts = torch.arange(0, p.numel(), elements_per_program) // unit
            programs.append(torch.stack([torch.full_like(firsts, index), firsts], dim=1))
        self.tensors = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.programs = torch.cat(programs).to(torch.int32).to(self.device)
        self._addresses: list[int] = []
        self._gradients: Tensor | None = None

    def gradients(self, gradients: list[Tensor]) -> Tensor:
        addresses = [g.data_ptr() for g in gradients]
        if self._gradients is None or addresses != self._addresses:
            self._addresses = addresses
            self._gradients = torch.tensor(addresses, dtype=torch.int64).to(self.device, non_blocking=True)
        return self._gradients


class AdamW8bit:
    """AdamW over float32 tensors, updated in place; their memory must stay where it is (assign with copy_).

    parameters: dense, of any memory order, on one device. step_count: steps taken, int64 on the device.
    Raises ValueError for other dtypes or tensors with gaps.
    """

    def __init__(self, parameters: list[Tensor], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        for p in parameters:
            if p.dtype != torch.float32 or not is_dense(p) or p.numel() == 0:
                raise ValueError(
                    f"AdamW8bit takes dense float32 weights, got {tuple(p.shape)} {p.dtype} with strides {p.stride()}"
                )
        self.parameters, self.betas, self.eps = parameters, betas, eps
        device = parameters[0].device
        self.moments = [self._empty(p) for p in parameters]
        self.step_count = torch.zeros((), dtype=torch.int64, device=device)
        self.maps = tuple(dynamic_map(signed).to(device) for signed in (True, False))
        self.bounds = tuple(bounds_of(code_map) for code_map in self.maps)
        # which tensors have codes, which have fp32 moments
        self._coded = [i for i, m in enumerate(self.moments) if m.absmax1 is not None]
        self._plain = [i for i, m in enumerate(self.moments) if m.absmax1 is None]
        self._tables: dict[str, _Tables] = {}

    @staticmethod
    def _empty(p: Tensor) -> Moments:
        if p.numel() < MIN_8BIT_ELEMENTS:
            return Moments(*(torch.zeros_like(p, requires_grad=False) for _ in range(2)), None, None)
        num_blocks = cdiv(p.numel(), BLOCK_SIZE)
        states = [torch.zeros_like(p, dtype=torch.uint8, requires_grad=False) for _ in range(2)]
        # absmax 0 makes every code a zero
        return Moments(*states, *(torch.zeros(num_blocks, dtype=torch.float32, device=p.device) for _ in range(2)))

    @torch.no_grad()
    def step(
        self, gradients: list[Tensor], lr: float | Tensor, weight_decay: float | Tensor = 0.0,
        gradient_scale: float | Tensor = 1.0, found_inf: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take one step. gradients: one a parameter, of one dtype; they are multiplied by gradient_scale.

        found_inf: a number on the device; where it is not 0 nothing at all changes. Raises ValueError for gradients
        that do not fit.
        """
        if len(gradients) != len(self.parameters) or len({g.dtype for g in gradients}) != 1:
            raise ValueError(
                f"{len(gradients)} gradients for {len(self.parameters)} weights; give one each, of one dtype"
            )
        device = self.step_count.device
        skip = torch.zeros((), device=device) if found_inf is None else (found_inf != 0).reshape(())
        self.step_count += ~skip.bool()
        # in float64, for 1 - beta^step at step 1; a skipped first step would divide by 0
        step = self.step_count.clamp(min=1).double()
        corrections = [1 - torch.pow(beta, step) for beta in self.betas]
        numbers = (lr, weight_decay, corrections[0], corrections[1].sqrt(), gradient_scale, skip)
        # full, not tensor: a fill can be captured in a graph, a copy from the host cannot
        on_device = [x if isinstance(x, Tensor) else torch.full((), x, device=device) for x in numbers]
        hyper = torch.stack([x.double().reshape(()) for x in on_device]).float()
        ordered = []
        for p, g in zip(self.parameters, gradients, strict=True):
            if g.shape != p.shape:
                raise ValueError(f"a gradient has shape {tuple(g.shape)}, its weight {tuple(p.shape)}")
            ordered.append(g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g))
        if runs_kernel(self.parameters[0]):
            self._launch(ordered, hyper)
        elif not bool(skip):
            for p, g, m in zip(self.parameters, ordered, self.moments, strict=True):
                self._reference(p, g, m, hyper)

    def _launch(self, gradients: list[Tensor], hyper: Tensor) -> None:
        beta1, beta2 = self.betas
        numbers = (beta1, beta2, 1 - beta1, 1 - beta2, self.eps)
        for name, members, elements, unit in (
            ("coded", self._coded, ROWS * BLOCK_SIZE, BLOCK_SIZE),
            ("plain", self._plain, CHUNK, CHUNK),
        ):
            if not members:
                continue
            if name not in self._tables:
                parts = [self.parameters[i] for i in members], [self.moments[i] for i in members]
                self._tables[name] = _Tables(*parts, elements, unit)
            tables = self._tables[name]
            addresses = tables.gradients([gradients[i] for i in members])
            shared = (tables.tensors, addresses, tables.programs, gradients[0])
            grid = (len(tables.programs),)
            if name == "coded":
                _adamw8bit_kernel[grid](
                    *shared, *self.maps, *self.bounds, hyper, *numbers, BLOCK_SIZE=BLOCK_SIZE, ROWS=ROWS
                )
            else:
                _adamw32bit_kernel[grid](*shared, hyper, *numbers, CHUNK=CHUNK)

    def _reference(self, p: Tensor, gradient: Tensor, moments: Moments, hyper: Tensor) -> None:
        """Update one tensor in plain PyTorch."""
        lr, weight_decay, correction1, root_correction2, scale, _ = hyper
        beta1, beta2 = self.betas
        weight, g = in_memory_order(p), in_memory_order(gradient).float() * scale
        state1, state2 = in_memory_order(moments.state1), in_memory_order(moments.state2)
        m, v = state1, state2
        if moments.absmax1 is not None:
            m = dequantize(state1, moments.absmax1, self.maps[0])
            v = dequantize(state2, moments.absmax2, self.maps[1])
        m = m * beta1 + (1 - beta1) * g
        v = v * beta2 + (1 - beta2) * g * g
        update = m / (correction1 * (v.sqrt() / root_correction2 + self.eps))
        weight -= lr * (update + weight_decay * weight)
        if moments.absmax1 is None:
            state1.copy_(m)
            state2.copy_(v)
            return
        for state, absmax, values, code_map in (
            (state1, moments.absmax1, m, self.maps[0]),
            (state2, moments.absmax2, v, self.maps[1]),
        ):
            codes, largest = quantize(values, code_map)
            state.copy_(codes)
            absmax.copy_(largest)

    def bitsandbytes_state(self, index: int) -> dict[str, int | Tensor]:
        """Return a parameter's state as bitsandbytes.optim.AdamW8bit keeps it, contiguous; copies.

        Exact for a contiguous parameter; any other's codes are made anew for blocks in contiguous order, each value
        off by at most half the map's widest gap times its block's largest. Reads the step: one host sync.
        """
        p, m = self.parameters[index], self.moments[index]
        state: dict[str, int | Tensor] = {"step": int(self.step_count)}
        for number, code_map in enumerate(self.maps, start=1):
            values, absmax = getattr(m, f"state{number}"), getattr(m, f"absmax{number}")
            if absmax is not None:
                state[f"qmap{number}"] = code_map.clone()
                if not p.is_contiguous():
                    exact = torch.empty_like(p, dtype=torch.float32)
                    in_memory_order(exact).copy_(dequantize(in_memory_order(values), absmax, code_map))
                    codes, absmax = quantize(exact.contiguous().view(-1), code_map)
                    values = codes.view(p.shape)
                state[f"absmax{number}"] = absmax.clone()
            state[f"state{number}"] = values.clone(memory_format=torch.contiguous_format)
        return state

    def load_bitsandbytes_state(self, index: int, state: dict[str, int | Tensor]) -> None:
        """Take what `bitsandbytes_state` or bitsandbytes gave; requantised where the parameter is not contiguous.

        Raises ValueError where a shape, the kind of moments, or the maps are not this parameter's.
        """
        p, m = self.parameters[index], self.moments[index]
        self.step_count.fill_(int(state["step"]))
        for number, code_map in enumerate(self.maps, start=1):
            target, absmax = getattr(m, f"state{number}"), getattr(m, f"absmax{number}")
            source = state[f"state{number}"].to(p.device)
            if source.shape != p.shape or source.dtype != target.dtype:
                raise ValueError(
                    f"state{number} is {tuple(source.shape)} {source.dtype}; this weight has {tuple(p.shape)} {target.dtype}"
                )
            if absmax is None:
                target.copy_(source)
                continue
            if not torch.equal(state[f"qmap{number}"].to(p.device), code_map):
                raise ValueError(f"qmap{number} is not bitsandbytes' dynamic map; these moments are of another kind")
            scales = state[f"absmax{number}"].to(p.device)
            if not p.is_contiguous():
                exact = torch.empty_like(p, dtype=torch.float32)
                exact.copy_(dequantize(source.reshape(-1), scales, code_map).view(p.shape))
                codes, scales = quantize(in_memory_order(exact), code_map)
                in_memory_order(target).copy_(codes)
            else:
                target.copy_(source)
            absmax.copy_(scales)
