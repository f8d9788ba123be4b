"""The interface of what a run trains: all of the UNet, some of its layers, or an adapter on it.

Optimizer, EMA, checkpoints, sampling and export ask this object and never how the UNet is trained. Full fine-tuning
(full.py) is its first implementation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from safelight.kernels.unet.low_rank import DropoutKey
from safelight.trainer.config.schema import Config
from safelight.trainer.registry.adapters import ADAPTERS

Shapes = Mapping[str, tuple[int, ...]]


class Trained(Protocol):
    """A UNet and the parameters of it that a run trains.

    lr_factors: by the name of each trained parameter, what its learning rate is multiplied by. dropout_key: what an
    adapter's dropout draws its masks by, None without dropout.
    """

    unet: nn.Module
    lr_factors: Mapping[str, float]
    dropout_key: DropoutKey | None

    @classmethod
    def of(cls, unet: nn.Module, config: Config) -> Trained:
        """Return what a config trains of a UNet. May add modules to the UNet, whose parameters have its device."""
        ...

    def mark(self) -> None:
        """Set requires_grad for exactly the parameters to train, before an optimizer is made of the UNet."""
        ...

    def describe(self) -> str:
        """Return a line on what is trained and how many parameters that is, '' for the whole UNet."""
        ...

    def set_factor(self, factor: float) -> None:
        """Multiply what an adapter adds by a factor; only for kinds that are scalable (AdapterSpec)."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors that a checkpoint holds besides optimizer state: the live ones, not copies."""
        ...

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a snapshot of `tensors()`, contiguous and on the CPU, into a checkpoint's folder."""
        ...

    def load(self, folder: Path) -> None:
        """Load a checkpoint's trained tensors into the UNet. Raises UserError if they do not fit."""
        ...

    def merged(
        self, folder: Path, shapes: Shapes, weights: str, convert: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return a checkpoint's whole UNet for export, by diffusers' names, read one tensor at a time.

        shapes: of the base's UNet. weights: `auto` takes the moving average if there is one, `ema` requires it,
        `trained` takes the last step's. convert: applied to each (name, fp32 or stored tensor). Raises UserError if the
        checkpoint does not fit. Of what needs the base (AdapterSpec.needs_base), the UNet must hold the base's weights.
        """
        ...


def trained_of(unet: nn.Module, config: Config) -> Trained:
    """Return what a config's adapter.kind trains of a UNet."""
    module, _, name = ADAPTERS[config.adapter.kind].implementation.partition(":")
    return getattr(importlib.import_module(module), name).of(unet, config)
