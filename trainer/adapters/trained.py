"""The interface of what a run trains: all of the UNet, some of its layers, an adapter on it, or a new word.

Optimizer, EMA, the step, checkpoints, sampling, export and the planner ask this object and never which adapter it is.
Full fine-tuning (full.py) is its first implementation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from safelight.kernels.unet.low_rank import DropoutKey
from safelight.trainer.config.schema import Config
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer
from safelight.trainer.registry.adapters import ADAPTERS

Shapes = Mapping[str, tuple[int, ...]]


class Trained(Protocol):
    """A UNet and the parameters that a run trains, in it or beside it.

    module: has the trained parameters: the UNet, or the vectors of a word. vectors: of words that are trained, (N, D)
    for each text encoder by its folder in a model; None without such words. lr_factors: by the name of each trained
    parameter, what its learning rate is multiplied by. dropout_key: what an adapter's dropout draws its masks by, None
    without dropout.
    """

    unet: nn.Module
    module: nn.Module
    vectors: Mapping[str, Tensor] | None
    lr_factors: Mapping[str, float]
    dropout_key: DropoutKey | None

    @classmethod
    def of(cls, unet: nn.Module, config: Config) -> Trained:
        """Return what a config trains of a UNet. May add modules to the UNet, whose parameters have its device."""
        ...

    def mark(self) -> None:
        """Set requires_grad for exactly the parameters to train, before an optimizer is made of the UNet."""
        ...

    def make_optimizer(
        self, config: Config, device: torch.device, dtype: torch.dtype, sharers: World = ALONE
    ) -> UNetOptimizer:
        """Return the optimizer of the marked parameters. Moves the UNet to the device in `dtype`.

        sharers: the processes that divide the optimizer's state among themselves.
        """
        ...

    def reading(self, encoder: CaptionEncoder) -> CaptionEncoder:
        """Return the text encoders as they read captions while this is trained. A new word gets its first vectors."""
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


class InUNet:
    """The part of Trained that is the same for all whose trained parameters are in the UNet."""

    unet: nn.Module
    lr_factors: Mapping[str, float]
    vectors = None

    @property
    def module(self) -> nn.Module:
        return self.unet

    def make_optimizer(
        self, config: Config, device: torch.device, dtype: torch.dtype, sharers: World = ALONE
    ) -> UNetOptimizer:
        return make_optimizer(self.unet, config.optimizer, dtype, config.run.seed, device, self.lr_factors, sharers)

    def reading(self, encoder: CaptionEncoder) -> CaptionEncoder:
        return encoder


def trained_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the parameters that a run trains. dtype: of the UNet."""
    return torch.float32 if config.adapter.spec.is_fp32 else dtype


def trained_of(unet: nn.Module, config: Config) -> Trained:
    """Return what a config's adapter.kind trains of a UNet."""
    module, _, name = ADAPTERS[config.adapter.kind].implementation.partition(":")
    return getattr(importlib.import_module(module), name).of(unet, config)
