"""Chooses the buckets that each photo is trained in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelight.data.buckets import Bucket, nearest_bucket
from safelight.data.photo import Photo


@dataclass(frozen=True)
class Placement:
    """A photo and a bucket that it is trained in."""

    photo: Photo
    bucket: Bucket


def place_photos(photos: Sequence[Photo], buckets: Sequence[Bucket]) -> list[Placement]:
    """Return each photo in the bucket of the nearest aspect ratio."""
    return [Placement(photo, nearest_bucket(photo.width, photo.height, buckets)) for photo in photos]
