"""What a dataset's captions have in common: the commonest captions and words, and those too short to teach much."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.data.photo import Photo

# captions with fewer words name a thing at best
MIN_WORDS = 3
NUM_COMMONEST = 10
# English words that say nothing about a picture
_COMMON = frozenset("a an and are as at by for from in into is it its of on or that the there this to with".split())
# begins with a letter: numbers are weights and dates
_WORD = re.compile(r"[^\W\d_][^\W_]*(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class CaptionWords:
    """captions: caption -> how many photos have it, where several do. words: word -> in how many photos' captions.

    Both have the commonest first, NUM_COMMONEST at most. short: photos all of whose captions, tags included, have fewer
    than MIN_WORDS words.
    """

    captions: dict[str, int]
    words: dict[str, int]
    short: list[Photo]


def caption_words(photos: Sequence[Photo]) -> CaptionWords:
    """Return what the captions of a dataset have in common."""
    num_of_caption: Counter[str] = Counter()
    num_of_word: Counter[str] = Counter()
    short = []
    for photo in photos:
        tags = " ".join(tag.name for tag in photo.tags)
        num_of_caption.update({caption for caption in photo.captions if caption})
        found = [_WORD.findall(f"{caption} {tags}") for caption in photo.captions]
        num_of_word.update({word.casefold() for words in found for word in words} - _COMMON)
        if max(map(len, found)) < MIN_WORDS:
            short.append(photo)
    return CaptionWords(
        {caption: num for caption, num in _commonest(num_of_caption).items() if num > 1},
        _commonest(num_of_word),
        short,
    )


def _commonest(counts: Counter[str]) -> dict[str, int]:
    """Return the commonest texts, equally common ones in alphabetical order, so that every call gives the same."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_COMMONEST])
