"""Persistent buffers, one per parameter, that sum the gradients of a step's micro-steps.

A hook adds each gradient to its buffer as soon as it is complete and frees it, so that besides the buffers only one
block's gradients exist at a time. The first micro-step copies instead of adding, so nothing has to be zeroed; in the
last one the optimizer reads the buffers instead of gradients. Whether a micro-step copies or adds depends only on its
position in the step, and addresses never change, so micro-steps can be captured as CUDA graphs in any order. A step of
a single micro-step uses no buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from safelight.trainer.distributed.sharded import local


class GradientBuffers:
    """Gradient buffers in the parameters' dtype, or in fp32 if `dtype` is "fp32" (train.accumulate_dtype).

    16-bit sums equal autograd's own accumulation bit for bit. device: where they are; streamed weights themselves are
    in host memory. tensors: name -> buffer, in the parameter's shape and memory order; empty until `allocate`, which
    the first step of several micro-steps calls if needed.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], device: torch.device, dtype: str = "auto"):
        self.parameters, self.device, self.dtype = parameters, device, dtype
        self.tensors: dict[str, Tensor] = {}
        self._is_active = self._is_first = False
        # names of the parameters that got a gradient in the first micro-step
        self._copied: set[str] = set()

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def allocate(self) -> None:
        """Allocate the buffers once. Call it after everything that moves the weights or changes their memory order."""
        if self.tensors:
            return
        for name, p in self.parameters.items():
            dtype = torch.float32 if self.dtype == "fp32" else p.dtype
            # zeros, because a later micro-step may be captured, which adds, before any first one has run
            like = local(p.detach())
            self.tensors[name] = torch.zeros_like(like, dtype=dtype, device=self.device)
            p.register_post_accumulate_grad_hook(partial(self._on_gradient, name))

    @contextmanager
    def micro_step(self, is_first: bool, is_last: bool) -> Iterator[None]:
        """Collect the gradients of the backward pass inside the block. is_first, is_last: of the step's micro-steps."""
        self._is_active, self._is_first = not (is_first and is_last), is_first
        self._copied.clear()
        if self._is_active:
            self.allocate()
        yield
        if self._is_active and is_first:
            unreached = [x for name, x in self.tensors.items() if name not in self._copied]
            if unreached:
                torch._foreach_zero_(unreached)

    def take(self, name: str) -> Tensor | None:
        """Return a parameter's gradient summed over the micro-steps so far, and clear its `.grad`. None if the loss did
        not reach it.

        The caller may write to it: the next step overwrites the buffer.
        """
        p = self.parameters[name]
        if self._is_active:
            # an optimizer hook that runs before ours may be the caller
            self._on_gradient(name, p)
            return self.tensors[name]
        gradient, p.grad = p.grad, None
        return None if gradient is None else local(gradient)

    @torch.no_grad()
    def _on_gradient(self, name: str, p: nn.Parameter) -> None:
        if not self._is_active or p.grad is None:
            return
        if self._is_first:
            self.tensors[name].copy_(local(p.grad))
            self._copied.add(name)
        else:
            self.tensors[name].add_(local(p.grad))
        p.grad = None
