"""Orders a photo's weighted tags: as they stand in each of its caption variants.

The first tags stay in front. The others are drawn by weight without replacement, so that heavier ones tend to come
first, and with a limit lighter ones are more often missing. Drawing one after another with probabilities in proportion
to the weights gives the same orders as sorting by E / weight, where E are independent exponential draws.
Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", doi:10.1016/j.ipl.2005.11.003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safelight.data.draws import draw_words_at
from safelight.data.photo import Photo, Tag
from safelight.data.tag_settings import TagSettings
from safelight.kernels.philox import Purpose, exponentials

# words of a block of Philox
_BLOCK = 4


def order_tags(photos: Sequence[Photo], settings: TagSettings, seed: int) -> list[list[tuple[str, ...]]]:
    """Return the tags of each photo's caption variants, in order; a photo whose tags have a single order has one.

    The first variant is the canonical order: by falling weight, equal ones as they were written. The others are drawn
    with the key (seed, TAG_ORDER, sample id, occurrence = variant). Tags of weight 0 are never drawn.
    """
    planned = [_Plan.of(photo, settings) for photo in photos]
    draws = iter(_draw(photos, planned, seed))
    return [
        [plan.order([-tag.weight for tag in plan.drawn]), *(plan.order(next(draws)) for _ in range(1, plan.variants))]
        for plan in planned
    ]


@dataclass(frozen=True)
class _Plan:
    """A photo's tags: those in front and those that are drawn, of which `num` stay."""

    front: tuple[Tag, ...]
    drawn: tuple[Tag, ...]
    num: int
    shuffles: bool
    variants: int

    @classmethod
    def of(cls, photo: Photo, settings: TagSettings) -> _Plan:
        own = photo.settings
        keep = settings.keep if own.keep_tags is None else own.keep_tags
        shuffles = settings.shuffles if own.shuffle_tags is None else own.shuffle_tags
        limit = settings.limit or len(photo.tags)
        front = photo.tags[: min(keep, limit)]
        drawn = tuple(tag for tag in photo.tags[len(front) :] if tag.weight > 0)
        num = min(limit - len(front), len(drawn))
        differ = num > 0 and len(drawn) > 1 and (shuffles or num < len(drawn))
        return cls(front, drawn, num, shuffles, settings.variants if differ else 1)

    def order(self, places: Sequence[float]) -> tuple[str, ...]:
        """Return the tags' names. places: of each drawn tag; those with the smallest stay."""
        order = sorted(range(len(self.drawn)), key=lambda i: (places[i], i))[: self.num]
        if not self.shuffles:
            order.sort()
        return tuple(tag.name for tag in (*self.front, *(self.drawn[i] for i in order)))


def _draw(photos: Sequence[Photo], planned: Sequence[_Plan], seed: int) -> list[np.ndarray]:
    """Return E / weight of the drawn tags, for each variant after the first of each photo. All draws are one call."""
    ids, occurrences, blocks = [], [], []
    for photo, plan in zip(photos, planned, strict=True):
        num = -(-len(plan.drawn) // _BLOCK)
        for variant in range(1, plan.variants):
            ids += [photo.sample_id] * num
            occurrences += [variant] * num
            blocks += range(num)
    columns = (np.array(column, dtype=np.uint64) for column in (ids, occurrences, blocks))
    ids, occurrences, blocks = columns
    words = draw_words_at(seed, Purpose.TAG_ORDER, ids, 0, occurrences, blocks)
    drawn, places, start = exponentials(words), [], 0
    for plan in planned:
        num = -(-len(plan.drawn) // _BLOCK)
        weights = np.array([tag.weight for tag in plan.drawn])
        for _ in range(1, plan.variants):
            places.append(drawn[start : start + num].reshape(-1)[: len(weights)] / weights)
            start += num
    return places
