"""AdamW8bit's state for checkpoints, written and read: contiguous, in bitsandbytes' block order.

Quantization blocks follow memory order, so a state saved from another memory order is requantized on import. Each value
is then off by at most half the code map's widest gap times its block's absmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.optim.blockwise_8bit import dequantize, in_memory_order, quantize
from safelight.kernels.optim.split_weights import join

SIGNED = (True, False)  # the first moment is signed, the second is not
# memory modes by what they can represent: a mode loads a coarser one's state without loss
PRECISION_RANK = {"rounded": 0, "near": 1, "exact": 2, "fp32": 3}
MAX_STEPS = 2**40


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _requantized(codes: Tensor, absmax: Tensor, signed: bool, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax), flat in target's memory order, of codes that are flat in source's.

    source, target: only their shapes and strides are used.
    """
    exact = torch.empty_like(source, dtype=torch.float32)
    in_memory_order(exact).copy_(dequantize(codes, absmax, signed))
    return quantize(in_memory_order(torch.empty_like(target, dtype=torch.float32).copy_(exact)), signed)


def state_of(optimizer: AdamW8bit, index: int, live: bool = False) -> dict[str, Tensor]:
    """Return a parameter's state by name, as contiguous copies.

    step, state1, state2; absmax1, absmax2 if the moments are 8-bit; strides, if the parameter is not contiguous, which
    give the order of the absmaxes' blocks; remainder, int16 | int8, or master, float32, if the memory mode keeps one.
    live: return the tensors themselves, in their own memory order, which the next step overwrites; the caller copies
    them.
    """
    contiguous, copy = (torch.Tensor.detach,) * 2 if live else (_contiguous, torch.clone)
    optimizer.synchronize()
    p, moments, remainder = optimizer.parameters[index], optimizer.moments[index], optimizer.remainders[index]
    state = {"step": copy(optimizer.step_counts[index])}
    for number in (1, 2):
        state[f"state{number}"] = contiguous(getattr(moments, f"state{number}"))
        absmax = getattr(moments, f"absmax{number}")
        if absmax is not None:
            state[f"absmax{number}"] = copy(absmax)
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
    loaded = []
    for number, signed in enumerate(SIGNED, start=1):
        target, scales = getattr(moments, f"state{number}"), getattr(moments, f"absmax{number}")
        source = _part(state, f"state{number}").to(p.device)
        if source.shape != p.shape or source.dtype != target.dtype:
            raise UserError(
                f"state{number} is {tuple(source.shape)} {source.dtype}, its weight {tuple(p.shape)} {target.dtype}"
            )
        if scales is None:
            loaded.append((torch.empty_like(target).copy_(source), None))
            continue
        given = _part(state, f"absmax{number}").to(p.device)
        if given.shape != scales.shape:
            raise UserError(
                f"absmax{number} has shape {tuple(given.shape)}; this weight has {tuple(scales.shape)} blocks"
            )
        if given.dtype != scales.dtype:
            raise UserError(f"absmax{number} is {given.dtype}, not {scales.dtype}")
        strides = strides_of(state, source)
        if strides == p.stride():
            loaded.append((torch.empty_like(target).copy_(source), given))
            continue
        like = torch.empty_strided(tuple(p.shape), strides, dtype=torch.uint8, device=p.device).copy_(source)
        codes, given = _requantized(in_memory_order(like), given, signed, like, p)
        rearranged = torch.empty_like(target)
        in_memory_order(rearranged).copy_(codes)
        loaded.append((rearranged, given))
    optimizer.step_counts[index] = step
    for number, (values, given) in enumerate(loaded, start=1):
        getattr(moments, f"state{number}").copy_(values)
        if given is not None:
            getattr(moments, f"absmax{number}").copy_(given)


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
