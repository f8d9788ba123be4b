"""Where the gradients of an optimizer step's micro-steps are added up: one buffer a parameter, which stays.

A hook takes each gradient as soon as it is complete, adds it to its buffer and frees it: beside the buffers no more than a
block's gradients are alive. The first micro-step copies, so nothing is ever zeroed; in the last one the optimizer takes the
buffers in place of gradients. Whether a micro-step copies or adds follows from its place alone, and addresses never change:
a step can be recorded as CUDA graphs, in any order. A step of one micro-step uses no buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class GradientBuffers:
    """Buffers for the gradients of parameters, in their dtype, or in fp32 for `dtype` "fp32" (train.accumulate_dtype).

    Sums in 16 bits are autograd's own, bit for bit. tensors: name -> buffer, in the parameter's shape and memory order; empty
    until `allocate`, which the first step of several micro-steps calls if nobody has.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: str = "auto"):
        self.parameters, self.dtype = parameters, dtype
        self.tensors: dict[str, Tensor] = {}
        self._is_in_use = self._is_first = False
        # what the first micro-step has reached
        self._copied: set[str] = set()

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def allocate(self) -> None:
        """Make the buffers, once, where the weights are now: after whatever gives these other memory or another order."""
        if self.tensors:
            return
        for name, p in self.parameters.items():
            dtype = torch.float32 if self.dtype == "fp32" else p.dtype
            # zeros: a step that is recorded before any was taken adds to them
            self.tensors[name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            p.register_post_accumulate_grad_hook(partial(self._arrived, name))

    @contextmanager
    def micro_step(self, is_first: bool, is_last: bool) -> Iterator[None]:
        """Collect the gradients of the forward and backward pass within the block; its place is among a step's micro-steps."""
        self._is_in_use, self._is_first = not (is_first and is_last), is_first
        self._copied.clear()
        if self._is_in_use:
            self.allocate()
        yield
        if self._is_in_use and is_first:
            unreached = [x for name, x in self.tensors.items() if name not in self._copied]
            if unreached:
                torch._foreach_zero_(unreached)

    def take(self, name: str) -> Tensor | None:
        """Return a parameter's gradient over the micro-steps so far, None where the loss did not reach it; the parameter keeps none.

        A buffer may be written to: the next step copies over it.
        """
        p = self.parameters[name]
        if self._is_in_use:
            # a hook before ours may ask for it
            self._arrived(name, p)
            return self.tensors[name]
        gradient, p.grad = p.grad, None
        return gradient

    @torch.no_grad()
    def _arrived(self, name: str, p: nn.Parameter) -> None:
        if not self._is_in_use or p.grad is None:
            return
        if self._is_first:
            self.tensors[name].copy_(p.grad)
            self._copied.add(name)
        else:
            self.tensors[name].add_(p.grad)
        p.grad = None
