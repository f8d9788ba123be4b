"""Weighted tags of what a model saw in a photo, the best category first, each followed by its things.

A tag's weight is 1 + c * s, between 1 and 2. An ordinary tag, without a weight, has 1: a tag of ours is never behind
it. c is how sure the model is. s is how large the thing is: the side of a square of the area that its boxes cover, as a
fraction of the picture's; the side, because what covers a quarter of a photo is often what the photo is of. CLIP looks
at the photo as a whole, so s is 1. A category's weight is at least that of each of its things: it is as sure as the
surest of them, and covers what they cover together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from safelight.data.photo import Tag
from safelight.trainer.tagging.boxes import Box, covered
from safelight.trainer.tagging.categories import Categories


def tags_of_boxes(boxes: Sequence[Box], categories: Categories, min_confidence: float) -> tuple[Tag, ...]:
    """Return the tags of what a detector found with at least this confidence; several boxes of a class are one tag.

    A class that the categories lack has no category.
    """
    of_thing: dict[str, list[Box]] = {}
    of_category: dict[str, list[Box]] = {}
    for box in boxes:
        if box.confidence >= min_confidence:
            of_thing.setdefault(box.name, []).append(box)
            if category := categories.category_of(box.name):
                of_category.setdefault(category, []).append(box)
    return ordered(_weights(of_category), _weights(of_thing), categories)


def _weights(found: Mapping[str, Sequence[Box]]) -> dict[str, float]:
    return {name: 1 + max(box.confidence for box in boxes) * math.sqrt(covered(boxes)) for name, boxes in found.items()}


def tags_of_probabilities(
    probabilities: Mapping[str, float], categories: Categories, min_confidence: float
) -> tuple[Tag, ...]:
    """Return the tags of CLIP's probabilities of all words, which add up to 1.

    A category has those of its word and its things together. What has at least min_confidence becomes a tag.
    """
    of_category = {
        category: sum(probabilities[name] for name in (category, *things))
        for category, things in categories.things.items()
    }
    of_thing = {name: probabilities[name] for things in categories.things.values() for name in things}
    of_category, of_thing = (
        {name: 1 + value for name, value in found.items() if value >= min_confidence}
        for found in (of_category, of_thing)
    )
    return ordered(of_category, of_thing, categories)


def ordered(of_category: Mapping[str, float], of_thing: Mapping[str, float], categories: Categories) -> tuple[Tag, ...]:
    """Return tags from the weights of categories and things: the heaviest group first, its category before its things.

    A thing without a category is a group of its own. Equal ones stand in the order of their words. A name that is both
    is one tag, the category.
    """
    groups: dict[str, list[str]] = {category: [category] for category in of_category}
    for thing in sorted(of_thing, key=lambda name: (-of_thing[name], name)):
        groups.setdefault(categories.category_of(thing) or thing, []).append(thing)
    weight_of = {**of_thing, **of_category}
    first = sorted(groups, key=lambda name: (-weight_of[groups[name][0]], name))
    names = dict.fromkeys(name for group in first for name in groups[group])
    return tuple(Tag(name, round(weight_of[name], 2)) for name in names)
