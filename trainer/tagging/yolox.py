"""YOLOX detectors in an .onnx file, as YOLOX's own tools/export_onnx.py writes them, run by onnxruntime on the CPU.

A model takes (1, 3, H, W), BGR, 0 to 255: the picture shrunk or enlarged into the upper left, the rest filled with 114.
It returns (1, N, 5 + classes): a row per cell of three grids, whose cells are 8, 16 and 32 pixels wide. A row has the
box's centre, from its cell's corner, in cells; the logarithms of width and height in cells; the probability that there
is a thing; and the probability of each class, if there is one.
Source: Ge et al. 2021, "YOLOX: Exceeding YOLO Series in 2021", arXiv:2107.08430.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from safelight.errors import UserError, first_line
from safelight.trainer.captioning.options import LEAST_CONFIDENCE
from safelight.trainer.tagging.boxes import Box, boxes_of, keep_best
from safelight.trainer.tagging.onnx_file import open_onnx

STRIDES = (8, 16, 32)
PADDING = 114
MAX_SIDE_PX = 2048
# of the cells that find something, so many of the best are compared with each other
MAX_CANDIDATES = 1000
# the 80 classes of COCO in the order of their numbers
COCO_NAMES = (
    *"person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign".split(","),
    *"parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella".split(","),
    *"handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove".split(","),
    *"skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple".split(","),
    *"sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed".split(","),
    *"dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink".split(","),
    *"refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(","),
)


class Yolox:
    """A YOLOX model. fingerprint: the hash of its file. size: (height, width) of its input in pixels."""

    device = torch.device("cpu")

    def __init__(self, path: Path):
        self.path = path
        self._session, self.fingerprint = open_onnx(path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._input = inputs[0].name if inputs else ""
        shape = inputs[0].shape if len(inputs) == 1 else []
        # a number of photos that is not fixed is a name
        if len(shape) != 4 or shape[1] != 3 or not (shape[0] == 1 or isinstance(shape[0], str)):
            raise self._refused(f"its input is {shape}, not (1, 3, height, width)")
        if inputs[0].type != "tensor(float)" or not all(_is_side(side) for side in shape[2:]):
            raise self._refused(
                f"its input is {shape[2:]} pixels of {inputs[0].type}; expected multiples of 32 up to {MAX_SIDE_PX}, "
                "in fp32"
            )
        self.size: tuple[int, int] = tuple(shape[2:])
        self._cells = cells(self.size)
        shape = outputs[0].shape if len(outputs) == 1 else []
        expected = [len(self._cells), 5 + len(COCO_NAMES)]
        if shape[1:] != expected or outputs[0].type != "tensor(float)":
            raise self._refused(f"its output is {shape}, not {[1, *expected]}, a row per cell for the classes of COCO")

    def find(self, images: Sequence[Image.Image]) -> list[list[Box]]:
        """Return the boxes of each picture."""
        return [self._find(image.convert("RGB")) for image in images]

    def _find(self, image: Image.Image) -> list[Box]:
        pixels, scale = letterbox(image, self.size)
        try:
            (rows,) = self._session.run(None, {self._input: pixels[None]})
        # onnxruntime's exceptions have no other base
        except Exception as error:
            raise self._refused(f"it cannot look at a picture ({first_line(error)})") from None
        if rows.shape != (1, len(self._cells), 5 + len(COCO_NAMES)) or not np.isfinite(rows).all():
            raise self._refused("its output has another shape than it says, or values that are not finite")
        return decode(rows[0], self._cells, (image.width * scale, image.height * scale))

    def _refused(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not used: {reason}; give a YOLOX model as its export writes it")


def _is_side(side: object) -> bool:
    return isinstance(side, int) and 32 <= side <= MAX_SIDE_PX and side % 32 == 0


def cells(size: tuple[int, int]) -> np.ndarray:
    """Return the grids' cells as rows of (x, y, width in pixels), x and y counted in cells, for an input's size."""
    found = []
    for stride in STRIDES:
        ys, xs = np.mgrid[: size[0] // stride, : size[1] // stride]
        found.append(np.stack([xs.ravel(), ys.ravel(), np.full(xs.size, stride)], axis=1))
    return np.concatenate(found).astype(np.float32)


def letterbox(image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Return (a picture as a model's input: (3, H, W), BGR, fp32; pixels there per pixel of the picture)."""
    scale = min(size[0] / image.height, size[1] / image.width)
    width, height = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.full((3, *size), PADDING, dtype=np.float32)
    pixels[:, :height, :width] = np.asarray(resized, dtype=np.float32)[:, :, ::-1].transpose(2, 0, 1)
    return pixels, scale


def decode(rows: np.ndarray, grid: np.ndarray, picture: tuple[float, float]) -> list[Box]:
    """Return the boxes of a model's output, (N, 5 + classes). grid: its cells. picture: (width, height) in pixels."""
    classes = rows[:, 5:].argmax(axis=1)
    scores = rows[:, 4] * rows[np.arange(len(rows)), 5 + classes]
    best = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
    best = best[scores[best] >= LEAST_CONFIDENCE]
    rows, grid, classes, scores = rows[best], grid[best], classes[best], scores[best]
    stride = grid[:, 2:]
    centre = (rows[:, :2] + grid[:, :2]) * stride
    # e^20 cells are more than any picture has
    half = np.exp(np.minimum(rows[:, 2:4], 20)) * stride / 2
    corners = np.concatenate([centre - half, centre + half], axis=1)
    kept = keep_best(corners, scores, classes)
    fractions = corners[kept] / np.array([*picture, *picture], dtype=np.float32)
    return boxes_of(COCO_NAMES, classes[kept], scores[kept], fractions)
