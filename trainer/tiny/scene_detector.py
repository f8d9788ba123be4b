"""A detector of the shapes in generated scenes, by the rules of reader.py: the demo needs no network for its crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from safelight.trainer.tagging.boxes import Box
from safelight.trainer.tagging.taggers import BOXES, DetectorTagger, TaggerSource
from safelight.trainer.tiny.reader import find_shape

# part of what its boxes are kept under; raise it when a change makes it find others
VERSION = 1


@contextmanager
def open_scene_detector() -> Iterator[TaggerSource]:
    """Yield the detector."""
    record = {"kind": "scenes", "version": VERSION}
    yield TaggerSource(
        "fixed rules for drawn shapes", record, BOXES, lambda device: DetectorTagger(_find, torch.device("cpu"))
    )


def _find(images: Sequence[Image.Image]) -> list[list[Box]]:
    return [_boxes(image) for image in images]


def _boxes(image: Image.Image) -> list[Box]:
    shape, mask = find_shape(image)
    if shape is None:
        return []
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom = rows[0] / mask.shape[0], (rows[-1] + 1) / mask.shape[0]
    left, right = columns[0] / mask.shape[1], (columns[-1] + 1) / mask.shape[1]
    return [Box(shape, 1.0, *(round(float(side), 4) for side in (left, top, right, bottom)))]
