"""The plan of what is to be cached: each photo's bucket, crops and captions, under keys that name all they depend on.

A latent's key covers the photo's bytes, crop, flip, bucket, VAE weights and dtype; a text's key the caption, encoder and
dtype. An edited photo or another VAE therefore finds no row, and a second run makes only what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from safelight.data.buckets import Bucket, check_flip_p, drawn_crop_box, nearest_bucket
from safelight.data.captions import collapse
from safelight.data.draws import draw_words, to_uniforms
from safelight.data.manifest import Photo
from safelight.kernels.philox import Key, Purpose

# part of every latent key; raise it when crop_pixels would give other pixels
PIXELS_VERSION = 1


@dataclass(frozen=True)
class Crop:
    """The part of a photo one variant shows. box: left, top, right, bottom in px of the stored photo."""

    box: tuple[int, int, int, int]
    is_flipped: bool


@dataclass(frozen=True)
class Sample:
    """A photo with the keys of its cached rows.

    crops, latent_keys: one a variant, the canonical crop first. captions, text_keys: one a caption variant, the
    captions with prefix and suffix as they are encoded.
    """

    photo: Photo
    bucket: Bucket
    latent_keys: tuple[str, ...]
    text_keys: tuple[str, ...]
    crops: tuple[Crop, ...]
    captions: tuple[str, ...]

    @property
    def sample_id(self) -> int:
        """The photo's 56-bit id."""
        return self.photo.sample_id


def _key(*parts: object) -> str:
    # each part with its length, so that no two lists of parts read the same
    text = "".join(f"{len(str(part))}:{part}," for part in parts)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def latent_key(photo: Photo, crop: Crop, bucket: Bucket, vae_fingerprint: str, dtype: str) -> str:
    """Return the key of a latent row, 64 hex digits."""
    size = f"{bucket.width}x{bucket.height}"
    return _key("latent", PIXELS_VERSION, photo.sha256, crop.box, crop.is_flipped, size, vae_fingerprint, dtype)


def text_key(caption: str, text_fingerprint: str, dtype: str) -> str:
    """Return the key of a caption's embedding row, 64 hex digits."""
    return _key("text", caption, text_fingerprint, dtype)


def empty_text_key(text_fingerprint: str, dtype: str) -> str:
    """Return the key of the empty caption's row, which caption dropout uses."""
    return text_key("", text_fingerprint, dtype)


def _plan_crops(
    photos: Sequence[Photo], buckets: Sequence[Bucket], variants: int, crop_jitter: float, flip_p: float, seed: int
) -> list[tuple[Bucket, tuple[Crop, ...]]]:
    """Return each photo's bucket and crops, those of buckets.crop_box and is_flipped, all draws in two calls."""
    check_flip_p(flip_p)
    ids = [photo.sample_id for photo in photos]
    drawn = range(1, variants)

    def uniforms(purpose: Purpose) -> np.ndarray:
        keys = [Key(seed, purpose, sample_id, occurrence=variant) for sample_id in ids for variant in drawn]
        return to_uniforms(draw_words(keys)).reshape(len(ids), len(drawn), 4)

    places, mirrors = uniforms(Purpose.CROP)[..., :3], uniforms(Purpose.FLIP)[..., 0] < flip_p
    planned = []
    for i, photo in enumerate(photos):
        size = photo.width, photo.height
        bucket = nearest_bucket(*size, buckets)
        crops = [Crop(drawn_crop_box(*size, bucket, None, crop_jitter), False)]
        for place, mirror in zip(places[i], mirrors[i], strict=True):
            crops.append(Crop(drawn_crop_box(*size, bucket, place, crop_jitter), bool(mirror)))
        planned.append((bucket, tuple(crops)))
    return planned


def plan_samples(
    photos: Sequence[Photo],
    buckets: Sequence[Bucket],
    *,
    variants: int,
    crop_jitter: float,
    flip_p: float,
    seed: int,
    vae_fingerprint: str,
    text_fingerprint: str,
    dtype: str,
    prefix: str = "",
    suffix: str = "",
) -> list[Sample]:
    """Return a sample for each photo, in their order: its bucket, crops and keys. Reads no image.

    variants: crops a photo, 1 for the canonical one alone. prefix, suffix: put before and after every caption as they
    are (the empty caption for dropout has neither). Raises ValueError for variants < 1 and settings out of range.
    """
    if variants < 1:
        raise ValueError(f"variants {variants} is below 1; use 1 for the centred crop alone, 4 for augmentation")
    all_crops = _plan_crops(photos, buckets, variants, crop_jitter, flip_p, seed)
    samples = []
    for photo, (bucket, crops) in zip(photos, all_crops, strict=True):
        captions = tuple(collapse(f"{prefix}{caption}{suffix}") for caption in photo.captions)
        latent_keys = tuple(latent_key(photo, crop, bucket, vae_fingerprint, dtype) for crop in crops)
        text_keys = tuple(text_key(caption, text_fingerprint, dtype) for caption in captions)
        samples.append(Sample(photo, bucket, latent_keys, text_keys, crops, captions))
    return samples


def sample_captions(samples: Iterable[Sample]) -> list[str]:
    """Return every caption of the samples once, in order: what fill_texts is to encode."""
    return list(dict.fromkeys(caption for sample in samples for caption in sample.captions))
