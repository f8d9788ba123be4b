"""An AdamW step of one tensor in plain PyTorch, operation by operation as kernels/adamw8bit_triton.py does it: equal bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from safelight.kernels.blockwise import dequantize, in_memory_order, quantize
from safelight.kernels.remainder import join, split


@dataclass(frozen=True)
class Moments:
    """A tensor's moments, in its shape and memory order: codes with absmax (blocks,), or float32 without."""

    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None


def adamw8bit_reference(
    p: Tensor, beside: Tensor | None, moments: Moments, gradient: Tensor, hyper: Tensor, corrections: Tensor,
    betas: tuple[float, float], eps: float, memory: str, words: Tensor | None,
) -> None:  # fmt: skip
    """Update a weight, its remainder `beside` and its moments.

    gradient: in the weight's memory order. hyper: lr, weight decay. corrections: 1 - beta_1^t, sqrt(1 - beta_2^t), the gradient's
    scale. memory: of kernels/remainder.py; words: its draws, for near and rounded.
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
