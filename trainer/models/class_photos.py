"""Class images: pictures of the whole class, such as dogs, beside the photographs of one dog.

They keep what the base knows of the class (prior preservation). Photographs of the dataset that say `class_image` are
the first; a run with prior.prompt has the base draw the rest (trainer/inference/class_images.py). Here is which
photographs a run trains on, whether or not the pictures exist yet: an epoch uses class images as often as photographs,
their losses are multiplied by prior.weight, and none is held out.
Source: Ruiz et al. 2022, arXiv:2208.12242, section 3.2.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from safelight.data.buckets import Bucket
from safelight.data.manifest import split_validation
from safelight.data.photo import MAX_LOSS_SCALE, MAX_REPEATS, Photo, PhotoSettings
from safelight.data.placement import place_photos
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.config.schema import Config

# in the dataset's folder
CLASS_IMAGES_FOLDER = "class_images"
SOURCE = "drawn by the base"
# (width, height, number among those of this size)
Drawing = tuple[int, int, int]


def is_class_image(photo: Photo) -> bool:
    return photo.settings.class_image


def has_own_scale(photo: Photo) -> bool:
    """Return whether a photograph has a loss scale of its own; a class image's is prior.weight's."""
    return photo.settings.loss_scale != 1 and not is_class_image(photo)


def split_photos(
    config: Config,
    budgets: Sequence[Sequence[Bucket]],
    photos: Sequence[Photo],
    drawn: Callable[[list[Drawing]], list[Photo]],
) -> tuple[list[Photo], list[Photo]]:
    """Return the photographs to train on, class images included, and those that are held out.

    drawn: returns the photos of the pictures that the run needs besides the dataset's; see `stand_ins`.
    Raises UserError if a class image would be used too often.
    """
    train, validation = split_validation(list(photos), config.data.validation_fraction, config.run.seed)
    own = [photo for photo in train if not is_class_image(photo)]
    given = [photo for photo in train if is_class_image(photo)]
    missing = config.prior.num_images - len(given) if config.prior.prompt else 0
    if missing > 0 and own:
        given = [*given, *drawn(_drawings(budgets[-1], own, missing))]
    if not given or not own:
        return train, validation
    return [*own, *_weighted(config, own, given)], validation


def _drawings(buckets: Sequence[Bucket], own: Sequence[Photo], num: int) -> list[Drawing]:
    """Return what is drawn: pictures of the sizes of the photographs' buckets, in proportion.

    Class images then share batches with photographs of every shape.
    """
    sizes = sorted(one.bucket for one in place_photos(own, buckets))
    seen: Counter[Bucket] = Counter()
    drawings = []
    for number in range(num):
        bucket = sizes[(2 * number + 1) * len(sizes) // (2 * num)]
        drawings.append((bucket.width, bucket.height, seen[bucket]))
        seen[bucket] += 1
    return drawings


def _weighted(config: Config, own: Sequence[Photo], given: Sequence[Photo]) -> list[Photo]:
    """Return class images with the repeats and loss scales that they are trained with."""
    ratio = sum(photo.settings.repeats for photo in own) / (sum(photo.settings.repeats for photo in given) or 1)
    weight, weighted = config.prior.weight, []
    for photo in given:
        repeats, scale = photo.settings.repeats * ratio, photo.settings.loss_scale * weight
        if repeats > MAX_REPEATS:
            raise UserError(
                f"{counted(len(given), 'class image')} would be used {repeats:,.0f} times an epoch each, more than "
                f"{MAX_REPEATS:,.0f}; set prior.num_images higher, or add class images to the dataset"
            )
        if scale > MAX_LOSS_SCALE:
            raise UserError(
                f"prior.weight {weight:g} times the loss_scale {photo.settings.loss_scale:g} of {photo.source} is more "
                f"than {MAX_LOSS_SCALE:g}; lower one of them"
            )
        weighted.append(replace(photo, settings=replace(photo.settings, repeats=repeats, loss_scale=scale)))
    return weighted


def drawn_file(folder: str, drawing: Drawing) -> str:
    """Return the path of a drawn picture inside the dataset."""
    width, height, number = drawing
    return f"{CLASS_IMAGES_FOLDER}/{folder}/{width}x{height}-{number:05d}.png"


def drawn_photo(config: Config, folder: str, drawing: Drawing, sha256: str) -> Photo:
    """Return the photo of a drawn picture whose file has this hash."""
    width, height, _ = drawing
    return Photo(
        file=drawn_file(folder, drawing),
        sha256=sha256,
        width=width,
        height=height,
        captions=(config.prior.prompt,),
        source=SOURCE,
        caption_source="prior.prompt",
        settings=PhotoSettings(class_image=True),
    )


def stand_ins(config: Config, drawings: Sequence[Drawing]) -> list[Photo]:
    """Return photos in place of pictures that may not be drawn yet, for a plan.

    A picture's sample id is known only once it is drawn, so uses that are drawn by it, the fractions of repeats, may
    fall into other epochs.
    """
    return [
        drawn_photo(config, "planned", drawing, hashlib.sha256(drawn_file("planned", drawing).encode()).hexdigest())
        for drawing in drawings
    ]


def recipe(config: Config, unet_fingerprint: str, vae_fingerprint: str) -> str:
    """Return the name of the folder of pictures that are drawn alike, 16 hex digits."""
    prior = config.prior
    values = [prior.prompt, prior.negative_prompt, prior.steps, prior.cfg, config.run.seed, config.model.clip_skip]
    values += [config.loss.prediction, config.loss.zero_terminal_snr, unet_fingerprint, vae_fingerprint]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def missing_drawings(dataset: Path, folder: str, drawings: Sequence[Drawing]) -> list[Drawing]:
    """Return the pictures of which there is no file yet."""
    return [drawing for drawing in drawings if not (dataset / drawn_file(folder, drawing)).exists()]
