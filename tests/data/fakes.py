"""Encoders without weights, and a script that fills a cache: python fakes.py DATASET CACHE HOW N.

It fills it until it is killed, or (HOW: share) waits for a line, fills it with others and prints what it encoded.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from safelight.data.buckets import make_buckets
from safelight.data.cache import Cache, fill_latents, fill_texts, plan_samples, sample_captions
from safelight.data.manifest import read_manifest
from safelight.data.placement import place_photos


class FakeVae:
    """A VAE whose latents are four weighted means of each 8 x 8 block of pixels, and whose logvar follows from them."""

    latent_channels = 4
    factor = 8

    def __init__(self, fingerprint: str = "vae-a", has_posterior: bool = True, seconds: float = 0.0):
        self.fingerprint, self.has_posterior, self.seconds = fingerprint, has_posterior, seconds
        self.num_encoded = 0

    def encode(self, pixels_BCHW):
        assert pixels_BCHW.dtype == torch.float32
        assert pixels_BCHW.abs().max() <= 1
        self.num_encoded += len(pixels_BCHW)
        time.sleep(self.seconds)
        pooled = torch.nn.functional.avg_pool2d(pixels_BCHW, self.factor)
        mean = torch.cat([pooled, 0.5 * pooled[:, :1] - 0.25 * pooled[:, 2:]], dim=1)
        return mean, (-mean.abs() - 1.0 if self.has_posterior else None)


class FakeTextEncoder:
    """A text encoder whose embeddings are computed from the caption's bytes."""

    row_shape = (5, 3)

    def __init__(self, fingerprint: str = "text-a"):
        self.fingerprint = fingerprint
        self.encoded: list[str] = []

    def encode(self, captions):
        self.encoded += captions
        rows = [np.resize(np.frombuffer(text.encode() + b"\0", np.uint8), 15) / 32.0 for text in captions]
        return torch.tensor(np.array(rows), dtype=torch.float32).reshape(-1, 5, 3)


def plan(dataset: Path, vae: FakeVae, text: FakeTextEncoder, **settings):
    """Return the samples of a dataset at resolution 64."""
    defaults = {"variants": 3, "crop_jitter": 0.2, "flip_p": 0.5, "seed": 7, "dtype": "float16"}
    return plan_samples(
        place_photos(read_manifest(dataset), make_buckets(64, 8)),
        vae_fingerprint=vae.fingerprint,
        text_fingerprint=text.fingerprint,
        **{**defaults, **settings},
    )


def fill(cache: Cache, dataset: Path, vae: FakeVae, text: FakeTextEncoder, progress=None) -> int:
    """Fill a cache with a dataset's text and latent rows; return the number of rows added."""
    samples = plan(dataset, vae, text)
    num_texts = fill_texts(cache, sample_captions(samples), text, batch_size=4)
    return num_texts + fill_latents(cache, dataset, samples, vae, batch_size=3, progress=progress)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _child(dataset: Path, cache_path: Path, how: str, at: int) -> None:
    """Fill the cache and die at the at-th write of rows: during it, between it and the commit, or after the commit."""
    num_writes = 0
    write_rows = Cache._write_rows

    def deadly_write(self, file, offset, rows):
        nonlocal num_writes
        num_writes += 1
        if num_writes < at or how not in ("within", "before_commit"):
            return write_rows(self, file, offset, rows)
        if how == "within":
            path = self._shards_path / file
            with open(path, "r+b" if path.exists() else "wb") as stream:
                stream.seek(offset)
                stream.write(rows.tobytes()[: rows.nbytes // 2 + 1])
        else:
            write_rows(self, file, offset, rows)
        _die()

    def progress(num_done: int, num_all: int) -> None:
        if how == "after_commit" and num_done >= 3 * at:
            _die()
        if how == "any_time":
            print(num_done, flush=True)
            time.sleep(0.002)

    Cache._write_rows = deadly_write
    with Cache(cache_path) as cache:
        fill(cache, dataset, FakeVae(), FakeTextEncoder(), progress)


def _share(dataset: Path, cache_path: Path) -> None:
    """Fill the cache with other processes; print progress, then (latents, captions) that this process encoded."""
    vae, text = FakeVae(seconds=0.1), FakeTextEncoder()
    print("ready", flush=True)
    sys.stdin.readline()
    with Cache(cache_path) as cache:
        fill(cache, dataset, vae, text, lambda done, total: print(done, total, flush=True))
    print(f"encoded {vae.num_encoded} {len(text.encoded)}", flush=True)


if __name__ == "__main__":
    if sys.argv[3] == "share":
        _share(Path(sys.argv[1]), Path(sys.argv[2]))
        sys.exit()
    _child(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
