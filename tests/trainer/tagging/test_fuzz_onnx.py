"""Damaged .onnx files and outputs end in boxes or in one line."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.tagging.boxes import MAX_BOXES
from safelight.trainer.tagging.onnx_file import check_graph
from safelight.trainer.tagging.yolox import Yolox, cells, decode
from safelight.untrusted import UnsafeFile
from tests.trainer.tagging.conftest import ROWS
from tests.trainer.tagging.onnx_maker import NUM_CELLS, SIZE, detector

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def end_of(num: int, seed: int, path) -> list[str]:
    """Change bytes of the small model's structure `num` times, and return the messages of those that were refused."""
    content, rng, messages = detector(ROWS), random.Random(seed), []
    start = content.index(ROWS[0].tobytes()[:20])
    # the numbers are many beside the structure
    structure = [*range(start), *range(start + ROWS.nbytes, len(content))]
    for _ in range(num):
        changed = bytearray(content)
        for place in rng.sample(structure, rng.randint(1, 3)):
            changed[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        path.write_bytes(changed[: rng.choice((len(changed),) * 3 + (rng.randrange(len(changed)),))])
        try:
            Yolox(path).find([Image.new("RGB", (16, 16))])
        except UserError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("num", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_changed_bytes_end_in_boxes_or_in_one_line(tmp_path, num):
    messages = end_of(num, num, tmp_path / "x.onnx")
    assert 0.3 * num < len(messages) < num
    assert not any("\n" in message for message in messages)


def test_random_bytes_are_no_model():
    rng = random.Random(2)
    for _ in range(2000):
        with pytest.raises(UnsafeFile):
            check_graph(bytes(rng.choice((0x0A, 0x3A, 0x08, rng.randrange(256))) for _ in range(rng.randrange(60))))


@pytest.mark.parametrize("num", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_any_output_becomes_at_most_so_many_boxes_within_the_picture(num):
    rng = np.random.default_rng(num)
    for turn in range(num):
        rows = rng.normal(0, (0.1, 3, 1e3, 1e30)[turn % 4], (NUM_CELLS, 85)).astype(np.float32)
        rows[:, 4:] = rng.random((NUM_CELLS, 81))
        with np.errstate(all="ignore"):
            boxes = decode(rows, cells(SIZE), (64, 36))
        assert len(boxes) <= MAX_BOXES
        assert all(0 <= box.left < box.right <= 1 and 0 <= box.top < box.bottom <= 1 for box in boxes)
        assert all(0.1 <= box.confidence <= 1 for box in boxes)
