"""AdamW8bit's state for checkpoints, out of the optimizer and back into it.

A state that comes from another memory order is requantised, since blocks follow memory order: each value is then off by at
most half the map's widest gap times its block's largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.optim.blockwise_8bit import dequantize, in_memory_order, quantize
from safelight.kernels.optim.split_weights import join

SIGNED = (True, False)  # the first moment has a sign, the second none


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _reordered(codes: Tensor, absmax: Tensor, signed: bool, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (flat codes, absmax) for target's memory order of codes that are flat in source's; both stand for shapes."""
    exact = torch.empty_like(source, dtype=torch.float32)
    in_memory_order(exact).copy_(dequantize(codes, absmax, signed))
    return quantize(in_memory_order(torch.empty_like(target, dtype=torch.float32).copy_(exact)), signed)


def state_of(optimizer: AdamW8bit, index: int, live: bool = False) -> dict[str, Tensor]:
    """Return a parameter's state, contiguous copies: step, state1, state2, and absmax1, absmax2 of 8-bit ones.

    remainder: what a memory mode keeps beside a 16-bit weight, int16 | int8; master: float32. strides: of a parameter that
    is not contiguous, for the order that absmaxes stand in. live: no copies, but what the next step changes, in its memory
    order; for whoever copies it himself.
    """
    contiguous, copy = (torch.Tensor.detach,) * 2 if live else (_contiguous, torch.clone)
    p, moments, beside = optimizer.parameters[index], optimizer.moments[index], optimizer.remainders[index]
    optimizer.synchronize()
    state = {"step": copy(optimizer.step_counts[index])}
    for number in (1, 2):
        state[f"state{number}"] = contiguous(getattr(moments, f"state{number}"))
        absmax = getattr(moments, f"absmax{number}")
        if absmax is not None:
            state[f"absmax{number}"] = copy(absmax)
    if not p.is_contiguous() and moments.absmax1 is not None:
        state["strides"] = torch.tensor(p.stride())
    if beside is not None:
        state["master" if beside.dtype == torch.float32 else "remainder"] = contiguous(beside)
    return state


@torch.no_grad()
def load_state(optimizer: AdamW8bit, index: int, state: dict[str, Tensor]) -> None:
    """Take what `state_of` gave, or bitsandbytes' state: step and moments. Weights: `load_value`.

    Raises ValueError where a shape or the kind of moments is not this parameter's; then nothing is changed.
    """
    p, moments = optimizer.parameters[index], optimizer.moments[index]
    optimizer.synchronize()
    found = []
    for number, signed in enumerate(SIGNED, start=1):
        target, scales = getattr(moments, f"state{number}"), getattr(moments, f"absmax{number}")
        source = state[f"state{number}"].to(p.device)
        if source.shape != p.shape or source.dtype != target.dtype:
            raise ValueError(
                f"state{number} is {tuple(source.shape)} {source.dtype}; this weight has {tuple(p.shape)} {target.dtype}"
            )
        if scales is None:
            found.append((torch.empty_like(target).copy_(source), None))
            continue
        given = state[f"absmax{number}"].to(p.device)
        if given.shape != scales.shape:
            raise ValueError(
                f"absmax{number} has shape {tuple(given.shape)}; this weight has {tuple(scales.shape)} blocks"
            )
        strides = tuple(state["strides"].tolist()) if "strides" in state else source.contiguous().stride()
        if strides == p.stride():
            found.append((torch.empty_like(target).copy_(source), given))
            continue
        like = torch.empty_strided(tuple(p.shape), strides, dtype=torch.uint8, device=p.device).copy_(source)
        codes, given = _reordered(in_memory_order(like), given, signed, like, p)
        rearranged = torch.empty_like(target)
        in_memory_order(rearranged).copy_(codes)
        found.append((rearranged, given))
    optimizer.step_counts[index] = int(state["step"])
    for number, (values, given) in enumerate(found, start=1):
        getattr(moments, f"state{number}").copy_(values)
        if given is not None:
            getattr(moments, f"absmax{number}").copy_(given)


# what a mode can take over without losing anything
FINER = {"rounded": 0, "near": 1, "exact": 2, "fp32": 3}


@torch.no_grad()
def load_value(optimizer: AdamW8bit, index: int, weight: Tensor, state: dict[str, Tensor]) -> None:
    """Give a parameter the value of a checkpoint's weight and what its mode kept beside it.

    Raises ValueError where this optimizer's mode cannot hold all that the other kept.
    """
    p = optimizer.parameters[index]
    beside = state.get("master", state.get("remainder"))
    if beside is not None and beside.shape != p.shape:
        raise ValueError(f"what completes this weight has shape {tuple(beside.shape)}, not {tuple(p.shape)}")
    kept = "rounded"
    if beside is not None:
        kept = {torch.float32: "fp32", torch.int16: "exact", torch.int8: "near"}[beside.dtype]
    same = kept == optimizer.memory or (p.dtype == torch.float32 and beside is None)
    # a bf16 weight and 16 bits are the fp32 value, one to one
    same_values = {kept, optimizer.memory} == {"fp32", "exact"} and p.dtype == torch.bfloat16
    if not same and not same_values and FINER[optimizer.memory] < FINER[kept]:
        raise ValueError(
            f"it was kept with optimizer.memory {kept}, of which {optimizer.memory} would lose a part; "
            f"use {kept}" + ("" if kept == "fp32" else " or a finer one")
        )
    weight = weight.to(p.device)
    optimizer.synchronize()
    if same and beside is not None and kept != "fp32":
        p.copy_(weight)
        optimizer.remainders[index].copy_(beside)
    else:
        optimizer.assign(index, join(weight, None if beside is None else beside.to(p.device)))
