"""YOLOX: how a picture goes in, what its rows mean, and the real nano model on real photos."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.tagging.yolox import Yolox, cells, decode, letterbox
from tests.trainer.tagging.conftest import ROWS
from tests.trainer.tagging.onnx_maker import SIZE, detector, rows_of

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
SHARED = Path(os.environ.get("SAFELIGHT_SHARED", "/nowhere"))


def test_the_grids_have_a_cell_for_each_8_16_and_32_pixels():
    grid = cells((64, 96))
    assert grid[:3].tolist() == [[0, 0, 8], [1, 0, 8], [2, 0, 8]]
    assert grid[12].tolist() == [0, 1, 8]
    assert grid[-1].tolist() == [2, 1, 32]
    assert len(grid) == 8 * 12 + 4 * 6 + 2 * 3


def test_a_picture_lies_in_the_upper_left_in_bgr():
    image = Image.new("RGB", (200, 100), (10, 20, 30))
    pixels, scale = letterbox(image, (64, 64))
    assert scale == 0.32
    assert pixels.dtype == np.float32
    assert (pixels[:, :32, :].reshape(3, -1) == [[30], [20], [10]]).all()
    assert (pixels[:, 32:, :] == 114).all()
    # a picture of a single column is not shrunk to none
    assert letterbox(Image.new("RGB", (1, 5000)), (64, 64))[0].shape == (3, 64, 64)


def test_rows_become_boxes_as_fractions_of_the_picture():
    """The picture fills 64 x 36 pixels of the input. The second row is the first thing once more."""
    rows = rows_of(
        (3, "dog", 0.9, (32, 18, 32, 18)), (70, "dog", 0.7, (33, 18, 32, 18)), (80, "cup", 0.5, (60, 30, 40, 40))
    )
    dog, cup = decode(rows, cells(SIZE), (64, 36))
    assert (dog.name, dog.confidence) == ("dog", pytest.approx(0.9, abs=1e-4))
    assert (dog.left, dog.top, dog.right, dog.bottom) == pytest.approx((0.25, 0.25, 0.75, 0.75), abs=1e-3)
    assert (cup.left, cup.top, cup.right, cup.bottom) == pytest.approx((0.625, 0.2778, 1, 1), abs=1e-3)


def test_a_file_is_run_and_what_it_finds_is_of_the_pictures_shape(yolox_file):
    boxes = Yolox(yolox_file).find([Image.new("L", (640, 360)), Image.new("RGB", (64, 64))])
    assert [(box.name, round(box.confidence, 3)) for box in boxes[0]] == [("dog", 0.9), ("cat", 0.6), ("spoon", 0.3)]
    assert (boxes[0][0].right, boxes[0][0].bottom) == (1, 1)
    assert boxes[1][0].bottom == pytest.approx(36 / 64, abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (detector(ROWS, size=(64, 60)), "its input is .64, 60. pixels"),
        (detector(ROWS, size=("height", "width")), "its input is .'height', 'width'. pixels"),
        (detector(ROWS, size=(4096, 64)), "its input is .4096, 64. pixels"),
        (detector(ROWS, size=(64, 96)), r"its output is \[1, 84, 85\], not \[1, 126, 85\]"),
        (detector(ROWS[:, :25]), r"its output is \[1, 84, 25\], not \[1, 84, 85\]"),
        (detector(np.full_like(ROWS, np.nan)), "values that are not finite"),
    ],
)
def test_a_model_of_another_form_is_refused(tmp_path, content, message):
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Yolox(tmp_path / "other.onnx").find([Image.new("RGB", (8, 8))])
    assert "\n" not in str(error.value)


def test_the_real_nano_model_finds_what_captions_name():
    """Photos of a dog and a cat, and of mountains. dog2 is a chow chow, which the model takes for a bear."""
    weights, table = SHARED / "weights" / "yolox_nano" / "yolox_nano.onnx", SHARED / "photos" / "captions.jsonl"
    if not (weights.is_file() and table.is_file()):
        pytest.skip("the weights or the photographs are not here")
    yolox, found = Yolox(weights), {"dog": [], "cat": [], "mountain": []}
    assert yolox.size == (416, 416)
    for row in map(json.loads, table.read_text().splitlines()):
        subject = row.get("subject") or ("mountain" if "mountain" in row["text"] else "")
        name = {"dog5": "dog"}.get(subject, subject)
        if name in found and len(found[name]) < 5:
            with Image.open(SHARED / "photos" / row["file_name"]) as image:
                boxes = yolox.find([image.convert("RGB")])[0]
            found[name].append({box.name for box in boxes if box.confidence >= 0.3})
    assert {name: len(names) for name, names in found.items()} == {"dog": 5, "cat": 5, "mountain": 5}
    assert sum("dog" in names for names in found["dog"]) >= 4
    assert sum("cat" in names for names in found["cat"]) >= 4
    assert not any(names & {"dog", "cat"} for names in found["mountain"])
