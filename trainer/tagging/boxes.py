"""Boxes around things in a picture: what a detector found, without repeats, and how much of the picture it covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from safelight.text import collapse
from safelight.trainer.captioning.options import LEAST_CONFIDENCE
from safelight.trainer.tagging.categories import MAX_NAME_CHARACTERS

MAX_BOXES = 100
# boxes of one class that overlap more than this are of one thing, as in YOLOX's demo
MAX_OVERLAP = 0.45


@dataclass(frozen=True)
class Box:
    """A thing found in a picture. confidence: 0 to 1. left, top, right, bottom: fractions of width and height."""

    name: str
    confidence: float
    left: float
    top: float
    right: float
    bottom: float


def boxes_of(names: Sequence[str], classes: np.ndarray, confidences: np.ndarray, corners: np.ndarray) -> list[Box]:
    """Return the boxes of a detector's rows, the most confident first; those without a name, or empty, are left out.

    names: of the classes; "" for one that has none. classes, confidences: (N,). corners: (N, 4), left, top, right,
    bottom as fractions, which are clipped to the picture.
    """
    corners = np.clip(corners, 0, 1)
    boxes = []
    for index in np.argsort(-confidences, kind="stable"):
        left, top, right, bottom = (round(float(value), 4) for value in corners[index])
        confidence = round(float(confidences[index]), 4)
        name = names[int(classes[index])] if 0 <= classes[index] < len(names) else ""
        if name and confidence >= LEAST_CONFIDENCE and right > left and bottom > top:
            boxes.append(Box(name, min(confidence, 1.0), left, top, right, bottom))
    return boxes[:MAX_BOXES]


def keep_best(corners: np.ndarray, scores: np.ndarray, classes: np.ndarray, max_overlap: float = MAX_OVERLAP):
    """Return the indices of the rows that remain of overlapping ones, by falling score: non-maximum suppression.

    A row is dropped if it overlaps a better one of its class by more than max_overlap, as intersection over union.
    corners: (N, 4), left, top, right, bottom. scores, classes: (N,).
    """
    areas = np.prod(np.maximum(corners[:, 2:] - corners[:, :2], 0), axis=1)
    rest = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(rest) and len(kept) < MAX_BOXES:
        best, rest = rest[0], rest[1:]
        kept.append(int(best))
        start = np.maximum(corners[rest, :2], corners[best, :2])
        end = np.minimum(corners[rest, 2:], corners[best, 2:])
        shared = np.prod(np.maximum(end - start, 0), axis=1)
        together = areas[rest] + areas[best] - shared
        overlap = np.divide(shared, together, out=np.zeros_like(shared), where=together > 0)
        rest = rest[(overlap <= max_overlap) | (classes[rest] != classes[best])]
    return kept


def covered(boxes: Sequence[Box]) -> float:
    """Return the fraction of the picture that lies in at least one of the boxes."""
    if not boxes:
        return 0.0
    xs = np.unique([side for box in boxes for side in (box.left, box.right)])
    ys = np.unique([side for box in boxes for side in (box.top, box.bottom)])
    inside = np.zeros((len(ys) - 1, len(xs) - 1), dtype=bool)
    for box in boxes:
        columns = slice(*np.searchsorted(xs, [box.left, box.right]))
        inside[slice(*np.searchsorted(ys, [box.top, box.bottom])), columns] = True
    return min(1.0, float(np.diff(ys) @ inside @ np.diff(xs)))


def row_of_boxes(boxes: Sequence[Box]) -> dict:
    """Return boxes as the values of a journal's row."""
    return {"boxes": [list(astuple(box)) for box in boxes]}


def boxes_of_row(row: dict) -> list[Box] | None:
    """Return the boxes of a journal's row, None if it is damaged."""
    boxes = row.get("boxes")
    if not isinstance(boxes, list) or len(boxes) > MAX_BOXES:
        return None
    found = [_box_of(values) for values in boxes]
    return None if None in found else found


def _box_of(values: object) -> Box | None:
    if not isinstance(values, list) or len(values) != 6 or not isinstance(values[0], str):
        return None
    name, *numbers = values
    if not all(isinstance(number, int | float) and 0 <= number <= 1 for number in numbers):
        return None
    box = Box(collapse(name)[:MAX_NAME_CHARACTERS], *map(float, numbers))
    return box if box.name and box.right > box.left and box.bottom > box.top else None
