"""`safelight bench cache`: what opening and reading a cache cost as it grows, and filling it against the encoder alone.

Rows are small, so that a million of them fit the disk: what grows with their number is the index. Filling decodes and
crops generated photographs for encoders that take their time and leave the processor free, as a GPU does, and for two
that compute on the processor, which decoding needs as well: one for a given time, and the tiny base's autoencoder.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.bench.core.harness import percentiles
from safelight.bench.core.results import make_record
from safelight.bench.recipes.workload import SEED, Workload, config_of
from safelight.data.batches import RowSource, load_batch
from safelight.data.buckets import Bucket
from safelight.data.cache import Cache, LatentEncoder, fill_latents
from safelight.data.epochs import MicroBatch, SampleRef
from safelight.data.images import crop_pixels
from safelight.data.photo import Photo
from safelight.data.placement import Placement
from safelight.data.samples import Crop, Sample, plan_samples
from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.device import PRECISIONS
from safelight.trainer.models.latent_codec import load_codec
from safelight.units import GIB, MIB

# (2C, H, W) of the latents; their photograph has 32 x 32 px
ROW_SHAPE = (8, 4, 4)
ROWS_AT_ONCE = 20_000
# of rows, in the index and in the shards
_BYTES_PER_ROW = 520
NUM_BATCHES = 200
PHOTO_PX, CROP_PX = 640, 256
CPU = torch.device("cpu")


class WaitingEncoder:
    """An autoencoder that only takes a given time for each picture."""

    fingerprint, latent_channels, factor, has_posterior = "waiting", 4, 8, True

    def __init__(self, seconds: float):
        self.seconds = seconds

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        self._take(self.seconds * len(pixels_BCHW))
        batch, _, height, width = pixels_BCHW.shape
        mean = torch.zeros(batch, self.latent_channels, height // self.factor, width // self.factor)
        return mean, mean - 1

    def _take(self, seconds: float) -> None:
        time.sleep(seconds)


class ComputingEncoder(WaitingEncoder):
    """An autoencoder that computes for a given time of one processor for each picture."""

    def _take(self, seconds: float) -> None:
        end = time.thread_time() + seconds
        # large enough that the interpreter is free most of the time, as it is for a real one
        values = np.ones((256, 256), np.float32)
        while time.thread_time() < end:
            values @ values


class _Clocked:
    """An encoder whose calls are timed. began, ended: of the first and the last; busy_s: within all."""

    def __init__(self, encoder: LatentEncoder):
        self._encoder = encoder
        self.began = self.ended = self.busy_s = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._encoder, name)

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        began = time.perf_counter()
        self.began = self.began or began
        latents = self._encoder.encode(pixels_BCHW)
        self.ended = time.perf_counter()
        self.busy_s += self.ended - began
        return latents


def _key(number: int) -> str:
    # spread over the index as those of real rows are
    return hashlib.sha256(str(number).encode()).hexdigest()


def _make_rows(folder: Path, num: int) -> None:
    rows = np.random.default_rng(SEED).standard_normal((min(num, ROWS_AT_ONCE), *ROW_SHAPE), np.float32)
    with Cache(folder) as cache:
        for start in range(0, num, ROWS_AT_ONCE):
            keys = [_key(n) for n in range(start, min(start + ROWS_AT_ONCE, num))]
            cache.append("posterior", keys, rows[: len(keys)])
        cache.append("text", ["text-empty"], np.zeros((1, 2, 4)))


def _random_batches(num: int, batch_size: int) -> tuple[list[Sample], list[MicroBatch]]:
    """Return samples drawn from all rows, and the batches that they make."""
    bucket, crop = Bucket(32, 32), Crop((0, 0, 32, 32), False)
    drawn = np.random.default_rng(SEED).integers(0, num, NUM_BATCHES * batch_size)
    samples = [
        Sample(
            Photo(f"{n}.png", f"{n:064x}"[::-1], 32, 32, ("",), "random", "random"),
            bucket,
            (_key(n),),
            ("text-empty",),
            (crop,),
            ("",),
        )
        for n in drawn.tolist()
    ]
    refs = [SampleRef(sample.sample_id, place, 0, 0, 0) for place, sample in enumerate(samples)]
    starts = range(0, len(refs), batch_size)
    return samples, [MicroBatch(bucket, tuple(refs[start : start + batch_size])) for start in starts]


def _read_calls() -> int | None:
    """Return how often this process has read from a file; None if the system does not count it."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("syscr")), None)


def _growth_figures(folder: Path, num: int, batch_size: int, repeats: int) -> dict:
    opened, opened_cpu = [], []
    for _ in range(repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        with closing(Cache(folder)):
            opened.append(time.perf_counter() - began)
            opened_cpu.append(time.process_time() - began_cpu)
    samples, batches = _random_batches(num, batch_size)
    with Cache(folder) as cache:
        rows = RowSource(cache, samples, "text-empty", lambda text_BTD, _: TextConditioning(text_BTD))
        wall, cpu, calls = [], [], []
        # the first pass verifies checksums
        for is_timed in (False, True):
            calls_before = _read_calls()
            for batch in batches:
                began, began_cpu = time.perf_counter(), time.process_time()
                load_batch(rows, batch)
                if is_timed:
                    wall.append(time.perf_counter() - began)
                    cpu.append(time.process_time() - began_cpu)
            if calls_before is not None:
                calls = [(_read_calls() - calls_before) / len(batches)]
        index_bytes = cache.index_bytes()
    return {
        "open_ms": round(1e3 * percentiles(opened)[1], 2),
        "open_cpu_ms": round(1e3 * percentiles(opened_cpu)[1], 2),
        "read_ms_per_batch": round(1e3 * percentiles(wall)[1], 3),
        "read_cpu_ms_per_batch": round(1e3 * percentiles(cpu)[1], 3),
        **({"read_calls_per_batch": round(calls[0], 1)} if calls else {}),
        "index_mib": round(index_bytes / MIB, 2),
    }


def bench_growth(sizes: tuple[int, ...], batch_size: int, repeats: int, folder: Path | None = None) -> list[dict]:
    """Return a result line for each number of rows. Raises UserError if the disk is too small."""
    need, free = max(sizes) * _BYTES_PER_ROW, shutil.disk_usage(folder or tempfile.gettempdir()).free
    if 1.2 * need > free:
        raise UserError(
            f"{max(sizes)} rows need {1.2 * need / GIB:.1f} GiB of disk and {free / GIB:.1f} GiB are free; lower --rows"
        )
    records = []
    for num in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _make_rows(Path(work), num)
            figures = _growth_figures(Path(work), num, batch_size, repeats)
        config = {"part": "open and read", "rows": num, "batch_size": batch_size, "repeats": repeats}
        records.append(make_record("cache", config, figures, CPU))
    return records


def _make_photos(folder: Path, num: int, photo_px: int = PHOTO_PX, crop_px: int = CROP_PX) -> list[Placement]:
    """Write photographs and return them as a prepared dataset has them, all in one bucket."""
    (folder / "images").mkdir()
    generator = np.random.default_rng(SEED)
    placed = []
    for n in range(num):
        # smooth noise compresses like photographs
        coarse = generator.integers(0, 256, (photo_px // 8, photo_px // 8, 3), np.uint8)
        path = folder / "images" / f"{n}.jpg"
        Image.fromarray(coarse).resize((photo_px, photo_px), Image.Resampling.BICUBIC).save(path, quality=92)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        photo = Photo(f"images/{n}.jpg", sha256, photo_px, photo_px, ("",), path.name, "")
        placed.append(Placement(photo, Bucket(crop_px, crop_px)))
    return placed


def _seconds_alone(encoder: LatentEncoder, pixels_BCHW: Tensor, batch_size: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(pixels_BCHW), batch_size):
        encoder.encode(pixels_BCHW[start : start + batch_size])
    return time.perf_counter() - began


def _fill_once(
    cache: Cache, dataset: Path, samples: list[Sample], encoder: LatentEncoder, batch_size: int
) -> dict[str, float]:
    clocked = _Clocked(encoder)
    began, began_cpu = time.perf_counter(), time.process_time()
    fill_latents(cache, dataset, samples, clocked, batch_size)
    ended, cpu_s = time.perf_counter(), time.process_time() - began_cpu
    return {
        "fill_s": ended - began,
        "fill_cpu_s": cpu_s,
        "before_s": clocked.began - began,
        "between_s": clocked.ended - clocked.began - clocked.busy_s,
        "after_s": ended - clocked.ended,
    }


def bench_filling(num: int, batch_size: int, repeats: int, folder: Path | None = None) -> list[dict]:
    """Return a result line for each encoder: seconds alone and filling a cache, interleaved, and their ratio.

    Where the encoder idles while a cache is filled: before_s until its first batch is loaded, between_s between two
    batches, after_s until the last is written.
    """
    config = Config()
    config.model.base = "tiny"
    encoders = {
        "tiny": load_codec(config, resolve_base("tiny"), CPU),
        "waiting 100 ms": WaitingEncoder(0.1),
        "waiting 25 ms": WaitingEncoder(0.025),
        "computing 25 ms": ComputingEncoder(0.025),
    }
    return _filled_with(encoders, num, batch_size, repeats, CPU, PHOTO_PX, CROP_PX, folder)


def bench_encoding(work: Workload, num: int, batch_size: int, repeats: int) -> dict:
    """Return the result line of a base's autoencoder on the workload's device: alone, and filling a cache.

    num: of photographs. They are a quarter larger along each side than their crops, which have the workload's size.
    """
    work = work.resolved()
    config, device = config_of(work), torch.device(work.device)
    codec, crop_px = load_codec(config, resolve_base(work.base), device), config.data.max_resolution
    (record,) = _filled_with({work.base: codec}, num, batch_size, repeats, device, crop_px * 5 // 4, crop_px)
    dtype = PRECISIONS[codec.dtype]
    return {**record, "config": {**record["config"], "precision": dtype, "device": work.device}}


def _filled_with(
    encoders: dict[str, LatentEncoder],
    num: int,
    batch_size: int,
    repeats: int,
    device: torch.device,
    photo_px: int,
    crop_px: int,
    folder: Path | None = None,
) -> list[dict]:
    """Return a result line for each encoder, as `bench_filling` describes them."""
    records = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        dataset = Path(name)
        placed = _make_photos(dataset, num, photo_px, crop_px)
        box = (0, 0, photo_px, photo_px)
        pixels = [
            crop_pixels(Image.open(dataset / p.photo.file), box, (crop_px, crop_px), False) for p in placed[:batch_size]
        ]
        pixels_BCHW = torch.from_numpy(np.stack([pixels[n % len(pixels)] for n in range(num)]))
        for name, encoder in encoders.items():
            samples = plan_samples(
                placed,
                variants=1,
                crop_jitter=0.1,
                flip_p=0.5,
                seed=SEED,
                vae_fingerprint=encoder.fingerprint,
                text_fingerprint="",
                dtype="float16",
            )
            alone, runs = [], []
            for repeat in range(repeats + 1):
                alone_s = _seconds_alone(encoder, pixels_BCHW, batch_size)
                # a base may be a path
                with Cache(dataset / f"cache-{len(records)}-{repeat}") as cache:
                    run = _fill_once(cache, dataset, samples, encoder, batch_size)
                # the first is a warm-up
                if repeat:
                    alone.append(alone_s), runs.append(run)
            ratios = [alone_s / run["fill_s"] for alone_s, run in zip(alone, runs, strict=True)]
            middle = {part: percentiles([run[part] for run in runs])[1] for part in runs[0]}
            alone_s = percentiles(alone)[1]
            figures = {
                "alone_s": round(alone_s, 3),
                **{part: round(seconds, 3) for part, seconds in middle.items()},
                "of_encoder_alone": round(percentiles(ratios)[1], 3),
                "encoded_images_per_s": round(num / alone_s, 3),
                "filled_images_per_s": round(num / middle["fill_s"], 3),
            }
            settings = {"part": "fill", "encoder": name, "photos": num, "batch_size": batch_size, "repeats": repeats}
            config = {**settings, "photo_px": photo_px, "crop_px": crop_px}
            records.append(make_record("cache", config, figures, device))
    return records
