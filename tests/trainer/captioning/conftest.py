"""Fixtures: small random captioners of each kind, photos, and a dataset of which some photos have captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.data.prepare.ingest import ingest
from safelight.trainer.captioning.models import Captioner, load_captioner
from tests.trainer.captioning.small_captioners import SAVERS

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def captioner_folder(tmp_path_factory) -> Callable[[str], Path]:
    """A function that returns the folder of a small captioner of a kind; each is made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = SAVERS[kind](tmp_path_factory.mktemp("captioners") / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def captioner(captioner_folder) -> Callable[[str], Captioner]:
    """A function that returns the small captioner of a kind, on the CPU."""
    loaded: dict[str, Captioner] = {}

    def load(kind: str) -> Captioner:
        if kind not in loaded:
            loaded[kind] = load_captioner(str(captioner_folder(kind)), CPU)
        return loaded[kind]

    return load


def photo(number: int) -> Image.Image:
    """Return a picture of large coloured squares; each has another shape."""
    squares = np.random.default_rng(number).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((48 + 24 * (number % 5), 48), Image.Resampling.NEAREST)


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder of nine photos, of which a person captioned the first two."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(9):
        photo(number).save(folder / f"DSC_{number:03d}.png")
    for number in range(2):
        (folder / f"DSC_{number:03d}.txt").write_text(f"written by hand, number {number}")
    return folder


@pytest.fixture
def dataset(tmp_path, source) -> Path:
    ingest([source], tmp_path / "dataset")
    return tmp_path / "dataset"
