"""Fill the cache: encode the latents and text embeddings that it lacks, once, so that training reads them every epoch.

The encoders are passed as arguments, so that this module depends on neither diffusers nor transformers.
Shapes: B batch, C channels, H x W, T tokens, D embedding.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.data.buckets import Bucket
from safelight.data.images import MAX_FILE_BYTES, RejectedImage, crop_pixels, decode
from safelight.data.photo import Photo
from safelight.data.samples import Crop, Sample, empty_text_key, latent_key, plan_samples, sample_captions, text_key
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

_BATCHES_AHEAD = 2

Progress = Callable[[int, int], None]


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
    """A frozen text encoder. fingerprint: hash of its weights, tokenizer and clip skip."""

    fingerprint: str
    num_tokens: int
    embedding_dim: int

    def encode(self, captions: list[str]) -> Tensor:
        """Return the embeddings, (B, T, D)."""
        ...


@dataclass(frozen=True)
class _Job:
    """A latent row to encode."""

    key: str
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
    counts as unchanged, so starting a run costs one stat per file instead of reading them all.
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
            read_stored(path, sha256)
            fresh[file] = now
    if fresh:
        cache.note_photos(fresh)


def _missing_jobs(cache: Cache, samples: Sequence[Sample], encoder: LatentEncoder) -> list[_Job]:
    """Return the rows to encode, with the variants of a photo next to each other so that it is decoded once."""
    jobs = {}
    for sample in samples:
        for key, crop in zip(sample.latent_keys, sample.crops, strict=True):
            if key != latent_key(sample.photo, crop, sample.bucket, encoder.fingerprint, cache.dtype):
                raise ValueError(
                    "the samples were planned for a VAE or dtype other than "
                    f"{encoder.fingerprint[:16]}, {cache.dtype}; "
                    "plan them with this encoder's fingerprint and the cache's dtype"
                )
            jobs.setdefault(key, _Job(key, sample.photo, crop, sample.bucket))
    for group in _jobs_by_bucket(jobs.values()):
        cache.drop_damaged([job.key for job in group], latent_kind(encoder), latent_shape(encoder, group[0].bucket))
    return [jobs[key] for key in cache.missing(list(jobs))]


def latent_kind(encoder: LatentEncoder) -> str:
    """Return the kind of the latent rows of an encoder."""
    return "posterior" if encoder.has_posterior else "latent"


def _jobs_by_bucket(jobs: Iterable[_Job]) -> list[list[_Job]]:
    by_bucket: dict[Bucket, list[_Job]] = {}
    for job in jobs:
        by_bucket.setdefault(job.bucket, []).append(job)
    return [group for _, group in sorted(by_bucket.items())]


def _batches_by_bucket(jobs: Sequence[_Job], batch_size: int) -> list[list[_Job]]:
    return [
        group[start : start + batch_size]
        for group in _jobs_by_bucket(jobs)
        for start in range(0, len(group), batch_size)
    ]


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


def _load_pixels(dataset: Path, jobs: list[_Job], stop: threading.Event) -> Tensor:
    """Return the pixels of a batch, (B, 3, H, W). Raises UserError if a photo differs from its manifest entry."""
    pixels, decoded_file, image = [], None, None
    for job in jobs:
        if job.photo.file != decoded_file:
            image, decoded_file = decode_photo(dataset, job.photo, stop), job.photo.file
        size_wh = (job.bucket.width, job.bucket.height)
        pixels.append(crop_pixels(image, job.crop.box, size_wh, job.crop.is_flipped))
    return torch.from_numpy(np.stack(pixels))


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


def encode_latent(dataset: Path, sample: Sample, variant: int, encoder: LatentEncoder) -> np.ndarray:
    """Return one latent row as `fill_latents` computes it, float32. Raises UserError for a photo that changed."""
    job = _Job(sample.latent_keys[variant], sample.photo, sample.crops[variant], sample.bucket)
    return _latent_rows(encoder, _load_pixels(Path(dataset), [job], threading.Event()), [job])[0]


def fill_latents(
    cache: Cache,
    dataset: Path,
    samples: Sequence[Sample],
    encoder: LatentEncoder,
    batch_size: int,
    progress: Progress | None = None,
) -> int:
    """Encode the latent rows of the samples that are missing from the cache or damaged; return how many were added.

    Threads decode the next batches while one is encoded.
    progress(rows done, rows to encode) is called after each batch.
    Raises ValueError if a photo changed since it was prepared (even if its rows are cached), if the samples were
    planned for another VAE or dtype, and if latents are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; use 4")
    dataset = Path(dataset)
    check_files(cache, dataset, {sample.photo.file: sample.photo.sha256 for sample in samples})
    jobs = _missing_jobs(cache, samples, encoder)
    kind = latent_kind(encoder)
    batches = deque(_batches_by_bucket(jobs, batch_size))
    pending: deque = deque()
    num_added = num_done = 0
    executor, stop = ThreadPoolExecutor(_BATCHES_AHEAD, thread_name_prefix="decode"), threading.Event()
    try:
        while batches or pending:
            while batches and len(pending) <= _BATCHES_AHEAD:
                batch = batches.popleft()
                pending.append((batch, executor.submit(_load_pixels, dataset, batch, stop)))
            batch, future = pending.popleft()
            rows = _latent_rows(encoder, future.result(), batch)
            num_added += cache.append(kind, [job.key for job in batch], rows)
            num_done += len(batch)
            if progress is not None:
                progress(num_done, len(jobs))
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)
    return num_added


def fill_texts(
    cache: Cache, captions: Iterable[str], encoder: TextEncoder, batch_size: int, progress: Progress | None = None
) -> int:
    """Encode the captions, and the empty one, that are missing from the cache or damaged; return how many were added.

    progress(rows done, rows to encode) is called after each
    batch. Raises ValueError if the shape of the embeddings is not (B, num_tokens, embedding_dim).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; use 16")
    caption_of_key = {text_key(text, encoder.fingerprint, cache.dtype): text for text in ["", *captions]}
    cache.drop_damaged(list(caption_of_key), "text", (encoder.num_tokens, encoder.embedding_dim))
    missing = cache.missing(list(caption_of_key))
    num_added = 0
    for start in range(0, len(missing), batch_size):
        keys = missing[start : start + batch_size]
        embeddings_BTD = encoder.encode([caption_of_key[key] for key in keys])
        expected = (len(keys), encoder.num_tokens, encoder.embedding_dim)
        if tuple(embeddings_BTD.shape) != expected:
            shape = tuple(embeddings_BTD.shape)
            raise ValueError(f"the text encoder returned embeddings of shape {shape}, expected {expected}")
        num_added += cache.append("text", keys, embeddings_BTD.detach().to("cpu", torch.float32).numpy())
        if progress is not None:
            progress(start + len(keys), len(missing))
    return num_added
