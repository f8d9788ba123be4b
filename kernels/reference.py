"""What the PyTorch references share: the dtype they compute in, and their gradients by recomputation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_compute(x: Tensor | None) -> Tensor | None:
    """Return x in the dtype references compute in: float32 for 16-bit tensors, the tensor's own otherwise."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def recomputed_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    grad_outputs: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of function(*inputs), which is run once more for it; None where an input is None.

    A reference's backward pass: it needs no more than its kernel's saves, so the CPU saves what a GPU saves.
    """
    fresh = tuple(None if x is None else x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        outputs = function(*fresh)
    wanted = [x for x in fresh if x is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True))
    return tuple(None if x is None else next(found) for x in fresh)


def row_sum(x: Tensor) -> Tensor:
    """Return the sum over all but the last dimension, in x's dtype. PyTorch accumulates 16-bit sums in fp32."""
    return x.reshape(-1, x.shape[-1]).sum(dim=0)


def channel_sum(x: Tensor) -> Tensor:
    """Return the sum of images (N, C, ...) over samples and pixels, (C,), in x's dtype, accumulated as in row_sum."""
    return x.sum(dim=(0, *range(2, x.dim())))
