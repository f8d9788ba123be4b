"""Schedule-free optimizers (schedulefree): an average of the weights takes the place of a learning rate schedule.

There are three sequences of weights. Gradients are taken at y, which is what the UNet holds while it trains; z makes
the steps; x is the average of z, and y lies between them: y = beta1 x + (1 - beta1) z. Validation, samples and exports
use x, which is not stored: it follows from y and z. A checkpoint holds y as the UNet, so that a run resumes bit for
bit, and z.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from safelight.trainer.optim.library_optimizer import LibraryOptimizer, State

# of z in a checkpoint's state, and of beta1
Z_PREFIX, BETA1 = "z/", "numbers/beta1"


def average_of(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """Return x, which both are steps from; fp32."""
    return torch.lerp(y.float(), z, 1 - 1 / beta1)


class ScheduleFreeOptimizer(LibraryOptimizer):
    """An optimizer of schedulefree. Source: Defazio et al. 2024, arXiv:2405.15682."""

    # the form over lists of tensors would allocate the second moments of all of them once more
    OPTIONS: ClassVar = {"foreach": False}
    ARGUMENTS: ClassVar = {"average_power": "r", "average_lr_power": "weight_lr_power"}
    NUMBERS: ClassVar = ("k", "weight_sum", "lr_max")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # only lets the library take steps: the weights are y from here on, and `value` is x
        self._library.train()

    @property
    def _beta1(self) -> float:
        return self._library.param_groups[0]["betas"][0]

    def _make_state(self, name: str, master: nn.Parameter) -> State:
        return {"z": master.detach().clone(), "exp_avg_sq": torch.zeros_like(master)}

    def value(self, name: str) -> Tensor:
        y = self.master[name].detach()
        state = self._library.state.get(self.master[name])
        return average_of(y, state["z"], self._beta1) if state else y

    def _numbers(self) -> dict[str, float | int]:
        return {**super()._numbers(), "beta1": self._beta1}
