"""What an export is made of, and what each kind of export has to do.

The kinds are the whole model (model_export.py), a LoRA alone (lora_export.py) and a word (word_export.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.adapters.text_encoders import load_text_encoders
from safelight.trainer.adapters.trained import trained_of
from safelight.trainer.config.schema import Config
from safelight.trainer.inference.export_place import FolderKind
from safelight.trainer.models.base import Base
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.models.tensor_files import is_finite
from safelight.trainer.models.weights import load_texts, load_unet, load_vae, meta_unet


@dataclass
class Source:
    """A run's model, whose parts are loaded on request. schedule: what the UNet was trained under.

    weights: auto (the moving average if there is one), ema, or trained (those of the last step). lora_scale: what an
    adapter is multiplied by before it is merged.
    """

    config: Config
    base: Base
    checkpoint: Path
    step: int
    schedule: NoiseSchedule
    dtype: torch.dtype
    weights: str
    lora_scale: float = 1.0

    def unet(self) -> nn.Module:
        """Return the trained UNet in the dtype asked for. Its memory is allocated one tensor at a time."""
        unet = meta_unet(self.base)
        shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
        convert = partial(cast_to, dtype=self.dtype, source=f"{self.checkpoint}: ")
        needs_base = self.config.adapter.spec.needs_base
        trained = trained_of(load_unet(self.base, self.config.run.seed) if needs_base else unet, self.config)
        if self.lora_scale != 1:
            trained.set_factor(self.lora_scale)
        unet.load_state_dict(trained.merged(self.checkpoint, shapes, self.weights, convert), assign=True)
        return unet

    def vae(self) -> nn.Module:
        return load_vae(self.base, self.config.model.vae, self.config.run.seed)

    def texts(self) -> list[tuple[object, nn.Module]]:
        """Return tokenizers and text encoders: the checkpoint's if the run trains them, else the base's."""
        texts = load_texts(self.base, self.config.model.tokenizer, self.config.run.seed)
        if self.config.text_encoder.train:
            parts = dict(zip(self.base.family.text_encoders, (text_encoder for _, text_encoder in texts), strict=True))
            load_text_encoders(self.checkpoint, parts)
        return texts


def cast_to(name: str, tensor: Tensor, dtype: torch.dtype, source: str = "") -> Tensor:
    """Return a tensor in dtype. source: begins the message. Raises UserError if a value is not finite in dtype."""
    cast = tensor.to(dtype).contiguous()
    if not is_finite(cast):
        if not is_finite(tensor):
            raise UserError(
                f"{source}{name} has values that are not finite: the training has diverged, and the model would draw "
                "nothing but grey; export an earlier checkpoint with --checkpoint"
            )
        raise UserError(
            f"{name} has values up to {tensor.abs().max():.3g}, above fp16's limit of 65504; use --dtype bf16"
        )
    return cast


def cast_all(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a module's floating-point tensors in dtype, and its integer tensors unchanged."""
    return {k: cast_to(k, t, dtype) if t.is_floating_point() else t for k, t in module.state_dict().items()}


class Export(Protocol):
    """A kind of export: what it writes, and what its user is told.

    folder: the kind of folder it writes, None if it is always one file. default_dtype: of the weights, without --dtype.
    relation: what the export is to the base in the terms of the hub's model cards: finetune or adapter. tag: by which
    the hub tells what is loaded into a base, '' for a model.
    """

    folder: FolderKind | None
    default_dtype: str
    relation: str
    tag: str

    def write_file(self, source: Source, out: Path, title: str, layout: str) -> list[str]:
        """Write one .safetensors file, and return what its user should know, a line each.

        title: for the file's metadata. layout: of the tensors' names, diffusers or kohya.
        """
        ...

    def write_folder(self, source: Source, out: Path, title: str, describe: Callable[[Path], object]) -> list[str]:
        """Write a folder, and return what its user should know. describe: writes the model card into the folder."""
        ...

    def next_step(self, out: Path, layout: str, notes: list[str]) -> str:
        """Return what to do with what was written, '' if the notes say it."""
        ...

    def trained(self, config: Config) -> str:
        """Return in words what was trained, as Markdown for the model card."""
        ...

    def usage(self, config: Config, name: str, is_file: bool, dtype: str) -> str:
        """Return how to use the export, as Markdown. name: of the file or folder, without backticks."""
        ...
