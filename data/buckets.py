"""Aspect-ratio buckets: the sizes that photos are trained at, and the crop of a photo that fills its bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.errors import UserError

# most cameras shoot 3:2, so an exact 3:2 bucket is better than a larger one of nearly that aspect, unless it leaves too
# much of the pixel budget unused
CAMERA_ASPECT = (3, 2)
MIN_CAMERA_FILL = 0.6


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size: width and height in px."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


def make_buckets(resolution: int, multiple: int, max_aspect: float = 4.0) -> tuple[Bucket, ...]:
    """Return the buckets for a pixel budget of resolution^2, sorted; with (w, h) there is always (h, w).

    Candidates are the sizes in multiples of `multiple` with w * h <= resolution^2 and an aspect from 1/max_aspect to
    max_aspect. Returns those that do not fit inside another candidate, and the largest exact 3:2 and 2:3 if they fill
    60 % of the budget or more.
    Raises ValueError for a resolution that is not a multiple (naming the two nearest) or below two multiples, and for
    max_aspect < 1.
    """
    if multiple < 1 or max_aspect < 1:
        raise ValueError(f"multiple {multiple} and max_aspect {max_aspect} must be 1 or more")
    if resolution < 2 * multiple:
        raise UserError(f"resolution {resolution} is too small for multiples of {multiple}; use {2 * multiple} or more")
    if resolution % multiple:
        lower = resolution // multiple * multiple
        raise UserError(f"resolution {resolution} is not a multiple of {multiple}; use {lower} or {lower + multiple}")
    side = resolution // multiple
    tallest = {}
    for columns in range(1, math.floor(side * math.sqrt(max_aspect)) + 1):
        rows = min(side * side // columns, math.floor(columns * max_aspect))
        if rows and columns / rows <= max_aspect:
            tallest[columns] = rows
    # from the widest on: a bucket no higher than the highest so far fits inside an earlier one
    cells, highest = [], 0
    for columns in sorted(tallest, reverse=True):
        if tallest[columns] > highest:
            highest = tallest[columns]
            cells.append((columns, highest))
    long, short = CAMERA_ASPECT
    factor = math.isqrt(side * side // (long * short))
    if long * short * factor**2 >= MIN_CAMERA_FILL * side * side and max_aspect >= long / short:
        cells += [(long * factor, short * factor), (short * factor, long * factor)]
    return tuple(sorted({Bucket(columns * multiple, rows * multiple) for columns, rows in cells}))


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket with the nearest aspect by |log ratio|. Ties: the larger one, then the first in sort order."""

    def distance(bucket: Bucket) -> tuple[float, int, Bucket]:
        # rounded: the logarithms of a ratio and its inverse can differ in the last bit
        return round(abs(math.log(bucket.aspect * height / width)), 9), -bucket.width * bucket.height, bucket

    return min(buckets, key=distance)


def crop_box(
    width: int, height: int, bucket: Bucket, draws: Sequence[float] | None, crop_jitter: float
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in px: the part of a width x height photo that is resized to the bucket.

    Without draws it is the canonical crop: the largest window of the bucket's aspect, centred. Three uniform draws in
    (0, 1) shrink the window's sides by a fraction of up to crop_jitter and place it anywhere in the photo.
    Raises ValueError unless 0 <= crop_jitter < 1.
    """
    if not 0 <= crop_jitter < 1:
        raise ValueError(f"crop_jitter {crop_jitter} is outside 0 <= crop_jitter < 1; use 0.1, or 0 for none")
    if width * bucket.height >= height * bucket.width:
        window = min(width, max(1, round(height * bucket.width / bucket.height))), height
    else:
        window = width, min(height, max(1, round(width * bucket.height / bucket.width)))
    if draws is None:
        left, top = (width - window[0]) // 2, (height - window[1]) // 2
    else:
        shrink, across, down = map(float, draws)
        scale = 1.0 - shrink * crop_jitter
        window = max(1, round(window[0] * scale)), max(1, round(window[1] * scale))
        left, top = int(across * (width - window[0] + 1)), int(down * (height - window[1] + 1))
    return left, top, left + window[0], top + window[1]


def check_flip_p(flip_p: float) -> None:
    """Raise ValueError unless 0 <= flip_p <= 1."""
    if not 0 <= flip_p <= 1:
        raise ValueError(f"flip_p {flip_p} is outside 0 to 1; use 0.5, or 0 for none")
