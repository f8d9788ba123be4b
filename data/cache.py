"""Fill the cache: encode the latents and text embeddings that it lacks, once, so that training reads them every epoch.

The encoders are passed as arguments, so that this module depends on neither diffusers nor transformers.
Shapes: B batch, C channels, H x W, T tokens, D embedding.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.data.buckets import Bucket
from safelight.data.filling import Progress, fill, loads_nothing, num_threads
from safelight.data.images import MAX_FILE_BYTES, RejectedImage, crop_pixels, decode
from safelight.data.index import TOKEN_DTYPE, TOKENS
from safelight.data.photo import Photo
from safelight.data.samples import (
    Crop,
    Sample,
    empty_text_key,
    latent_key,
    plan_samples,
    sample_captions,
    text_key,
    token_key,
)
from safelight.data.shards import Cache, CorruptRow
from safelight.errors import UserError
from safelight.untrusted import UnsafeFile, read_bytes

__all__ = [
    "Cache",
    "CorruptRow",
    "Crop",
    "LatentEncoder",
    "Sample",
    "TextEncoder",
    "decode_photo",
    "empty_text_key",
    "encode_latent",
    "fill_latents",
    "fill_texts",
    "latent_key",
    "latent_kind",
    "latent_shape",
    "plan_samples",
    "sample_captions",
    "text_key",
]


class LatentEncoder(Protocol):
    """A frozen VAE. fingerprint: hash of its weights and precision. factor: pixels per latent, along each side."""

    fingerprint: str
    latent_channels: int
    factor: int
    has_posterior: bool

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (mean, logvar or None), each (B, C, H / factor, W / factor), without the VAE's scaling factor.

        pixels_BCHW: float32 in [-1, 1].
        """
        ...


class TextEncoder(Protocol):
    """A frozen text encoder. fingerprint: hash of its weights, tokenizer and clip skip. row_shape: of a text's row.

    tokenizer_fingerprint, token_shape: of what a text is as token ids.
    """

    fingerprint: str
    row_shape: tuple[int, ...]
    tokenizer_fingerprint: str
    token_shape: tuple[int, ...]

    def encode(self, captions: list[str]) -> Tensor:
        """Return the embeddings, (B, *row_shape)."""
        ...

    def token_ids(self, captions: list[str]) -> Tensor:
        """Return the token ids, (B, *token_shape), int64."""
        ...


@dataclass(frozen=True)
class _Job:
    """A latent row to encode."""

    photo: Photo
    crop: Crop
    bucket: Bucket


def read_stored(path: Path, sha256: str) -> bytes:
    """Return the bytes of a dataset's file. sha256: its hash when it was prepared.

    Raises UserError if it cannot be read, is no regular file, is larger than any that is prepared, or changed since.
    The caller has checked that no link leads out of the dataset.
    """
    try:
        content = read_bytes(path, MAX_FILE_BYTES)
    except (OSError, UnsafeFile) as error:
        raise _unreadable(path, error) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} changed since it was prepared; run `safelight prepare` again")
    return content


def _unreadable(path: Path, error: OSError | UnsafeFile) -> UserError:
    what = str(error) if isinstance(error, UnsafeFile) else f"{path} cannot be read ({error.strerror})"
    return UserError(f"{what}; run `safelight prepare` again to make it anew")


def check_files(cache: Cache, dataset: Path, files: dict[str, str]) -> None:
    """Raise UserError if a file is missing or changed since it was prepared, even if its rows are cached.

    files: path inside the dataset -> SHA-256. A file whose size and modification time are those of the last check
    counts as unchanged, so starting a run costs one stat per file instead of reading them all, on all threads.
    """
    seen = cache.seen_photos(list(files))
    fresh = {}
    for file, sha256 in files.items():
        path = Path(dataset) / file
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        now = (sha256, status.st_size, status.st_mtime_ns)
        if seen.get(file) != now or not stat.S_ISREG(status.st_mode):
            fresh[file] = now

    def check(file: str) -> None:
        read_stored(Path(dataset) / file, files[file])

    if fresh:
        with ThreadPoolExecutor(num_threads(), thread_name_prefix="check-photos") as executor:
            # ends at the first error; the others are cancelled
            for _ in executor.map(check, fresh):
                pass
        cache.note_photos(fresh)


def _latent_jobs(
    cache: Cache, samples: Sequence[Sample], encoder: LatentEncoder
) -> list[tuple[Bucket, dict[str, _Job]]]:
    """Return each bucket's rows by key, with the variants of a photo next to each other so that it is decoded once."""
    by_bucket: dict[Bucket, dict[str, _Job]] = {}
    for sample in samples:
        for key, crop in zip(sample.latent_keys, sample.crops, strict=True):
            if key != latent_key(sample.photo, crop, sample.bucket, encoder.fingerprint, cache.dtype):
                raise ValueError(
                    "the samples were planned for a VAE or dtype other than "
                    f"{encoder.fingerprint[:16]}, {cache.dtype}; "
                    "plan them with this encoder's fingerprint and the cache's dtype"
                )
            by_bucket.setdefault(sample.bucket, {}).setdefault(key, _Job(sample.photo, crop, sample.bucket))
    return sorted(by_bucket.items(), key=lambda item: item[0])


def latent_kind(encoder: LatentEncoder) -> str:
    """Return the kind of the latent rows of an encoder."""
    return "posterior" if encoder.has_posterior else "latent"


def decode_photo(dataset: Path, photo: Photo, stop: threading.Event | None = None) -> Image.Image:
    """Return a photo of a dataset, RGB. Raises UserError as `read_stored`, and if it differs from its manifest entry.

    stop: see `images.decode`, which bounds the memory that all threads take together.
    """
    path = Path(dataset) / photo.file
    content = read_stored(path, photo.sha256)
    try:
        image = decode(content, stop=stop).image
    except RejectedImage as error:
        if isinstance(error.__cause__, MemoryError):
            # the picture is sound
            raise error.__cause__ from error
        raise UserError(f"{path}: {error}; run `safelight prepare` again") from error
    if image.size != (photo.width, photo.height):
        raise UserError(
            f"{path} is {image.size[0]} x {image.size[1]} px, but the manifest says {photo.width} x "
            f"{photo.height}; run `safelight prepare` again"
        )
    return image


def _load_pixels(dataset: Path, executor: Executor, stop: threading.Event, jobs: list[_Job]) -> Callable[[], Tensor]:
    """Start to load the pixels of a batch, (B, 3, H, W), a photo to a thread; return a function that waits for them.

    That raises UserError if a photo differs from its manifest entry.
    """
    bucket = jobs[0].bucket
    pixels_BCHW = np.empty((len(jobs), 3, bucket.height, bucket.width), np.float32)

    def load(places: list[int]) -> None:
        image = decode_photo(dataset, jobs[places[0]].photo, stop)
        for place in places:
            crop = jobs[place].crop
            pixels_BCHW[place] = crop_pixels(image, crop.box, (bucket.width, bucket.height), crop.is_flipped)

    places_of: dict[str, list[int]] = {}
    for place, job in enumerate(jobs):
        places_of.setdefault(job.photo.file, []).append(place)
    loading = [executor.submit(load, places) for places in places_of.values()]

    def wait() -> Tensor:
        for future in loading:
            future.result()
        return torch.from_numpy(pixels_BCHW)

    return wait


def _latent_rows(encoder: LatentEncoder, pixels_BCHW: Tensor, jobs: list[_Job]) -> np.ndarray:
    """Return the batch's rows, (B, C or 2C, H, W) float32, 2C with a posterior: mean, then logvar.

    Raises ValueError if the encoder returns a wrong shape or values that are not finite.
    """
    mean, logvar = encoder.encode(pixels_BCHW)
    batch, _, height, width = pixels_BCHW.shape
    expected = (batch, encoder.latent_channels, height // encoder.factor, width // encoder.factor)
    parts = [mean] if logvar is None else [mean, logvar]
    if (logvar is not None) != encoder.has_posterior or any(tuple(part.shape) != expected for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"the VAE returned latents of shapes {shapes} for {height} x {width} px, expected {expected}")
    rows = torch.cat(parts, dim=1).detach().to("cpu", torch.float32).numpy()
    for job, row in zip(jobs, rows, strict=True):
        if not np.isfinite(row).all():
            raise UserError(
                f"the autoencoder returned values that are not finite for {job.photo.file}, so that nothing could be "
                "learned from it; set model.vae to another one"
            )
    return rows


def latent_shape(encoder: LatentEncoder, bucket: Bucket) -> tuple[int, int, int]:
    """Return the shape of the latent rows of a bucket, (C or 2C, H, W)."""
    channels = encoder.latent_channels * (2 if encoder.has_posterior else 1)
    return channels, bucket.height // encoder.factor, bucket.width // encoder.factor


def read_pixels(dataset: Path, sample: Sample, variant: int = 0) -> Tensor:
    """Return a crop as an encoder is given it, (3, H, W) in [-1, 1]. Raises UserError for a photo that changed."""
    bucket, crop = sample.bucket, sample.crops[variant]
    image = decode_photo(dataset, sample.photo)
    return torch.from_numpy(crop_pixels(image, crop.box, (bucket.width, bucket.height), crop.is_flipped))


def encode_latent(dataset: Path, sample: Sample, variant: int, encoder: LatentEncoder) -> np.ndarray:
    """Return one latent row as `fill_latents` computes it, float32. Raises UserError for a photo that changed."""
    pixels = read_pixels(dataset, sample, variant)
    return _latent_rows(encoder, pixels[None], [_Job(sample.photo, sample.crops[variant], sample.bucket)])[0]


def fill_latents(
    cache: Cache,
    dataset: Path,
    samples: Sequence[Sample],
    encoder: LatentEncoder,
    batch_size: int,
    progress: Progress | None = None,
) -> int:
    """Encode the latent rows of the samples that are missing from the cache or damaged; return how many were added.

    Other processes may do the same at the same time: each encodes a part (see `fill`).
    Raises ValueError if a photo changed since it was prepared (even if its rows are cached), if the samples were
    planned for another VAE or dtype, and if latents are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; use 4")
    dataset = Path(dataset)
    check_files(cache, dataset, {sample.photo.file: sample.photo.sha256 for sample in samples})
    groups = _latent_jobs(cache, samples, encoder)
    for bucket, jobs in groups:
        cache.drop_damaged(list(jobs), latent_kind(encoder), latent_shape(encoder, bucket))
    return fill(
        cache,
        latent_kind(encoder),
        [jobs for _, jobs in groups],
        batch_size,
        partial(_load_pixels, dataset),
        partial(_latent_rows, encoder),
        progress,
    )


def fill_texts(
    cache: Cache, captions: Iterable[str], encoder: TextEncoder, batch_size: int, progress: Progress | None = None
) -> int:
    """Encode the captions, and the empty one, that are missing from the cache or damaged; return how many were added.

    Other processes may do the same at the same time: each encodes a part (see `fill`). Raises ValueError if the shape
    of the embeddings is not (B, *row_shape).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; use 16")
    caption_of_key = {text_key(text, encoder.fingerprint, cache.dtype): text for text in ["", *captions]}
    shape = tuple(encoder.row_shape)
    cache.drop_damaged(list(caption_of_key), "text", shape)

    def encode(_: None, texts: list[str]) -> np.ndarray:
        embeddings = encoder.encode(texts)
        if tuple(embeddings.shape) != (len(texts), *shape):
            found, expected = tuple(embeddings.shape), (len(texts), *shape)
            raise ValueError(f"the text encoder returned embeddings of shape {found}, expected {expected}")
        return embeddings.detach().to("cpu", torch.float32).numpy()

    return fill(cache, "text", [caption_of_key], batch_size, loads_nothing, encode, progress)


def fill_tokens(cache: Cache, captions: Iterable[str], encoder: TextEncoder, batch_size: int) -> int:
    """Store the token ids of the captions, and of the empty one, that the cache lacks; return how many were added."""
    caption_of_key = {token_key(text, encoder.tokenizer_fingerprint): text for text in ["", *captions]}
    cache.drop_damaged(list(caption_of_key), TOKENS, encoder.token_shape)

    def encode(_: None, texts: list[str]) -> np.ndarray:
        return encoder.token_ids(texts).numpy().astype(TOKEN_DTYPE)

    return fill(cache, TOKENS, [caption_of_key], batch_size, loads_nothing, encode)
