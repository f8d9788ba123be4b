"""Writes small .onnx files in protobuf's own encoding, good and bad ones: onnx, the package, is not needed."""

from __future__ import annotations

import numpy as np

from safelight.trainer.tagging.yolox import COCO_NAMES, cells

SIZE = (64, 64)
NUM_CELLS = len(cells(SIZE))
OPSET = 13


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, values: np.ndarray) -> bytes:
    """Return a TensorProto of fp32 or int64."""
    kind = 1 if values.dtype == np.float32 else 7
    dims = b"".join(field(1, size) for size in values.shape)
    return dims + field(2, kind) + field(8, name) + field(9, values.tobytes())


def info(name: str, shape: tuple) -> bytes:
    """Return a ValueInfoProto of fp32; a size that is a text is not fixed."""
    sizes = b"".join(field(1, field(2 if isinstance(size, str) else 1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, sizes)))


def node(kind: str, inputs: tuple, outputs: tuple, *more: bytes) -> bytes:
    names = b"".join(field(1, name) for name in inputs) + b"".join(field(2, name) for name in outputs)
    return names + field(4, kind) + b"".join(more)


def attribute(name: str, kind: int, number: int, value: int | bytes) -> bytes:
    """Return a field of a NodeProto: an AttributeProto."""
    return field(5, field(1, name) + field(number, value) + field(20, kind))


def model(nodes, initializers, inputs, outputs, more: bytes = b"", opsets: tuple = (field(2, OPSET),)) -> bytes:
    graph = b"".join(field(1, one) for one in nodes) + field(2, "graph")
    graph += b"".join(field(5, one) for one in initializers)
    graph += b"".join(field(11, one) for one in inputs) + b"".join(field(12, one) for one in outputs)
    return field(1, 8) + field(7, graph) + b"".join(field(8, one) for one in opsets) + more


def rows_of(*found: tuple[int, str, float, tuple[float, float, float, float]]) -> np.ndarray:
    """Return an output in which cells find things: (cell, class, confidence, (x, y, width, height in pixels))."""
    rows = np.zeros((NUM_CELLS, 5 + len(COCO_NAMES)), dtype=np.float32)
    for cell, name, confidence, (x, y, width, height) in found:
        column, row, stride = cells(SIZE)[cell]
        rows[cell, :4] = (
            x / stride - column,
            y / stride - row,
            np.log(width / stride),
            np.log(height / stride),
        )
        rows[cell, 4] = confidence
        rows[cell, 5 + COCO_NAMES.index(name)] = 1
    return rows


def detector(rows: np.ndarray, size: tuple = SIZE, output: tuple | None = None, nodes: tuple = ()) -> bytes:
    """Return a YOLOX that finds the same in every picture: `rows`, plus 0 times the mean of the picture."""
    mean = node("ReduceMean", ("images",), ("mean",), attribute("keepdims", 2, 3, 0))
    usual = (mean, node("Mul", ("mean", "zero"), ("nothing",)), node("Add", ("rows", "nothing"), ("output",)))
    return model(
        nodes or usual,
        (tensor("rows", rows[None]), tensor("zero", np.zeros((), dtype=np.float32))),
        (info("images", (1, 3, *size)),),
        (info("output", output or (1, *rows.shape)),),
    )
