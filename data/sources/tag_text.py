"""Weighted tags as people type them behind a caption: `a dog on grass | animal:1.5, dog:1.2, park`."""

from __future__ import annotations

import re

from safelight.data.photo import MAX_TAG_WEIGHT, MAX_TAGS, Tag
from safelight.errors import UserError
from safelight.text import collapse, shortened

# possessive, here and in every pattern that meets text of strangers: going back over n digits takes time of order n^2
_WEIGHT = re.compile(r"\d++\.?\d*+|\.\d++")


def split_tags(text: str) -> tuple[str, tuple[Tag, ...]]:
    """Return (caption, tags) of a text, white space collapsed.

    What follows `|` is read as tags only if it cannot be taken for a part of the caption. The text holds one `|`;
    behind it, separated by commas, stand tags, each with a letter in its name; and at least one of them has a weight:
    `dog:1.2`. A colon after a digit, as in 10:30, 16:9 and Genesis 1:1, makes no weight. A tag without a weight has
    weight 1. Nothing before the `|` makes an empty caption. Any other text is a caption as a whole, with its `|`.
    """
    caption, mark, behind = text.partition("|")
    if mark and "|" not in behind:
        try:
            tags = [_tag(piece) for piece in behind.split(",") if piece.strip()]
        except UserError:
            tags = []
        if any(is_weighted for _, is_weighted in tags) and len(tags) <= MAX_TAGS:
            return collapse(caption), united(tag for tag, _ in tags)
    return collapse(text), ()


def parse_tags(text: str) -> tuple[Tag, ...]:
    """Return the tags of a list such as `animal:1.5, park`. Raises UserError with what is wrong."""
    return united(_tag(piece)[0] for piece in text.split(",") if piece.strip())


def _tag(text: str) -> tuple[Tag, bool]:
    """Return (a tag, whether it has a weight). Raises UserError with what is wrong."""
    before, _, behind = map(str.strip, text.rpartition(":"))
    is_weighted = before != "" and not before[-1].isdigit() and _WEIGHT.fullmatch(behind) is not None
    name = collapse(before if is_weighted else text)
    weight = float(behind[:20]) if is_weighted else 1.0
    if not any(char.isalpha() for char in name):
        raise UserError(f"tag {shortened(name)!r} has no letter")
    if weight > MAX_TAG_WEIGHT:
        raise UserError(f"tag {shortened(name)!r} has weight {weight:g}, over the limit of {MAX_TAG_WEIGHT:g}")
    return Tag(name, weight), is_weighted


def united(tags) -> tuple[Tag, ...]:
    """Return tags without repeats: of one name, the first place and the first weight."""
    first: dict[str, Tag] = {}
    for tag in tags:
        first.setdefault(tag.name, tag)
    return tuple(first.values())
