"""Textual inversion: the vectors of a new word are trained, in fp32; UNet and text encoders are frozen.

A checkpoint holds the vectors as the files that other programs read: embedding/learned_embeds.safetensors, and for
SDXL learned_embeds_2.safetensors with those of the second text encoder.
Source: Gal et al. 2022, arXiv:2208.01618.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.adapters.trained import Shapes
from safelight.trainer.config.schema import Config
from safelight.trainer.config.schema import Embedding as EmbeddingSettings
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.models.base import encoder_widths, resolve_model
from safelight.trainer.models.embeddings import FOLDER_FILES, NEGATIVE, Embedding
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.tensor_files import TensorFile, save_file
from safelight.trainer.optim.base import LossScale
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer
from safelight.untrusted import UnsafeFile, path_in

FOLDER = "embedding"


class WordVectors:
    """The vectors of a word, in fp32; see Trained. widths: of a vector for each text encoder, by its folder."""

    def __init__(self, unet: nn.Module, settings: EmbeddingSettings, widths: Mapping[str, int]):
        self.unet, self.settings, self.word = unet, settings, settings.word
        self.lr_factors, self.dropout_key = {}, None
        self.vectors = nn.ParameterDict({part: torch.zeros(settings.vectors, width) for part, width in widths.items()})

    @classmethod
    def of(cls, unet: nn.Module, config: Config) -> WordVectors:
        return cls(unet, config.embedding, encoder_widths(resolve_model(config.model)))

    @property
    def module(self) -> nn.Module:
        return self.vectors

    @property
    def embedding(self) -> Embedding:
        """The word with its live vectors, which training changes."""
        return Embedding(self.word, self.vectors, self.settings.negative)

    @torch.no_grad()
    def reading(self, encoder: CaptionEncoder) -> CaptionEncoder:
        first = next(own for own in encoder.embeddings if own.name == self.word)
        for part, vectors in self.vectors.items():
            vectors.copy_(first.vectors[part])
        return encoder.knowing([self.embedding])

    def mark(self) -> None:
        self.unet.requires_grad_(False)
        self.vectors.requires_grad_(True)

    def make_optimizer(
        self, config: Config, device: torch.device, dtype: torch.dtype, sharers: World = ALONE
    ) -> UNetOptimizer:
        for parameter in self.unet.parameters():
            # one at a time, so that the fp32 weights are never all on the device
            parameter.data = parameter.data.to(device, dtype)
        # buffers, if there are any
        self.unet.to(device, dtype)
        vectors = self.vectors.to(device)
        optimizer = make_optimizer(
            vectors, config.optimizer.for_fp32(), torch.float32, config.run.seed, device, sharers=sharers
        )
        # gradients pass through the UNet in its own dtype
        optimizer.loss_scale = LossScale(device, dtype == torch.float16)
        return optimizer

    def describe(self) -> str:
        own, num = self.settings, sum(x.numel() for x in self.vectors.values())
        kind = "negative word" if own.negative else "word"
        return (
            f"the {kind} {own.word!r} is trained: {counted(own.vectors, 'vector')}, {num:,} values in fp32, begun as "
            f"{own.initial_text!r}; UNet and text encoder are frozen"
        )

    def set_factor(self, factor: float) -> None:
        raise NotImplementedError("the vectors of a word are not scaled; a prompt weighs the word: (word:1.2)")

    def tensors(self) -> dict[str, Tensor]:
        return {f"{FOLDER}/{part}": vectors.detach() for part, vectors in self.vectors.items()}

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        (folder / FOLDER).mkdir()
        metadata = {"format": "pt", **({NEGATIVE: "true"} if self.settings.negative else {})}
        for part in self.vectors:
            save_file({self.word: tensors[f"{FOLDER}/{part}"]}, folder / FOLDER / FOLDER_FILES[part], metadata)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        for part, vectors in self.vectors.items():
            path = path_in(folder, f"{FOLDER}/{FOLDER_FILES[part]}")
            try:
                file = TensorFile(path)
            except (UnsafeFile, OSError) as error:
                raise UserError(f"{path} is missing or damaged ({error}); use another checkpoint") from None
            found = {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()}
            if found != {self.word: (tuple(vectors.shape), "F32")}:
                raise UserError(
                    f"{path} does not hold {len(vectors)} vectors of {vectors.shape[1]:,} values for the word "
                    f"{self.word!r}; set [embedding] and model.base to what this run was started with"
                )
            vectors.copy_(file.read_finite(self.word))

    def merged(
        self, folder: Path, shapes: Shapes, weights: str, convert: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        raise UserError(
            "this run trained an embedding, and the UNet is the base's: export writes the embedding alone, to "
            "NAME.safetensors or to a folder"
        )
