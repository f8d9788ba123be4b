"""Places a run's photographs: which sizes they are trained and validated at, and which are left out as too small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelight.data.buckets import Bucket, make_buckets
from safelight.data.photo import Photo
from safelight.data.placement import MAX_ENLARGEMENT, Placement, place_photos, too_small
from safelight.errors import UserError
from safelight.text import counted, shortened
from safelight.trainer.config.schema import Config, Data
from safelight.trainer.models.base import Base, bucket_multiple

# enlarged by less is not worth a word: a side that is a few pixels short
NOTABLE_ENLARGEMENT = 1.02
NOTABLE_CROP_LOSS = 0.15


def budgets_of(base: Base, data: Data, latent_factor: int) -> list[tuple[Bucket, ...]]:
    """Return the buckets of each of a run's resolutions, smallest first.

    Raises UserError if a resolution allows none for the model.
    """
    multiple = bucket_multiple(base, latent_factor)
    return [make_buckets(resolution, multiple, data.max_aspect) for resolution in data.resolutions]


def all_buckets(base: Base, data: Data, latent_factor: int) -> tuple[Bucket, ...]:
    """Return every bucket of a run, sorted. Raises UserError as `budgets_of`."""
    return tuple(sorted({bucket for budget in budgets_of(base, data, latent_factor) for bucket in budget}))


@dataclass(frozen=True)
class Placed:
    """A run's photographs in their buckets. too_small: those that are left out."""

    train: list[Placement]
    validation: list[Placement]
    too_small: list[Photo]


def place(
    config: Config, budgets: Sequence[Sequence[Bucket]], train: Sequence[Photo], validation: Sequence[Photo]
) -> Placed:
    """Return the placements of a run's photographs.

    Held-out ones are placed once, in the largest budget that they fill, and their buckets are never merged, so that
    their loss does not depend on the batch size. Raises UserError if every training photograph is too small.
    """
    data = config.data
    batch_size = max(stage.batch_size for stage in config.stages())
    min_uses = batch_size if data.short_batches == "merge" else 0
    trained = place_photos(train, *budgets, upscale=data.upscale, min_uses=min_uses)
    held_out = place_photos(validation, *budgets, upscale=data.upscale)
    largest = list({one.photo.file: one for one in held_out}.values())
    left_out = [*too_small(train, trained), *too_small(validation, held_out)]
    if train and not trained:
        biggest = max(train, key=lambda photo: photo.width * photo.height)
        raise UserError(
            f"all photographs are too small to train at {min(data.resolutions)} px with data.upscale {data.upscale} "
            f"(the largest is {biggest.width} x {biggest.height}); lower data.resolution, or set data.upscale always"
        )
    return Placed(trained, largest, left_out)


def once_each(placed: Sequence) -> list:
    """Return one sample or placement of each photograph, the last."""
    return list({one.photo.file: one for one in placed}.values())


def to_json(placed: Placed) -> dict:
    """Return what each training photograph loses or gains at each size, as plain values."""
    photos = [
        {
            "source": one.photo.source,
            "width": one.bucket.width,
            "height": one.bucket.height,
            "crop_loss": round(one.crop_loss, 6),
            "enlargement": round(max(1.0, one.enlargement), 4),
        }
        for one in placed.train
    ]
    small = [{"source": p.source, "width": p.width, "height": p.height} for p in placed.too_small]
    return {"crop_loss": round(crop_loss(placed.train), 6), "photos": photos, "too_small": small}


def size_notes(placed: Placed, upscale: str) -> list[str]:
    """Return lines on photographs that are left out or enlarged because they are small."""
    notes = []
    if placed.too_small:
        count = counted(len(placed.too_small), "photograph")
        limit = MAX_ENLARGEMENT[upscale]
        how = "enlarged" if limit == 1 else f"enlarged more than {limit:g} times"
        notes.append(
            f"{count} would be {how} and {'is' if len(placed.too_small) == 1 else 'are'} left out "
            f"(first: {_sized(placed.too_small[0])}); a lower data.resolution or data.upscale always keeps them"
        )
    trained = [one for one in placed.train if one.enlargement > NOTABLE_ENLARGEMENT]
    if trained:
        worst = max(trained, key=lambda one: one.enlargement)
        count = counted(len(once_each(trained)), "photograph")
        notes.append(
            f"{count} {'is' if len(once_each(trained)) == 1 else 'are'} smaller than trained at, and enlarged up to "
            f"{worst.enlargement:.2f} times ({_sized(worst.photo)}); data.upscale skip leaves such photographs out"
        )
    return notes


def _sized(photo: Photo) -> str:
    return f"{shortened(photo.source)}, {photo.width} x {photo.height}"


def crop_loss(placed: Sequence[Placement]) -> float:
    """Return the fraction of all photographs' pixels that their canonical crops leave out."""
    whole = sum(one.photo.width * one.photo.height for one in placed)
    return sum(one.crop_loss * one.photo.width * one.photo.height for one in placed) / whole if placed else 0.0


def crop_note(placed: Sequence[Placement]) -> str:
    """Return a line on what crops leave out, in total and of the photograph that loses most."""
    worst = max(placed, key=lambda one: one.crop_loss)
    line = f"crops leave out {100 * crop_loss(placed):.1f} % of the pixels"
    if worst.crop_loss >= 0.001:
        line += f", at most {100 * worst.crop_loss:.1f} % of one photograph ({_sized(worst.photo)})"
    many = once_each([one for one in placed if one.crop_loss > NOTABLE_CROP_LOSS])
    return f"{line}; {counted(len(many), 'photograph')} above {100 * NOTABLE_CROP_LOSS:.0f} %" if many else line
