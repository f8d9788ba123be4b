"""What every feature extractor does: it turns pictures into vectors that metrics compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.captioning.models import blamed_on


class Extractor(Protocol):
    """Turns pictures into features.

    name: for people, such as "CLIP openai/clip-vit-large-patch14". fingerprint: hash of the weights and of how pictures
    are prepared, which names what is cached. width: numbers per picture.
    """

    name: str
    fingerprint: str
    width: int

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the features of RGB pictures: (N, width), fp32. Those of a picture do not depend on the others."""
        ...


class TextExtractor(Extractor, Protocol):
    """An extractor whose features of pictures can be compared with those of texts."""

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Return the features of texts: (N, width), fp32. Longer texts than the model reads are cut."""
        ...


@dataclass(frozen=True)
class PictureModel:
    """An extractor that looks at one picture at a time, because sums in a batch depend on its size.

    look: returns the features of an RGB picture, (width,).
    """

    name: str
    fingerprint: str
    width: int
    look: Callable[[Image.Image], np.ndarray]

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        return _rows(self, "picture", [lambda image=image: self.look(image.convert("RGB")) for image in images])


@dataclass(frozen=True)
class PictureTextModel(PictureModel):
    """An extractor of pictures and texts. read: returns the features of a text, (width,)."""

    read: Callable[[str], np.ndarray]

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        return _rows(self, "text", [lambda text=text: self.read(text) for text in texts])


def _rows(model: PictureModel, what: str, calls: Sequence[Callable[[], np.ndarray]]) -> np.ndarray:
    """Return what the calls return as rows. Raises UserError if it is no features of the model's width."""
    rows = np.empty((len(calls), model.width), dtype=np.float32)
    for row, call in zip(rows, calls, strict=True):
        with blamed_on(model.name, f"it makes no features of a {what}"):
            found = np.asarray(call(), dtype=np.float32)
        if found.shape != row.shape or not np.isfinite(found).all():
            raise UserError(
                f"{model.name}: its features of a {what} are not {model.width:,} finite numbers; use another model"
            )
        row[:] = found
    return rows


def fingerprint_of(*parts: str) -> str:
    """Return the SHA-256 of what decides features: weights, and how pictures are prepared."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
