"""Loss masks: greyscale pictures of a photo's size whose white parts are learned and whose black parts are not.

The cache holds a mask at the size of the latents, cropped and mirrored exactly as the variant of its photo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from safelight.data.buckets import Bucket
from safelight.data.cache import check_files, read_stored
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


def read_mask(dataset: Path, photo: Photo) -> Image.Image:
    """Return the mask of a photo of a dataset, 8-bit grey. Raises UserError if it is missing, damaged or changed."""
    path = Path(dataset) / photo.mask
    try:
        mask = decode_mask(read_stored(path, photo.mask_sha256))
    except RejectedImage as error:
        raise UserError(f"{path}: {error}; run `safelight prepare` again") from error
    if mask.size != (photo.width, photo.height):
        raise UserError(
            f"{path} is {mask.size[0]} x {mask.size[1]} px, but its photo is {photo.width} x {photo.height}; run "
            "`safelight prepare` again"
        )
    return mask


def fill_masks(
    cache: Cache,
    dataset: Path,
    samples: Sequence[Sample],
    factor: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Store the mask rows of the samples that are missing from the cache or damaged; return how many were added.

    factor: pixels per latent. Claims the cache if there are any; the caller releases it. progress(rows done, rows to
    store) is called after each write. Raises UserError if a mask changed since it was prepared, even if its rows are
    cached.
    """
    masked = [sample for sample in samples if sample.mask_keys]
    check_files(cache, dataset, {sample.photo.mask: sample.photo.mask_sha256 for sample in masked})
    by_bucket: dict[Bucket, list[Sample]] = {}
    for sample in masked:
        by_bucket.setdefault(sample.bucket, []).append(sample)
    for bucket, group in by_bucket.items():
        keys = [key for sample in group for key in sample.mask_keys]
        cache.drop_damaged(keys, "mask", (1, bucket.height // factor, bucket.width // factor))
    missing = set(cache.missing([key for sample in masked for key in sample.mask_keys]))
    num_missing = len(missing)
    if missing:
        cache.claim()
    num_done = 0
    for group in by_bucket.values():
        rows: dict[str, np.ndarray] = {}
        for number, sample in enumerate(group, 1):
            crops = {k: c for k, c in zip(sample.mask_keys, sample.crops, strict=True) if k in missing}
            if crops:
                mask = read_mask(dataset, sample.photo)
                rows |= {key: mask_row(mask, crop, sample.bucket, factor) for key, crop in crops.items()}
                missing -= crops.keys()
            if rows and (len(rows) >= _ROWS_PER_WRITE or number == len(group)):
                num_done += cache.append("mask", list(rows), np.stack(list(rows.values())))
                rows = {}
                if progress is not None:
                    progress(num_done, num_missing)
    return num_done
