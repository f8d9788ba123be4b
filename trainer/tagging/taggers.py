"""What looks at photos for `safelight caption --tags`: CLIP, a detector of transformers, or a YOLOX .onnx file.

`open_clip` and `open_detector` yield a source, which knows the model's hash before the model is built: a dataset of
which everything is known needs none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from safelight.data.photo import Tag
from safelight.errors import UserError
from safelight.text import shortened
from safelight.trainer.captioning.journal import Form
from safelight.trainer.captioning.model_files import ModelFiles, opened
from safelight.trainer.captioning.models import blamed_on, read_config
from safelight.trainer.tagging.boxes import Box, boxes_of_row, row_of_boxes
from safelight.trainer.tagging.categories import Categories
from safelight.trainer.tagging.clip import Clip, embedding_of_row, load_clip, row_of_embedding
from safelight.trainer.tagging.detectors import check_kind, load_detector
from safelight.trainer.tagging.weights import tags_of_boxes, tags_of_probabilities
from safelight.trainer.tagging.yolox import Yolox

FOLDER_NAME = "tags"
BOXES = Form(FOLDER_NAME, row_of_boxes, boxes_of_row)
DETECTOR_OPTION = "--tags-from-detector"


class Tagger(Protocol):
    """Looks at pictures, and makes tags of what it saw."""

    device: torch.device

    def look(self, images: Sequence[Image.Image]) -> list: ...

    def tags(self, seen: object, categories: Categories, min_confidence: float) -> tuple[Tag, ...]: ...


@dataclass(frozen=True)
class TaggerSource:
    """A tagger's files. model: as the user named it. record: what decides what it sees. form: of that in a journal.

    build: makes the tagger, which has looked at a grey picture then; raises UserError if its files do not make one.
    """

    model: str
    record: dict
    form: Form
    build: Callable[[torch.device], Tagger]


@dataclass(frozen=True)
class DetectorTagger:
    """A detector as a tagger. find: returns the boxes in each picture."""

    find: Callable[[Sequence[Image.Image]], list[list[Box]]]
    device: torch.device

    def look(self, images: Sequence[Image.Image]) -> list[list[Box]]:
        return self.find(images)

    def tags(self, seen: list[Box], categories: Categories, min_confidence: float) -> tuple[Tag, ...]:
        return tags_of_boxes(seen, categories, min_confidence)


class ClipTagger:
    """CLIP as a tagger: what it saw of a picture is its embedding, which needs no second look for other categories."""

    def __init__(self, clip: Clip):
        self.clip, self.device = clip, clip.device
        self._texts: tuple[tuple[str, ...], torch.Tensor] | None = None

    def look(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        return self.clip.embed_images(images)

    def tags(self, seen: torch.Tensor, categories: Categories, min_confidence: float) -> tuple[Tag, ...]:
        if self._texts is None or self._texts[0] != categories.names:
            self._texts = categories.names, self.clip.embed_names(categories.names)
        probabilities = self.clip.probabilities(seen, self._texts[1])
        return tags_of_probabilities(
            dict(zip(categories.names, probabilities, strict=True)), categories, min_confidence
        )


@contextmanager
def open_clip(spec: str) -> Iterator[TaggerSource]:
    """Yield the CLIP in a local folder or a hub repository, which is downloaded if need be. Raises UserError."""
    with opened(spec, what="a CLIP") as files:
        if files.config.get("model_type") != "clip":
            raise UserError(
                f"--model {spec!r} is of the kind {_kind(files)!r}, not a CLIP, which --tags needs; give a CLIP of "
                f"transformers, or a detector with {DETECTOR_OPTION}"
            )
        tensors, fingerprint = files.read_weights()
        num_dimensions = read_config(files).projection_dim
        form = Form(FOLDER_NAME, row_of_embedding, partial(embedding_of_row, num_dimensions=num_dimensions))

        def build(device: torch.device) -> ClipTagger:
            return ClipTagger(load_clip(files, tensors, device))

        yield TaggerSource(spec, {"kind": "clip", "weights": fingerprint[:16]}, form, _tried(spec, build))


@contextmanager
def open_detector(spec: str, option: str = DETECTOR_OPTION) -> Iterator[TaggerSource]:
    """Yield a detector: a YOLOX .onnx file, or a local folder or hub repository of transformers.

    option: which named it, for messages. Raises UserError.
    """
    path = Path(os.path.expanduser(spec))
    if path.suffix.lower() == ".onnx":
        if not os.path.isfile(path):
            raise UserError(f"{option} {spec!r} does not exist; give a YOLOX .onnx file, or a folder")
        yolox = Yolox(path)
        record = {"kind": "yolox", "weights": yolox.fingerprint[:16]}
        yield TaggerSource(spec, record, BOXES, lambda device: DetectorTagger(yolox.find, yolox.device))
        return
    with opened(spec, option, "a detector") as files:
        check_kind(files, f"{option} {spec!r} is of the kind {_kind(files)!r}")
        tensors, fingerprint = files.read_weights()

        def build(device: torch.device) -> DetectorTagger:
            return DetectorTagger(load_detector(files, tensors, device).find, device)

        yield TaggerSource(spec, {"kind": "boxes", "weights": fingerprint[:16]}, BOXES, _tried(spec, build))


def _kind(files: ModelFiles) -> str:
    return shortened(str(files.config.get("model_type")), 60)


@dataclass(frozen=True)
class _Named:
    """A tagger whose errors are one line with its model's name."""

    spec: str
    tagger: Tagger

    @property
    def device(self) -> torch.device:
        return self.tagger.device

    def look(self, images: Sequence[Image.Image]) -> list:
        with blamed_on(self.spec, "it cannot look at a picture"):
            return self.tagger.look(images)

    def tags(self, seen: object, categories: Categories, min_confidence: float) -> tuple[Tag, ...]:
        with blamed_on(self.spec, "it makes no tags of what it saw"):
            return self.tagger.tags(seen, categories, min_confidence)


def _tried(spec: str, build: Callable[[torch.device], Tagger]) -> Callable[[torch.device], Tagger]:
    """Return `build`, and a look at a grey picture after it."""

    def build_and_try(device: torch.device) -> Tagger:
        try:
            with blamed_on(spec, "it cannot be loaded"):
                tagger = _Named(spec, build(device))
            tagger.look([Image.new("RGB", (64, 48), "grey")])
        except torch.OutOfMemoryError:
            raise UserError(
                f"{spec!r} does not fit the GPU's memory; close other programs, choose a smaller model, or add "
                "--device cpu"
            ) from None
        return tagger

    return build_and_try
