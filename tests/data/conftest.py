"""Fixtures for the tests of data/: noise images, a prepared dataset and a filled cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZES = ((96, 64), (64, 96), (80, 80), (120, 50))


@pytest.fixture(scope="session")
def fakes():
    spec = importlib.util.spec_from_file_location("data_fakes", Path(__file__).with_name("fakes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noise_image(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode)


@pytest.fixture(scope="session")
def make_noise():
    return noise_image


@pytest.fixture(scope="session")
def noise_dataset(tmp_path_factory):
    """A prepared dataset of twenty photos in four shapes, some with the same caption. Tests must not change it."""
    from safelight.data.prepare.ingest import ingest

    source = tmp_path_factory.mktemp("noise")
    for i in range(20):
        noise_image(i, SIZES[i % 4]).save(source / f"noise {i // 2}_{i:02d}.png")
    ingest([source], source.parent / "noise-dataset")
    return source.parent / "noise-dataset"


@pytest.fixture
def filled(tmp_path, noise_dataset, fakes):
    """(cache, samples) of the noise dataset, the cache complete."""
    from safelight.data.cache import Cache

    with Cache(tmp_path / "filled") as cache:
        fakes.fill(cache, noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder())
        yield cache, fakes.plan(noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder())
