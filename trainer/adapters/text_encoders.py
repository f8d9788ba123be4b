"""Text encoders in a checkpoint, for runs that train them: in fp32, in the folders that a diffusers model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.trainer.adapters.trained import Shapes, Trained
from safelight.trainer.config.schema import Config
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.tensor_files import TensorFile, save_file
from safelight.trainer.optim.optimizer import UNetOptimizer
from safelight.untrusted import UnsafeFile, path_in

WEIGHTS_NAME = "model.safetensors"


class WithTextEncoders:
    """What trains the UNet, and the text encoders beside it; see Trained. parts: text encoders by folder."""

    def __init__(self, trained: Trained, parts: Mapping[str, nn.Module]):
        self._trained, self.unet, self.parts = trained, trained.unet, parts
        self.module, self.vectors = trained.module, trained.vectors
        self.lr_factors, self.dropout_key = trained.lr_factors, trained.dropout_key

    def mark(self) -> None:
        self._trained.mark()

    def make_optimizer(
        self, config: Config, device: torch.device, dtype: torch.dtype, sharers: World = ALONE
    ) -> UNetOptimizer:
        # the text encoders' is another one (trainer/step/text_training.py)
        return self._trained.make_optimizer(config, device, dtype, sharers)

    def reading(self, encoder: CaptionEncoder) -> CaptionEncoder:
        return self._trained.reading(encoder)

    def describe(self) -> str:
        return self._trained.describe()

    def set_factor(self, factor: float) -> None:
        self._trained.set_factor(factor)

    def tensors(self) -> dict[str, Tensor]:
        texts = {f"{part}/{name}": x for part, module in self.parts.items() for name, x in module.state_dict().items()}
        return {**self._trained.tensors(), **texts}

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        own = dict(tensors)
        for part, module in self.parts.items():
            state = {name: own.pop(f"{part}/{name}") for name in module.state_dict()}
            (folder / part).mkdir()
            atomic_write_text(folder / part / "config.json", module.config.to_json_string(use_diff=False))
            save_file(state, folder / part / WEIGHTS_NAME, metadata={"format": "pt"})
        self._trained.write(folder, own)

    def load(self, folder: Path) -> None:
        self._trained.load(folder)

    def merged(
        self, folder: Path, shapes: Shapes, weights: str, convert: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        return self._trained.merged(folder, shapes, weights, convert)


@torch.no_grad()
def load_text_encoders(folder: Path, parts: Mapping[str, nn.Module]) -> None:
    """Load a checkpoint's text encoders into those of the base. Raises UserError if they do not fit."""
    for part, module in parts.items():
        path = path_in(folder, f"{part}/{WEIGHTS_NAME}")
        try:
            file = TensorFile(path)
        except (UnsafeFile, OSError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); use another checkpoint") from None
        state = module.state_dict()
        found = {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()}
        if found != {name: (tuple(x.shape), "F32") for name, x in state.items()}:
            raise UserError(
                f"{path} does not fit the text encoder of this run's base; set model.base to the model it was trained "
                "from"
            )
        for name, x in state.items():
            x.copy_(file.read_finite(name))
