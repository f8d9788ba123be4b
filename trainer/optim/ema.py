"""The exponential moving average of the UNet's weights: what validation, samples and exports take where a run keeps one.

The averages are fp32 and follow the fp32 weights, the master or the joined pair where weights are 16-bit. The decay rises as (1 + n) / (10 + n) over the
first updates, as in diffusers' EMAModel, so that a short run is not mostly its start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.optim.ema import EMA
from safelight.trainer.optim.optimizer import UNetOptimizer

PREFIX = "ema/"
NUM_UPDATES = "ema_state/num_updates"


class WeightAverages:
    """Averages of what an optimizer trains, beside it on its device. averages: parameter name -> float32 tensor."""

    def __init__(self, optimizer: UNetOptimizer, decay: float):
        self.decay = decay
        self._parameters = optimizer.parameters
        weights, remainders = optimizer.average_sources()
        # in the weights' memory order, which joining a pair need not keep
        self.averages = {
            name: torch.empty_like(weight, dtype=torch.float32).copy_(optimizer.value(name))
            for name, weight in zip(optimizer.parameters, weights, strict=True)
        }
        self._ema = EMA(list(self.averages.values()), weights, remainders)
        self.num_updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.averages.values())).device)

    @torch.no_grad()
    def update(self, taken: Tensor | bool) -> None:
        """Follow the weights after an optimizer step; stand still after one that was not taken. Nothing waits for the device."""
        self.num_updates += taken
        n = self.num_updates.double()
        decay = ((1 + n) / (10 + n)).clamp(max=self.decay)
        decay = torch.where(torch.as_tensor(taken, device=n.device), decay, 1.0).float()
        self._ema.update(decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Put the averages in the weights' place within the block; those wait in host memory and come back bit for bit."""
        held = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            p.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(held[name])

    def live_state(self) -> dict[str, Tensor]:
        """Return the averages for a checkpoint: no copies, but what the next step changes, in the weights' memory order."""
        return {**{f"{PREFIX}{name}": x for name, x in self.averages.items()}, NUM_UPDATES: self.num_updates}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return a copy of the live state, contiguous, on the CPU."""
        return {key: value.to("cpu", copy=True).contiguous() for key, value in self.live_state().items()}


def take_averages(state: dict[str, Tensor], averages: WeightAverages | None) -> None:
    """Move a checkpoint's averages out of its state into these; drop them where the run keeps none.

    Raises ValueError where the run keeps averages and the checkpoint has none.
    """
    found = {key.removeprefix(PREFIX): state.pop(key) for key in list(state) if key.startswith(PREFIX)}
    num_updates = state.pop(NUM_UPDATES, None)
    if averages is None:
        return
    if found.keys() != averages.averages.keys() or num_updates is None:
        raise UserError("the checkpoint has no moving average of these weights; resume with train.ema_decay = 0")
    for name, average in averages.averages.items():
        average.copy_(found[name])
    averages.num_updates.copy_(num_updates)


@torch.no_grad()
def load_averages(folder: Path, unet: nn.Module) -> None:
    """Put a checkpoint's moving averages into a UNet that has its weights; nothing where the checkpoint has none."""
    parameters = dict(unet.named_parameters())
    with safe_open(folder / "state.safetensors", "pt") as state:
        for key in state.keys():  # noqa: SIM118
            if key.startswith(PREFIX):
                parameters[key.removeprefix(PREFIX)].copy_(state.get_tensor(key))
