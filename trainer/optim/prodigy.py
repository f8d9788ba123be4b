"""Prodigy (prodigyopt): AdamW whose learning rate is an estimate that grows while training goes on.

The estimate `d` is one number for all parameters. It comes from sums over all of them, which the library reads back
from the device for each tensor, so a step waits for a GPU some hundreds of times.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from safelight.trainer.optim.library_optimizer import LibraryOptimizer, State


class ProdigyOptimizer(LibraryOptimizer):
    """prodigyopt.Prodigy. Source: Mishchenko and Defazio 2023, arXiv:2306.06101."""

    # the library prints a line about any other weight decay; `set_hyper` gives it the run's
    OPTIONS: ClassVar = {"weight_decay": 0.0}
    NUMBERS: ClassVar = ("d", "d_max", "d_numerator", "k")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert len(self._factors) == 1, "the config refuses train.layers with factors"

    @property
    def effective_lr(self) -> float:
        group = self._library.param_groups[0]
        return group["d"] * group["lr"]

    def _make_state(self, name: str, master: nn.Parameter) -> State:
        # the library keeps a single zero for the start of a tensor of zeros, whose size could not be planned
        begun = master.detach().flatten()[:: self._library.param_groups[0]["slice_p"]]
        return {
            "step": 0,
            "s": torch.zeros_like(begun),
            "p0": begun.clone(),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
