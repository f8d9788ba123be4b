"""Exponential moving average of the UNet's weights, which validation, samples and exports use if a run keeps one.

The averages are fp32 and follow the fp32 weights: of 16-bit weights the master, or weight and remainder joined. The
decay rises as (1 + n) / (10 + n) over the first updates, as in diffusers' EMAModel, so that a short run's average is
not mostly its initial weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.kernels.optim.ema import EMA
from safelight.trainer.optim.optimizer import UNetOptimizer

PREFIX = "ema/"
NUM_UPDATES = "ema_state/num_updates"


class WeightAverages:
    """Moving averages of an optimizer's parameters, on their device. averages: parameter name -> float32 tensor."""

    def __init__(self, optimizer: UNetOptimizer, decay: float):
        self.decay = decay
        self._parameters = optimizer.parameters
        weights, remainders = optimizer.average_sources()
        # copied, because a joined pair may have another memory order than the weight
        self.averages = {
            name: torch.empty_like(weight, dtype=torch.float32).copy_(optimizer.value(name))
            for name, weight in zip(optimizer.parameters, weights, strict=True)
        }
        self._ema = EMA(list(self.averages.values()), weights, remainders)
        self.num_updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.averages.values())).device)

    @torch.no_grad()
    def update(self, is_applied: Tensor | bool) -> None:
        """Update the averages after an optimizer step, unless the step was skipped. No host-device synchronization."""
        self.num_updates += is_applied
        n = self.num_updates.double()
        decay = ((1 + n) / (10 + n)).clamp(max=self.decay)
        decay = torch.where(torch.as_tensor(is_applied, device=n.device), decay, 1.0).float()
        self._ema.update(decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Replace the weights by the averages inside the block. The weights are kept in host memory and restored bit
        for bit."""
        saved = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            p.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(saved[name])

    def live_state(self) -> dict[str, Tensor]:
        """Return the averages for a checkpoint, in the weights' memory order, without copies: the next update changes
        them."""
        return {**{f"{PREFIX}{name}": x for name, x in self.averages.items()}, NUM_UPDATES: self.num_updates}


def take_averages(state: dict[str, Tensor], averages: WeightAverages | None) -> None:
    """Remove the averages from a checkpoint's state and load them into the run's, if it keeps any.

    Raises UserError if the run keeps averages and the checkpoint has none of these weights.
    """
    loaded = {key.removeprefix(PREFIX): state.pop(key) for key in list(state) if key.startswith(PREFIX)}
    num_updates = state.pop(NUM_UPDATES, None)
    if averages is None:
        return
    if loaded.keys() != averages.averages.keys() or num_updates is None:
        raise UserError("the checkpoint has no moving average of these weights; resume with train.ema_decay = 0")
    for name, average in averages.averages.items():
        check_form(name, loaded[name], average.shape)
        average.copy_(loaded[name])
    if num_updates.shape != () or num_updates.dtype != torch.int64:
        raise UserError("the checkpoint's count of averaged steps is not a number; resume with train.ema_decay = 0")
    averages.num_updates.copy_(num_updates)


def check_form(name: str, average: Tensor, shape: tuple[int, ...]) -> None:
    """Raise UserError unless a checkpoint's average has a weight's shape, in float32."""
    if average.shape != shape or average.dtype != torch.float32:
        form = f"{tuple(average.shape)} {average.dtype}"
        raise UserError(f"the checkpoint's moving average of {name} is {form}, not {tuple(shape)} torch.float32")
