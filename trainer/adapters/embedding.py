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
from safelight.trainer.adapters.trained import Shapes
from safelight.trainer.config.schema import Config
from safelight.trainer.models.base import encoder_widths, resolve_model
from safelight.trainer.models.embeddings import FOLDER_FILES, NEGATIVE, Embedding
from safelight.trainer.models.tensor_files import TensorFile, save_file
from safelight.untrusted import UnsafeFile, path_in

FOLDER = "embedding"


class WordVectors:
    """The vectors of a word; see Trained. vectors: (N, D) fp32 for each text encoder, by its folder in a model."""

    def __init__(self, unet: nn.Module, word: str, widths: Mapping[str, int], num_vectors: int, is_negative: bool):
        self.unet, self.word, self._is_negative = unet, word, is_negative
        self.lr_factors, self.dropout_key = {}, None
        self.vectors = nn.ParameterDict({part: torch.zeros(num_vectors, width) for part, width in widths.items()})

    @classmethod
    def of(cls, unet: nn.Module, config: Config) -> WordVectors:
        own, widths = config.embedding, encoder_widths(resolve_model(config.model))
        return cls(unet, own.word, widths, own.vectors, own.negative)

    @property
    def embedding(self) -> Embedding:
        """The word with its live vectors, which training changes."""
        return Embedding(self.word, self.vectors, self._is_negative)

    @torch.no_grad()
    def begin_as(self, embedding: Embedding) -> None:
        """Set the vectors to those of an embedding."""
        for part, vectors in self.vectors.items():
            vectors.copy_(embedding.vectors[part])

    def mark(self) -> None:
        self.unet.requires_grad_(False)
        self.vectors.requires_grad_(True)

    def describe(self) -> str:
        # said where the text encoders are described
        return ""

    def set_factor(self, factor: float) -> None:
        raise NotImplementedError("the vectors of a word are not scaled; a prompt weighs the word: (word:1.2)")

    def tensors(self) -> dict[str, Tensor]:
        return {f"{FOLDER}/{part}": vectors.detach() for part, vectors in self.vectors.items()}

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        (folder / FOLDER).mkdir()
        metadata = {"format": "pt", **({NEGATIVE: "true"} if self._is_negative else {})}
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
