"""Fixtures: a YOLOX that finds the same in every photo, small models of other kinds, and a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelight.data.prepare.ingest import ingest
from tests.trainer.captioning.conftest import photo
from tests.trainer.tagging.onnx_maker import detector, rows_of
from tests.trainer.tagging.small_models import SAVERS

CPU = torch.device("cpu")
# a large dog at 0.9, a small cat at 0.6, a spoon at 0.3
ROWS = rows_of(
    (0, "dog", 0.9, (32, 18, 64, 36)),
    (9, "cat", 0.6, (8, 9, 16, 18)),
    (20, "spoon", 0.3, (40, 20, 8, 8)),
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Callable[[str], Path]:
    """A function that returns the folder of a small model of a kind; each is made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = SAVERS[kind](tmp_path_factory.mktemp("taggers") / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def yolox_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("yolox") / "small.onnx"
    path.write_bytes(detector(ROWS))
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder of six photos, of which a person tagged the first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        photo(number).save(folder / f"DSC_{number:03d}.png")
    (folder / "DSC_000.txt").write_text("a dog on grass | animal:1.5, park")
    (folder / "DSC_001.txt").write_text("a caption without tags")
    return folder


@pytest.fixture
def dataset(tmp_path, source) -> Path:
    ingest([source], tmp_path / "dataset")
    return tmp_path / "dataset"
