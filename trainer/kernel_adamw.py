"""Our AdamW with 8-bit moments over the UNet: one launch over all tensors with 8-bit moments, one over the small ones.

Nothing is asked of the device: norm, clipping, loss scale and whether a step is taken are numbers on it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safelight.kernels.adamw8bit import AdamW8bit
from safelight.kernels.blockwise import in_memory_order
from safelight.kernels.optimizer_state import load_state, load_value, state_of
from safelight.kernels.remainder import start
from safelight.trainer.config import Optimizer as OptimizerConfig


def _to_16_bit(p: nn.Parameter, dtype: torch.dtype, memory: str) -> Tensor | None:
    """Bring a parameter to a dtype in its memory order and return what stands beside it; its old memory is freed."""
    source = p.detach().float()
    weight, left = start(in_memory_order(source), dtype, memory)
    p.data = torch.empty_like(source, dtype=dtype)
    in_memory_order(p.data).copy_(weight)
    if left is None:
        return None
    beside = torch.empty_like(source, dtype=left.dtype)
    in_memory_order(beside).copy_(left)
    return beside


class KernelAdamW:
    """Steps a module's parameters by our kernels; a parameter's place among the trained ones keys its stochastic rounding."""

    def __init__(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], config: OptimizerConfig, dtype: torch.dtype, memory: str,
        seed: int,
    ):  # fmt: skip
        self.parameters, self.memory = parameters, memory
        remainders = None
        if dtype != torch.float32:
            with torch.no_grad():
                # one after the other: the fp32 weights and their 16-bit pairs never stand side by side
                remainders = [_to_16_bit(p, dtype, memory) for p in parameters.values()]
            module.to(dtype)
        self.inner = AdamW8bit(list(parameters.values()), config.betas, config.eps, memory, seed, remainders=remainders)
        self._places = {name: place for place, name in enumerate(parameters)}

    @property
    def master(self) -> dict[str, Tensor]:
        """The fp32 weights by name, in memory mode fp32; no others are held whole."""
        if self.memory != "fp32":
            return {}
        return {name: self.value(name) for name in self.parameters}

    def value(self, name: str) -> Tensor:
        return self.inner.value(self._places[name])

    def _take_gradients(self) -> list[Tensor]:
        """Take the gradients from the parameters; one the loss did not reach gets zeros."""
        gradients = []
        for p in self.parameters.values():
            gradients.append(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
        return gradients

    def step(self, loss_scale, lr: float, weight_decay: float, max_grad_norm: float) -> tuple[Tensor, Tensor]:
        """As UNetOptimizer.step, with nothing asked of the device."""
        gradients = self._take_gradients()
        # of scaled gradients, summed in fp32
        norm = (
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32))) / loss_scale.scale
        )
        finite = torch.isfinite(norm)
        factor = 1 / loss_scale.scale
        if max_grad_norm > 0:
            factor = factor * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.inner.step(gradients, lr, weight_decay, factor, ~finite)
        loss_scale.update(finite)
        return norm, finite

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Return a parameter's step, moments and what completes its weight to fp32."""
        return state_of(self.inner, self._places[name])

    def load(self, name: str, parts: dict[str, Tensor]) -> None:
        """Take what state_of gave, or the state of a run by bitsandbytes' AdamW8bit. Raises ValueError where it does not fit."""
        p, place = self.parameters[name], self._places[name]
        if p.dtype == torch.float32 and ("master" in parts or "remainder" in parts):
            raise ValueError(f"the checkpoint's {name} is 16-bit: it was saved at another precision")
        if "state1" not in parts and ("exp_avg" in parts or parts.keys() & {"master", "remainder"} == set()):
            raise ValueError(f"the checkpoint's moments of {name} are not of optimizer adamw8bit")
        try:
            load_value(self.inner, place, p.detach(), parts)
            if "state1" in parts:
                load_state(self.inner, place, parts)
        except ValueError as error:
            raise ValueError(f"the checkpoint's optimizer state of {name} does not fit: {error}") from None
