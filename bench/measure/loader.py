"""`safelight bench loader`: load an epoch of batches from our cache, from one file per row, or by decoding photographs.

The alternatives are written for this comparison: one `.npz` per row as in kohya's scripts, one `.pt` per row as in
OneTrainer, and decoding and cropping as in trainers without a cache (which also have to encode). Files are in the page
cache, as in every epoch but the first.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from safelight.bench.core.harness import percentiles
from safelight.bench.core.results import make_record
from safelight.bench.recipes.workload import SEED, fill_random_cache, random_rows
from safelight.data.batches import RowSource, iterate, load_batch
from safelight.data.cache import Cache
from safelight.data.epochs import plan_epoch
from safelight.data.images import crop_pixels, decode
from safelight.errors import UserError
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.base import resolve_base
from safelight.units import GIB

NUM_PICTURES = 16
MEMCPY_BYTES = 2**27

Epoch = Callable[[], Iterator[object]]


def row_bytes(base: str, side: int) -> int:
    """Return the bytes of a row in the cache: posterior and embedding in float16."""
    posterior, text = random_rows(1, base, side)
    return 2 * (posterior.size + text.size)


def _cache_epochs(folder: Path, num: int, base: str, side: int, batch_size: int, stack: ExitStack) -> dict[str, Epoch]:
    samples = fill_random_cache(folder, num, base, side)
    cache = stack.enter_context(Cache(folder))
    rows = RowSource(cache, samples, "text-empty", lambda text_BTD, _: TextConditioning(text_BTD))
    plan = plan_epoch(samples, seed=SEED, epoch=0, batch_size=batch_size, caption_dropout=0.0)
    return {
        "cache": lambda: (load_batch(rows, part) for part in plan),
        "cache-ahead": lambda: iterate(rows, plan),
    }


def _stacked(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(np.stack(part).astype(np.float32)) for part in zip(*rows, strict=True))


def _file_epoch(folder: Path, kind: str, num: int, base: str, side: int, batch_size: int) -> Epoch:
    """Write one file per row and return an epoch that reads them in shuffled order. kind: npz or pt."""
    folder.mkdir()
    posteriors, texts = (x.astype(np.float16) for x in random_rows(min(num, 256), base, side))
    files = [folder / f"{n:06d}.{kind}" for n in range(num)]
    for n, file in enumerate(files):
        latents, text = posteriors[n % len(posteriors)], texts[n % len(texts)]
        if kind == "npz":
            np.savez(file, latents=latents, text=text)
        else:
            torch.save({"latents": torch.from_numpy(latents), "text": torch.from_numpy(text)}, file)

    def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
        if kind == "npz":
            with np.load(file) as row:
                return row["latents"], row["text"]
        row = torch.load(file, weights_only=True)
        return row["latents"].numpy(), row["text"].numpy()

    order = np.random.default_rng(SEED).permutation(num)
    return lambda: (
        _stacked([read(files[n]) for n in order[start : start + batch_size]]) for start in range(0, num, batch_size)
    )


def _decode_epoch(folder: Path, num: int, side_px: int, batch_size: int) -> Epoch:
    """Write JPEGs, a quarter larger than they are trained at, and return an epoch that decodes and crops them."""
    folder.mkdir()
    generator = np.random.default_rng(SEED)
    large = side_px * 5 // 4
    pictures = []
    for n in range(min(num, NUM_PICTURES)):
        # smooth noise compresses like photographs
        coarse = generator.integers(0, 256, (large // 8, large // 8, 3), np.uint8)
        file = folder / f"{n:02d}.jpg"
        Image.fromarray(coarse).resize((large, large), Image.Resampling.BICUBIC).save(file, quality=92)
        pictures.append(file)
    box = ((large - side_px) // 2,) * 2 + ((large + side_px) // 2,) * 2

    def read(n: int) -> np.ndarray:
        content = pictures[n % len(pictures)].read_bytes()
        return crop_pixels(decode(content).image, box, (side_px, side_px), False)

    return lambda: (
        torch.from_numpy(np.stack([read(n) for n in range(start, min(start + batch_size, num))]))
        for start in range(0, num, batch_size)
    )


def memcpy_gb_per_s() -> float:
    """Return the rate of a memory copy in GB/s, the upper limit of any loader."""
    source, target = np.ones(MEMCPY_BYTES, np.uint8), np.empty(MEMCPY_BYTES, np.uint8)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return MEMCPY_BYTES / percentiles(seconds)[1] / 1e9


def bench_loader(
    base: str,
    latent_size: int,
    num: int,
    batch_size: int,
    sources: tuple[str, ...],
    repeats: int,
    folder: Path | None = None,
) -> list[dict]:
    """Return a result line for each source: rows/s, GB/s of rows delivered, wall and CPU milliseconds per batch.

    One warm-up epoch, then `repeats` epochs of all sources interleaved. Raises UserError if the disk is too small.
    """
    side = latent_size or resolve_base(base).config_of("unet")["sample_size"]
    stored = row_bytes(base, side)
    need = num * stored * sum(any(s.startswith(kind) for s in sources) for kind in ("cache", "npz", "pt"))
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if need * 1.2 > free:
        raise UserError(
            f"{num} rows need {need * 1.2 / GIB:.0f} GiB of disk and {free / GIB:.0f} GiB are free; "
            "lower --rows, or name fewer --sources"
        )
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        epochs: dict[str, Epoch] = {}
        if any(s.startswith("cache") for s in sources):
            epochs |= _cache_epochs(work / "cache", num, base, side, batch_size, stack)
        for kind in ("npz", "pt"):
            if kind in sources:
                epochs[kind] = _file_epoch(work / kind, kind, num, base, side, batch_size)
        if "decode" in sources:
            epochs["decode"] = _decode_epoch(work / "photos", num, 8 * side, batch_size)
        wall, cpu = _time({name: epochs[name] for name in sources}, repeats)
    num_batches, ceiling = -(-num // batch_size), memcpy_gb_per_s()
    records = []
    for name in sources:
        seconds = percentiles(wall[name])[1]
        # a batch delivers float32: rows, or pixels for "decode"
        delivered = num * (3 * (8 * side) ** 2 * 4 if name == "decode" else 2 * stored)
        figures = {
            "rows_per_s": round(num / seconds, 1),
            "gb_per_s": round(delivered / seconds / 1e9, 3),
            "memcpy_gb_per_s": round(ceiling, 2),
            "wall_ms_per_batch": round(1e3 * seconds / num_batches, 3),
            "cpu_ms_per_batch": round(1e3 * percentiles(cpu[name])[1] / num_batches, 3),
        }
        config = {
            "source": name,
            "base": base,
            "latent_size": side,
            "rows": num,
            "batch_size": batch_size,
            "repeats": repeats,
        }
        records.append(make_record("loader", config, figures, torch.device("cpu")))
    return records


def _time(epochs: dict[str, Epoch], repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return (wall, CPU) seconds of each epoch by source, without the first epoch, which fills the page cache."""
    wall: dict[str, list[float]] = {name: [] for name in epochs}
    cpu: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(repeats + 1):
        for name, epoch in epochs.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            for _ in epoch():
                pass
            if repeat > 0:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - began_cpu)
    return wall, cpu
