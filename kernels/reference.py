"""Helpers shared by the ops' PyTorch references: compute dtype, square roots, gradients by recomputation, bias sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def to_compute(x: Tensor | None) -> Tensor | None:
    """Return x in the dtype references compute in: float32 for 16-bit tensors, x's own otherwise."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def correctly_rounded_sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded square root.

    torch's vectorized CPU version is not always correctly rounded (docs/decisions.md, Square roots).
    """
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def recomputed_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    grad_outputs: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of function(*inputs) by running it again under autograd; None for inputs that are None.

    This is the references' backward pass. It needs only what the kernels save, so the CPU saves the same tensors as a
    GPU.
    """
    fresh = tuple(None if x is None else x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        outputs = function(*fresh)
    present = [x for x in fresh if x is not None]
    gradients = iter(torch.autograd.grad(outputs, present, grad_outputs, allow_unused=True))
    return tuple(None if x is None else next(gradients) for x in fresh)


def row_sum(x: Tensor) -> Tensor:
    """Return the sum over all but the last dimension, in x's dtype (PyTorch accumulates 16-bit sums in fp32)."""
    return x.reshape(-1, x.shape[-1]).sum(dim=0)


def channel_sum(x: Tensor) -> Tensor:
    """Return the sum of images (N, C, ...) over samples and pixels, (C,), in x's dtype; accumulated as in `row_sum`."""
    return x.sum(dim=(0, *range(2, x.dim())))
