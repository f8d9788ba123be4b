"""Averages of the UNet's weights, which validation, samples and exports use if a run keeps them.

An exponential moving average (train.ema_decay), or the average that a schedule-free optimizer makes itself.

The averages are fp32 and follow the fp32 weights: of 16-bit weights the master, or weight and remainder joined. The
decay of update n = 1, 2, ... is the smaller of (1 + n) / (10 + n) and the setting, so that a short run's average is not
mostly its initial weights. diffusers' EMAModel without its warm-up is one update behind: its first copies the weights,
with a decay of 0, and its update n + 1 has our n-th decay. An EMAModel that was stepped once before training, with
the initial weights, therefore equals ours step for step. Ours stays, so that old runs resume to the same bits.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Set

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.kernels.optim.ema import EMA
from safelight.trainer.distributed.gather import gathered
from safelight.trainer.distributed.sharded import is_cut, joined, piece_of
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.optim.optimizer import UNetOptimizer

PREFIX = "ema/"
NUM_UPDATES = "ema_state/num_updates"


class Averages(abc.ABC):
    """Averages of an optimizer's parameters, of those that this process owns.

    averages: parameter name -> float32 tensor on their device, for those that are kept in addition to the optimizer's
    state.
    """

    def __init__(self, optimizer: UNetOptimizer):
        self.averages: dict[str, Tensor] = {}
        self._optimizer, self._parameters = optimizer, optimizer.local

    @abc.abstractmethod
    def averaged(self, name: str) -> Tensor:
        """Return a parameter's average in float32. Read-only."""

    def update(self, is_applied: Tensor | bool) -> None:  # noqa: B027  nothing to do if the optimizer does it
        """Update the averages after an optimizer step, unless the step was skipped."""

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Replace the weights by the averages inside the block. The weights are kept in host memory and restored bit
        for bit. If processes share the state, all of them must enter the block."""
        saved = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        for name in self._optimizer.owned:
            self._parameters[name].copy_(self.averaged(name))
        self._optimizer.publish()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(saved[name])

    def live_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the averages besides the optimizer's state, without copies."""
        return {}

    def whole_state(self, world: World) -> Iterator[tuple[str, Tensor]]:
        """Yield what `live_state` returns, of all processes together: see UNetOptimizer.whole_state."""
        cut = {name: p for name, p in self._optimizer.parameters.items() if is_cut(p)} if self.averages else {}
        if not cut:
            yield from gathered(world if self._optimizer.sharers.size > 1 else ALONE, self.live_state())
            return
        state = self.live_state()
        for name, p in cut.items():
            piece = state.pop(f"{PREFIX}{name}", None)
            yield f"{PREFIX}{name}", joined(world, torch.zeros(0) if piece is None else piece, p)
        yield from state.items()


class OwnAverages(Averages):
    """The averages of an optimizer that averages the weights itself."""

    def __str__(self) -> str:
        return f"the average of the weights that {self._optimizer.spec.name} keeps"

    def averaged(self, name: str) -> Tensor:
        return self._optimizer.value(name)


class WeightAverages(Averages):
    """Exponential moving averages."""

    def __init__(self, optimizer: UNetOptimizer, decay: float):
        super().__init__(optimizer)
        self.decay = decay
        weights, remainders = optimizer.average_sources()
        # copied, because a joined pair may have another memory order than the weight
        self.averages = {
            name: torch.empty_like(weight, dtype=torch.float32).copy_(optimizer.value(name))
            for name, weight in zip(optimizer.owned, weights, strict=True)
        }
        self._ema = EMA(list(self.averages.values()), weights, remainders) if weights else None
        self.num_updates = torch.zeros((), dtype=torch.int64, device=optimizer.loss_scale.scale.device)

    @torch.no_grad()
    def update(self, is_applied: Tensor | bool) -> None:
        """Update the averages after an optimizer step, unless the step was skipped. No host-device synchronization."""
        self.num_updates += is_applied
        n = self.num_updates.double()
        decay = ((1 + n) / (10 + n)).clamp(max=self.decay)
        decay = torch.where(torch.as_tensor(is_applied, device=n.device), decay, 1.0).float()
        if self._ema is not None:
            self._ema.update(decay)

    def whole_form(self, name: str) -> Tensor:
        """Return the parameter, of which the average may be a piece."""
        return self._optimizer.parameters[name]

    @property
    def names(self) -> Set[str]:
        """Names of all averaged parameters, in whichever process."""
        return self._parameters.keys()

    def __str__(self) -> str:
        return f"a moving average of the weights, decay {self.decay:g}"

    def averaged(self, name: str) -> Tensor:
        return self.averages[name]

    def live_state(self) -> dict[str, Tensor]:
        """Return the averages for a checkpoint, in the weights' memory order, without copies: the next update changes
        them."""
        return {**{f"{PREFIX}{name}": x for name, x in self.averages.items()}, NUM_UPDATES: self.num_updates}


def averages_of(optimizer: UNetOptimizer, decay: float) -> Averages | None:
    """Return the averages that a run keeps; None if there are none. decay: train.ema_decay."""
    if optimizer.spec.averages_weights:
        return OwnAverages(optimizer)
    return WeightAverages(optimizer, decay) if decay > 0 else None


def take_averages(state: dict[str, Tensor], averages: Averages | None) -> None:
    """Remove the averages from a checkpoint's state and load them into the run's, if it keeps any.

    Raises UserError if the run keeps averages and the checkpoint has none of these weights.
    """
    loaded = {key.removeprefix(PREFIX): state.pop(key) for key in list(state) if key.startswith(PREFIX)}
    num_updates = state.pop(NUM_UPDATES, None)
    if not isinstance(averages, WeightAverages):
        return
    if loaded.keys() != averages.names or num_updates is None:
        raise UserError("the checkpoint has no moving average of these weights; resume with train.ema_decay = 0")
    for name, average in averages.averages.items():
        p = averages.whole_form(name)
        check_form(name, loaded[name], p.shape)
        average.copy_(piece_of(loaded[name], p))
    if num_updates.shape != () or num_updates.dtype != torch.int64:
        raise UserError("the checkpoint's count of averaged steps is not a number; resume with train.ema_decay = 0")
    averages.num_updates.copy_(num_updates)


def check_form(name: str, average: Tensor, shape: tuple[int, ...]) -> None:
    """Raise UserError unless a checkpoint's average has a weight's shape, in float32."""
    if average.shape != shape or average.dtype != torch.float32:
        form = f"{tuple(average.shape)} {average.dtype}"
        raise UserError(f"the checkpoint's moving average of {name} is {form}, not {tuple(shape)} torch.float32")
