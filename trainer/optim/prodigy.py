"""Prodigy (prodigyopt): AdamW whose learning rate is an estimate that grows while training goes on.

The estimate `d` is one number for all parameters. It comes from sums over all of them, which the library reads back
from the device for each tensor, so a step waits for a GPU some hundreds of times.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from safelight.trainer.optim.base import RateOverflow
from safelight.trainer.optim.library_optimizer import LibraryOptimizer, State

_FP32_MAX = torch.finfo(torch.float32).max


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

    def _update(self) -> None:
        self._check_estimate()
        self._library.step()
        self._check_estimate()

    def _check_estimate(self) -> None:
        """Raise RateOverflow if the estimate, or what the library multiplies fp32 tensors by, exceeds fp32."""
        group = self._library.param_groups[0]
        d, d0 = group["d"], group["d0"]
        dlr = d * group["lr"]
        if group["use_bias_correction"]:
            beta1, beta2 = group["betas"]
            dlr *= (1 - beta2 ** (group["k"] + 1)) ** 0.5 / (1 - beta1 ** (group["k"] + 1))
        factors = (d, d * d, d / d0 * d, d / d0 * dlr, dlr)
        if not all(math.isfinite(x) and abs(x) <= _FP32_MAX for x in factors):
            raise RateOverflow(
                f"prodigy's estimate of the learning rate has grown to {d:.2g}, out of the range of fp32"
            )

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
