"""Chooses the buckets that each photo is trained in, and says what that costs: pixels cropped away or invented.

A run has one pixel budget or several, each with its own buckets. A photo is used once in every budget that it fills:
in the bucket of the nearest aspect ratio, unless that would enlarge it by more than is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from safelight.data.buckets import Bucket, crop_box, nearest_bucket
from safelight.data.photo import Photo

# data.upscale -> by how much a photo's sides may be enlarged
MAX_ENLARGEMENT = {"allow": 1.25, "skip": 1.0, "always": math.inf}


@dataclass(frozen=True)
class Placement:
    """A photo and a bucket that it is trained in."""

    photo: Photo
    bucket: Bucket

    @property
    def enlargement(self) -> float:
        """By how much the bucket enlarges the photo's sides; 1 or less if the photo has enough pixels."""
        return max(self.bucket.width / self.photo.width, self.bucket.height / self.photo.height)

    @property
    def crop_loss(self) -> float:
        """The fraction of the photo's pixels that lies outside its canonical crop."""
        left, top, right, bottom = crop_box(self.photo.width, self.photo.height, self.bucket, None, 0.0)
        return 1.0 - (right - left) * (bottom - top) / (self.photo.width * self.photo.height)


def place_photos(
    photos: Sequence[Photo], *budgets: Sequence[Bucket], upscale: str = "always", min_uses: int = 0
) -> list[Placement]:
    """Return the placements of the photos, in their order, each photo's from the first budget to the last.

    upscale: a key of MAX_ENLARGEMENT; photos that fit no budget have no placement. min_uses: buckets of fewer uses an
    epoch are merged, see `_merged`.
    """
    limit = MAX_ENLARGEMENT[upscale]
    by_budget = []
    for buckets in budgets:
        placed = [Placement(photo, nearest_bucket(photo.width, photo.height, buckets)) for photo in photos]
        by_budget.append(_merged([one for one in placed if one.enlargement <= limit], min_uses, limit))
    order = {id(photo): number for number, photo in enumerate(photos)}
    placed = sorted((one for budget in by_budget for one in budget), key=lambda one: order[id(one.photo)])
    # small photos of two budgets may share a bucket
    return list(dict.fromkeys(placed)) if len(budgets) > 1 else placed


def too_small(photos: Sequence[Photo], placed: Sequence[Placement]) -> list[Photo]:
    """Return the photos that have no placement."""
    files = {one.photo.file for one in placed}
    return [photo for photo in photos if photo.file not in files]


def _merged(placed: list[Placement], min_uses: int, limit: float) -> list[Placement]:
    """Return the placements without buckets of fewer than `min_uses` uses an epoch.

    The smallest bucket is merged into the one of the nearest aspect ratio, until none is too small or none can take
    it: a bucket may not enlarge a photo beyond the limit.
    """
    members: dict[Bucket, list[int]] = {}
    for number, one in enumerate(placed):
        members.setdefault(one.bucket, []).append(number)

    def uses(bucket: Bucket) -> float:
        return sum(placed[number].photo.settings.repeats for number in members[bucket])

    stuck: set[Bucket] = set()
    while small := [bucket for bucket in members if uses(bucket) < min_uses and bucket not in stuck]:
        bucket = min(small, key=lambda one: (uses(one), one))

        def distance(other: Bucket, bucket: Bucket = bucket) -> tuple[float, Bucket]:
            return round(abs(math.log(other.aspect / bucket.aspect)), 9), other

        for other in sorted((one for one in members if one != bucket), key=distance):
            moved = {number: replace(placed[number], bucket=other) for number in members[bucket]}
            if all(one.enlargement <= limit for one in moved.values()):
                placed = [moved.get(number, one) for number, one in enumerate(placed)]
                members[other] += members.pop(bucket)
                break
        else:
            stuck.add(bucket)
    return placed
