"""What every feature extractor does: it turns pictures into vectors that metrics compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image


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
