"""Fixtures: pictures, and small .onnx files that make vectors of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.tagging.conftest import model_folder  # noqa: F401
from tests.trainer.tagging.onnx_maker import attribute, field, info, model, node, tensor


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photographs and weights."""
    folder = Path(os.environ.get("SAFELIGHT_SHARED", "/nowhere"))
    if not (folder / "weights").is_dir():
        pytest.skip("needs photographs and weights (SAFELIGHT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Four pictures of large coloured squares, of different sizes."""
    draws = np.random.default_rng(0)
    return [
        Image.fromarray(draws.integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BILINEAR)
        for size in ((96, 64), (64, 64), (40, 80), (128, 100))
    ]


@pytest.fixture
def onnx_file(tmp_path) -> Callable[..., Path]:
    """A function that writes a model whose vectors are the means of a picture's channels, weighted by `factor`."""

    def write(
        batch: int | str = 1, size: tuple = (16, 24), factor: float = 1, shape: tuple = (), outputs: tuple = ()
    ) -> Path:
        mean = node("ReduceMean", ("image",), ("mean",), attribute("keepdims", 2, 3, 0), _axes(2, 3))
        content = model(
            (mean, node("Mul", ("mean", "one"), ("means",)), node("Mul", ("mean", "two"), ("twice",))),
            (tensor("one", np.array(factor, dtype=np.float32)), tensor("two", np.array(2, dtype=np.float32))),
            (info("image", shape or (batch, 3, *size)),),
            outputs or (info("means", (batch, 3)), info("twice", (batch, 3))),
        )
        (tmp_path / "means.onnx").write_bytes(content)
        return tmp_path / "means.onnx"

    return write


def _axes(*axes: int) -> bytes:
    return field(5, field(1, "axes") + b"".join(field(8, axis) for axis in axes) + field(20, 7))
