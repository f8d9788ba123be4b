"""Real photographs, if available: prepare, buckets of several aspect ratios, TAESD, two stages, report.

The folder is found beside the project's root or by SAFELIGHT_SHARED; without it these tests skip.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from safelight.data.manifest import read_manifest
from safelight.data.prepare.ingest import ingest
from safelight.trainer.config.toml import parse_config
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.models.weights import load_vae
from safelight.trainer.report.build import build_report
from safelight.trainer.train import train

SHARED = Path(os.environ.get("SAFELIGHT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
PHOTOS, TAESD, TOKENIZER = SHARED / "photos", SHARED / "weights" / "taesd", SHARED / "weights" / "clip_tokenizer"
pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs at {PHOTOS}; set SAFELIGHT_SHARED")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "dataset"
    ingest([PHOTOS], folder)
    return folder


@pytest.mark.long
def test_every_photograph_is_taken_with_its_caption(dataset):
    rows = {r["file_name"]: r["text"] for r in map(json.loads, (PHOTOS / "captions.jsonl").read_text().splitlines())}
    photos = read_manifest(dataset)
    assert len(photos) == len(rows) == 367
    assert {Path(p.source).name: p.captions[0] for p in photos} == {n: " ".join(t.split()) for n, t in rows.items()}


@pytest.mark.long
def test_taesd_encodes_a_photograph_and_gives_it_back(dataset):
    """The real TAESD through our codec: no posterior, factor 8, and a good reconstruction."""
    from tests.pixels import load_pixels

    codec = LatentCodec(load_vae(resolve_base("random:small"), str(TAESD), 0), torch.device("cpu"))
    assert not codec.has_posterior
    assert codec.factor == 8
    photo = read_manifest(dataset)[0]
    side = min(photo.width, photo.height)
    pixels = torch.from_numpy(load_pixels(dataset / photo.file, (0, 0, side, side), (256, 256), False))[None]
    latents, logvar = codec.encode(pixels)
    assert logvar is None
    assert tuple(latents.shape) == (1, 4, 32, 32)
    error = (codec.decode(latents * codec.scaling_factor) - (pixels / 2 + 0.5)).square().mean()
    assert -10 * torch.log10(error) > 20


@pytest.mark.slow
def test_the_whole_way_on_photographs_from_scratch_in_tae_space(dataset, tmp_path):
    config = parse_config(
        {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"base": "random:small", "vae": str(TAESD), "tokenizer": str(TOKENIZER)},
            "data": {"path": str(dataset), "resolution": 128},
            "train": {"batch_size": 8, "max_steps": 60},
            "optimizer": {"lr": 5e-4},
            "stage": [{"epochs": 1}, {"epochs": 1, "lr": 1e-4}],
            "validate": {"max_images": 8},
            "sample": {"steps": 4, "num_prompts": 2},
        },
        "test",
    )
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if r["kind"] == "validation" and r["split"] == "held_out"]
    assert losses[-1] < 0.9 * losses[0]
    buckets = json.loads((tmp_path / "run" / "data.json").read_text())["buckets"]
    assert len(buckets) >= 5
    page = build_report(tmp_path / "run").read_text()
    assert "from scratch" in page
