"""AdamW8bit's state for checkpoints, written and read: contiguous, 8-bit moments in bitsandbytes' block order.

Quantization blocks follow memory order, so a state saved from another memory order is requantized on import. Each value
is then off by at most half the code map's widest gap times its block's absmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.optim.blockwise_4bit import dequantize_4bit, quantize_4bit
from safelight.kernels.optim.blockwise_8bit import dequantize, in_memory_order, quantize
from safelight.kernels.optim.split_weights import join

SIGNED = (True, False)  # the first moment is signed, the second is not
# memory modes by what they can represent: a mode loads a coarser one's state without loss
PRECISION_RANK = {"rounded": 0, "near": 1, "exact": 2, "fp32": 3}
MAX_STEPS = 2**40


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def state_of(optimizer: AdamW8bit, index: int, live: bool = False) -> dict[str, Tensor]:
    """Return a parameter's state by name, as contiguous copies.

    step; state1, state2, or packed if the moments are 4-bit; absmax1, absmax2 if they are in blocks; strides, if the
    parameter is not contiguous, which give the order of the absmaxes' blocks; remainder, int16 | int8, or master,
    float32, if the memory mode keeps one.
    live: return the tensors themselves, in their own memory order, which the next step overwrites; the caller copies
    them.
    """
    contiguous, copy = (torch.Tensor.detach,) * 2 if live else (_contiguous, torch.clone)
    optimizer.synchronize()
    p, moments, remainder = optimizer.parameters[index], optimizer.moments[index], optimizer.remainders[index]
    state = {"step": copy(optimizer.step_counts[index])}
    for name, part in moments.parts().items():
        state[name] = copy(part) if name.startswith("absmax") else contiguous(part)
    if not p.is_contiguous() and moments.absmax1 is not None:
        state["strides"] = torch.tensor(p.stride())
    if remainder is not None:
        state["master" if remainder.dtype == torch.float32 else "remainder"] = contiguous(remainder)
    return state


@torch.no_grad()
def load_state(optimizer: AdamW8bit, index: int, state: dict[str, Tensor]) -> None:
    """Load a parameter's step and moments from what `state_of` returned, or from bitsandbytes' state.

    The weight and its remainder are loaded by `load_value`. Raises UserError, changing nothing, if a shape does not
    fit or the moments are 8-bit on one side and float32 on the other.
    """
    p, moments = optimizer.parameters[index], optimizer.moments[index]
    optimizer.synchronize()
    # bitsandbytes keeps a plain integer
    count = torch.as_tensor(_part(state, "step"))
    is_number = count.numel() == 1 and count.dtype in (torch.int64, torch.int32, torch.float32)
    step = int(count) if is_number and torch.isfinite(count).all() else -1
    if not 0 <= step < MAX_STEPS:
        raise UserError("its step is not a number of steps")
    if not moments.is_packed and "packed" in state:
        raise UserError("its moments are 4-bit; use optimizer.moments 4bit")
    if moments.is_packed and "packed" not in state:
        raise UserError("its moments are not 4-bit; use optimizer.moments 8bit")
    given = {}
    for name, target in moments.parts().items():
        source = given[name] = _part(state, name).to(p.device)
        if name.startswith("absmax"):
            if source.shape != target.shape:
                raise UserError(f"{name} has shape {tuple(source.shape)}; this weight has {tuple(target.shape)} blocks")
            if source.dtype != target.dtype:
                raise UserError(f"{name} is {source.dtype}, not {target.dtype}")
        elif source.shape != p.shape or source.dtype != target.dtype:
            raise UserError(
                f"{name} is {tuple(source.shape)} {source.dtype}, its weight {tuple(p.shape)} {target.dtype}"
            )
    if moments.absmax1 is not None:
        strides = strides_of(state, given["packed" if moments.is_packed else "state1"])
        if strides != p.stride():
            given = _rearranged(given, strides, p)
    optimizer.step_counts[index] = step
    for name, target in moments.parts().items():
        target.copy_(given[name])


def _rearranged(parts: dict[str, Tensor], strides: tuple[int, ...], p: Tensor) -> dict[str, Tensor]:
    """Return a parameter's moments, requantized in its own memory order. strides: of the order of the given blocks."""

    def flat(codes: Tensor) -> Tensor:
        like = torch.empty_strided(tuple(p.shape), strides, dtype=torch.uint8, device=p.device)
        return in_memory_order(like.copy_(codes))

    def moved(values: Tensor) -> Tensor:
        exact = torch.empty_strided(tuple(p.shape), strides, dtype=torch.float32, device=p.device)
        in_memory_order(exact).copy_(values)
        return in_memory_order(torch.empty_like(p, dtype=torch.float32).copy_(exact))

    def shaped(codes: Tensor) -> Tensor:
        target = torch.empty_like(p, dtype=torch.uint8)
        in_memory_order(target).copy_(codes)
        return target

    if "packed" in parts:
        m, v = dequantize_4bit(flat(parts["packed"]), parts["absmax1"], parts["absmax2"].square())
        codes, absmax1, absmax2 = quantize_4bit(moved(m), moved(v).sqrt_())
        return {"packed": shaped(codes), "absmax1": absmax1, "absmax2": absmax2}
    result = {}
    for number, signed in enumerate(SIGNED, start=1):
        values = dequantize(flat(parts[f"state{number}"]), parts[f"absmax{number}"], signed)
        codes, result[f"absmax{number}"] = quantize(moved(values), signed)
        result[f"state{number}"] = shaped(codes)
    return result


def _part(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UserError(f"it has no {name}")
    return state[name]


def strides_of(state: dict[str, Tensor], source: Tensor) -> tuple[int, ...]:
    """Return the memory order that the blocks were made in: strides of a dense tensor of source's shape."""
    if "strides" not in state:
        return source.contiguous().stride()
    given = state["strides"]
    strides = tuple(given.tolist()) if given.dim() == 1 and given.dtype == torch.int64 else ()
    # the last element lies at the end of the memory: no gaps, so nothing is allocated beyond the tensor's size
    by_stride = sorted(zip(strides, source.shape, strict=False))
    expected = 1
    for stride, size in by_stride:
        if size > 1 and stride != expected:
            break
        expected *= size
    if len(strides) != source.dim() or min(strides, default=0) < 0 or expected != source.numel():
        raise UserError(f"strides {strides[:8]} are not those of a tensor of shape {tuple(source.shape)}")
    return strides


@torch.no_grad()
def load_value(optimizer: AdamW8bit, index: int, weight: Tensor, state: dict[str, Tensor]) -> None:
    """Set a parameter to the value of a checkpoint's weight, completed by the remainder or master in `state`.

    Raises UserError if this optimizer's memory mode cannot represent what the checkpoint's mode kept.
    """
    p = optimizer.parameters[index]
    remainder = state.get("master", state.get("remainder"))
    if remainder is not None and remainder.shape != p.shape:
        raise UserError(f"the remainder has shape {tuple(remainder.shape)}, its weight {tuple(p.shape)}")
    saved_mode = "rounded"
    if remainder is not None:
        saved_mode = {torch.float32: "fp32", torch.int16: "exact", torch.int8: "near"}.get(remainder.dtype, "")
        if not saved_mode:
            raise UserError(f"the remainder is {remainder.dtype}")
    same_mode = saved_mode == optimizer.memory or (p.dtype == torch.float32 and remainder is None)
    # a bf16 weight and its 16-bit remainder are the fp32 value, one to one
    same_values = {saved_mode, optimizer.memory} == {"fp32", "exact"} and p.dtype == torch.bfloat16
    if not same_mode and not same_values and PRECISION_RANK[optimizer.memory] < PRECISION_RANK[saved_mode]:
        raise UserError(
            f"it was saved with optimizer.memory {saved_mode}, which {optimizer.memory} cannot hold without loss; "
            f"use {saved_mode}" + ("" if saved_mode == "fp32" else " or a finer one")
        )
    weight = weight.to(p.device)
    optimizer.synchronize()
    if same_mode and remainder is not None and saved_mode != "fp32":
        p.copy_(weight)
        optimizer.remainders[index].copy_(remainder)
    else:
        optimizer.assign(index, join(weight, None if remainder is None else remainder.to(p.device)))
