"""Plan what is cached: each photo's crops and captions, with the keys of their cache rows.

A key hashes everything the row depends on. For latents: the photo's bytes, crop, flip, bucket, VAE weights and dtype.
For text embeddings: the caption, text encoder and dtype. For token ids: the caption and the tokenizers. An edited photo
or another VAE therefore gives new keys, and filling the cache again encodes only the missing rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from safelight.data.buckets import Bucket, check_flip_p, crop_box
from safelight.data.draws import draw_words, to_uniforms
from safelight.data.photo import Photo
from safelight.data.placement import Placement
from safelight.data.tag_settings import TagSettings
from safelight.data.tags import order_tags
from safelight.kernels.philox import Key, Purpose
from safelight.text import collapse

# part of every latent key; raise it when a change makes crop_pixels return different pixels
PIXELS_VERSION = 1
# the same of every mask key and mask_row
MASK_VERSION = 1
NO_TAG_VARIANTS = TagSettings()


@dataclass(frozen=True)
class Crop:
    """The part of a photo that one variant shows. box: left, top, right, bottom in px of the stored photo."""

    box: tuple[int, int, int, int]
    is_flipped: bool


@dataclass(frozen=True)
class Sample:
    """A photo with the keys of its cached rows.

    crops, latent_keys: one per variant, the canonical crop first. captions, text_keys: one per caption and order of its
    tags, the canonical order first; the captions are the encoded texts, tags, prefix and suffix included. Drawn orders
    may be equal. mask_keys: one per variant, none if the photo has no mask or masks have no effect.
    token_keys: of the captions' token ids, one per caption if the run trains the text encoder, else none.
    """

    photo: Photo
    bucket: Bucket
    latent_keys: tuple[str, ...]
    text_keys: tuple[str, ...]
    crops: tuple[Crop, ...]
    captions: tuple[str, ...]
    mask_keys: tuple[str, ...] = ()
    token_keys: tuple[str, ...] = ()

    @property
    def caption_keys(self) -> tuple[str, ...]:
        """What tells the captions apart: keys that training the text encoder does not change."""
        return self.token_keys or self.text_keys

    @property
    def sample_id(self) -> int:
        """The photo's 56-bit id."""
        return self.photo.sample_id

    def sizes(self, variant: int) -> tuple[int, ...]:
        """Return what SDXL is told of a variant's crop, six numbers of px.

        They are height and width of the stored photo; top and left of the crop, in the photo as it is scaled to the
        bucket, and mirrored if the crop is; height and width of the bucket.
        """
        photo, bucket, crop = self.photo, self.bucket, self.crops[variant]
        left, top, right, bottom = crop.box
        if crop.is_flipped:
            left, right = photo.width - right, photo.width - left
        scale_x, scale_y = bucket.width / (right - left), bucket.height / (bottom - top)
        return photo.height, photo.width, round(top * scale_y), round(left * scale_x), bucket.height, bucket.width


def _key(*parts: object) -> str:
    # each part is preceded by its length, so that different lists of parts never give the same text
    text = "".join(f"{len(str(part))}:{part}," for part in parts)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def latent_key(photo: Photo, crop: Crop, bucket: Bucket, vae_fingerprint: str, dtype: str) -> str:
    """Return the key of a latent row, 64 hex digits."""
    size = f"{bucket.width}x{bucket.height}"
    return _key("latent", PIXELS_VERSION, photo.sha256, crop.box, crop.is_flipped, size, vae_fingerprint, dtype)


def mask_key(photo: Photo, crop: Crop, bucket: Bucket, factor: int, dtype: str) -> str:
    """Return the key of a mask's row, 64 hex digits. factor: pixels per latent, along each side."""
    size = f"{bucket.width}x{bucket.height}"
    return _key("mask", MASK_VERSION, photo.mask_sha256, crop.box, crop.is_flipped, size, factor, dtype)


def text_key(caption: str, text_fingerprint: str, dtype: str) -> str:
    """Return the key of a caption's embedding row, 64 hex digits."""
    return _key("text", caption, text_fingerprint, dtype)


def empty_text_key(text_fingerprint: str, dtype: str) -> str:
    """Return the key of the empty caption's row, used by caption dropout."""
    return text_key("", text_fingerprint, dtype)


def token_key(caption: str, tokenizer_fingerprint: str) -> str:
    """Return the key of the row of a caption's token ids, 64 hex digits."""
    return _key("tokens", caption, tokenizer_fingerprint)


def _plan_crops(
    placements: Sequence[Placement], variants: int, crop_jitter: float, flip_p: float, seed: int
) -> list[tuple[Crop, ...]]:
    """Return each photo's crops.

    Variant 0 is the canonical crop, never mirrored; validation uses it. The crop of another variant is drawn with the
    key (seed, CROP, sample_id, occurrence = variant), and it is mirrored with probability flip_p, drawn with purpose
    FLIP, or with the photo's own probability if it has one. All draws are made in two calls.
    Raises ValueError for a crop_jitter or flip_p out of range.
    """
    check_flip_p(flip_p)
    ids = [placed.photo.sample_id for placed in placements]
    own = [placed.photo.settings.flip_p for placed in placements]
    probabilities = np.array([flip_p if p is None else p for p in own], dtype=np.float64)[:, None]
    drawn = range(1, variants)

    def uniforms(purpose: Purpose) -> np.ndarray:
        keys = [Key(seed, purpose, sample_id, occurrence=variant) for sample_id in ids for variant in drawn]
        return to_uniforms(draw_words(keys)).reshape(len(ids), len(drawn), 4)

    places, mirrors = uniforms(Purpose.CROP)[..., :3], uniforms(Purpose.FLIP)[..., 0] < probabilities
    planned = []
    for i, placed in enumerate(placements):
        size, bucket = (placed.photo.width, placed.photo.height), placed.bucket
        crops = [Crop(crop_box(*size, bucket, None, crop_jitter), False)]
        for place, mirror in zip(places[i], mirrors[i], strict=True):
            crops.append(Crop(crop_box(*size, bucket, place, crop_jitter), bool(mirror)))
        planned.append(tuple(crops))
    return planned


def photo_captions(
    photos: Sequence[Photo],
    tags: TagSettings,
    seed: int,
    prefix: str = "",
    suffix: str = "",
    templates: Sequence[str] = (),
) -> list[tuple[str, ...]]:
    """Return the captions of each photo as they are encoded: each in every order of the tags, the canonical one first.

    Arguments as of `plan_samples`. With templates, each caption is there in every template;
    equal texts are there once.
    """
    captions = []
    for photo, orders in zip(photos, order_tags(photos, tags, seed), strict=True):
        texts = [", ".join(filter(None, (caption, *order))) for caption in photo.captions for order in orders]
        if photo.settings.class_image:
            # a suffix and a template name what is to be learned
            captions.append(tuple(collapse(f"{prefix}{text}") for text in texts))
            continue
        texts = [collapse(f"{prefix}{text}{suffix}") for text in texts]
        if templates:
            # a template without the caption gives one text for all of them
            texts = dict.fromkeys(_in_template(template, text) for text in texts for template in templates)
        captions.append(tuple(texts))
    return captions


def _in_template(template: str, caption: str) -> str:
    """Return a template with the caption in it, without the commas around an empty one."""
    text = collapse(template.replace("{caption}", caption))
    return text if caption else text.strip(" ,")


def plan_samples(
    placements: Sequence[Placement],
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
    tags: TagSettings = NO_TAG_VARIANTS,
    templates: Sequence[str] = (),
) -> list[Sample]:
    """Return one sample per placement, in the same order: its crops and keys. Reads no image.

    variants: number of crops per photo; 1 is the canonical crop alone. prefix, suffix: added to every caption
    unchanged, but not to the empty caption of caption dropout, nor a suffix to that of a class image. tags: how a
    photo's tags, which follow each of its captions, are ordered in `tags.variants` ways. templates: what is encoded in
    place of each caption, except a class image's, with the caption at {caption}. Raises ValueError for a setting out
    of range.
    """
    if variants < 1:
        raise ValueError(f"variants {variants} is below 1; use 1 for the centred crop alone, 4 for augmentation")
    all_crops = _plan_crops(placements, variants, crop_jitter, flip_p, seed)
    all_captions = photo_captions([placed.photo for placed in placements], tags, seed, prefix, suffix, templates)
    samples = []
    for placed, crops, captions in zip(placements, all_crops, all_captions, strict=True):
        photo, bucket = placed.photo, placed.bucket
        latent_keys = tuple(latent_key(photo, crop, bucket, vae_fingerprint, dtype) for crop in crops)
        text_keys = tuple(text_key(caption, text_fingerprint, dtype) for caption in captions)
        samples.append(Sample(photo, bucket, latent_keys, text_keys, crops, captions))
    return samples


def with_masks(samples: Iterable[Sample], factor: int, dtype: str) -> list[Sample]:
    """Return the samples, those whose photo has a mask with the keys of its rows. factor: pixels per latent."""
    return [
        replace(s, mask_keys=tuple(mask_key(s.photo, crop, s.bucket, factor, dtype) for crop in s.crops))
        if s.photo.mask
        else s
        for s in samples
    ]


def with_tokens(samples: Iterable[Sample], tokenizer_fingerprint: str) -> list[Sample]:
    """Return the samples with the keys of their captions' token ids."""
    return [
        replace(s, token_keys=tuple(token_key(text, tokenizer_fingerprint) for text in s.captions)) for s in samples
    ]


def with_texts(samples: Iterable[Sample], text_fingerprint: str, dtype: str) -> list[Sample]:
    """Return the samples with the keys of their captions' embeddings by another text encoder."""
    return [
        replace(s, text_keys=tuple(text_key(text, text_fingerprint, dtype) for text in s.captions)) for s in samples
    ]


def sample_captions(samples: Iterable[Sample]) -> list[str]:
    """Return every caption of the samples once, in order, for `fill_texts` to encode."""
    return list(dict.fromkeys(caption for sample in samples for caption in sample.captions))
