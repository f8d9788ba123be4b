"""Loss masks: greyscale pictures of a photo's size whose white parts are learned and whose black parts are not.

The cache holds a mask at the size of the latents, cropped and mirrored exactly as the variant of its photo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from safelight.data.buckets import Bucket
from safelight.data.cache import check_files, read_stored
from safelight.data.filling import Progress, fill
from safelight.data.images import RejectedImage, decode_mask
from safelight.data.photo import Photo
from safelight.data.samples import Crop, Sample
from safelight.data.shards import Cache
from safelight.errors import UserError

_ROWS_PER_WRITE = 256


def _shares(num_pixels: int, num_cells: int) -> np.ndarray:
    """Return how much each pixel of a line counts in the means of equal cells, (num_cells, num_pixels) float64."""
    edges, pixels = np.linspace(0, num_pixels, num_cells + 1)[:, None], np.arange(num_pixels)
    overlaps = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return overlaps.clip(min=0) * (num_cells / num_pixels)


def mask_row(mask: Image.Image, crop: Crop, bucket: Bucket, factor: int) -> np.ndarray:
    """Return a crop of a greyscale mask averaged over the area of each latent pixel: (1, H, W) float32, 0 to 1.

    factor: pixels per latent, along each side.
    """
    pixels = np.asarray(mask.crop(crop.box), dtype=np.float64) / 255
    height, width = pixels.shape
    row = _shares(height, bucket.height // factor) @ pixels @ _shares(width, bucket.width // factor).T
    # rounded, so that a white mask is exactly 1, as no mask is
    row = row.round(6).astype(np.float32)
    return (row[:, ::-1] if crop.is_flipped else row)[None]


def read_mask(dataset: Path, photo: Photo, stop: threading.Event | None = None) -> Image.Image:
    """Return the mask of a photo of a dataset, 8-bit grey. Raises UserError if it is missing, damaged or changed."""
    path = Path(dataset) / photo.mask
    try:
        mask = decode_mask(read_stored(path, photo.mask_sha256), stop)
    except RejectedImage as error:
        raise UserError(f"{path}: {error}; run `safelight prepare` again") from error
    if mask.size != (photo.width, photo.height):
        raise UserError(
            f"{path} is {mask.size[0]} x {mask.size[1]} px, but its photo is {photo.width} x {photo.height}; run "
            "`safelight prepare` again"
        )
    return mask


def encode_mask(dataset: Path, sample: Sample, variant: int, factor: int) -> np.ndarray:
    """Return one mask row as `fill_masks` computes it. Raises UserError as `read_mask`."""
    return mask_row(read_mask(dataset, sample.photo), sample.crops[variant], sample.bucket, factor)


def fill_masks(
    cache: Cache,
    dataset: Path,
    samples: Sequence[Sample],
    factor: int,
    progress: Progress | None = None,
) -> int:
    """Store the mask rows of the samples that are missing from the cache or damaged; return how many were added.

    factor: pixels per latent. progress: as `fill` calls it. Raises UserError if a mask changed since it was prepared,
    even if its rows are cached.
    """
    masked = [sample for sample in samples if sample.mask_keys]
    check_files(cache, dataset, {sample.photo.mask: sample.photo.mask_sha256 for sample in masked})
    by_bucket: dict[Bucket, dict[str, tuple[Sample, int]]] = {}
    for sample in masked:
        rows = by_bucket.setdefault(sample.bucket, {})
        for variant, key in enumerate(sample.mask_keys):
            rows.setdefault(key, (sample, variant))
    for bucket, rows in by_bucket.items():
        cache.drop_damaged(list(rows), "mask", (1, bucket.height // factor, bucket.width // factor))
    groups, load = list(by_bucket.values()), partial(_load_rows, dataset, factor)
    return fill(cache, "mask", groups, _ROWS_PER_WRITE, load, lambda rows, _: np.stack(rows), progress)


def _load_rows(
    dataset: Path, factor: int, executor: Executor, stop: threading.Event, wanted: list[tuple[Sample, int]]
) -> Callable[[], list[np.ndarray]]:
    """Start to make mask rows, a photo to a thread; return a function that waits for them."""

    def load(variants: list[tuple[Sample, int]]) -> list[np.ndarray]:
        mask = read_mask(dataset, variants[0][0].photo, stop)
        return [mask_row(mask, sample.crops[variant], sample.bucket, factor) for sample, variant in variants]

    loading = [executor.submit(load, list(group)) for _, group in groupby(wanted, key=lambda row: row[0].photo.mask)]
    return lambda: [row for future in loading for row in future.result()]
