"""How tags and captions are compared."""

from __future__ import annotations

import pytest

from safelight.data.photo import Photo
from safelight.trainer.tagging.boxes import Box
from safelight.trainer.tagging.yolox import COCO_NAMES
from tools.tag_agreement import COLOURS, NAMES, PARENTS, agreement, mentions


@pytest.mark.parametrize(
    ("text", "names", "is_there"),
    [
        ("Two dogs on grass", "dog|puppy", True),
        ("a doghouse", "dog|puppy", False),
        ("a glass of wine", "wine glass|glass of wine", True),
        ("a cat", "", False),
    ],
)
def test_a_name_is_a_whole_word_or_its_plural(text, names, is_there):
    assert mentions(text, names) == is_there


def test_the_tables_are_of_cocos_classes():
    assert (set(NAMES) | set(PARENTS) | COLOURS) <= set(COCO_NAMES)


def photo(number: int, caption: str) -> Photo:
    return Photo(f"{number}.jpg", f"{number:064x}", 10, 10, (caption,), f"photos/{number}.jpg", "sidecar .txt")


def test_tags_that_captions_name_and_classes_that_were_found_are_counted():
    photos = [
        photo(1, "a puppy beside an orange wall"),
        photo(2, "an animal on a chair"),
        photo(3, "a street"),
    ]
    whole = (0, 0, 1, 1)
    boxes = {
        photos[0].sha256: [Box("dog", 0.9, *whole), Box("cat", 0.6, *whole)],
        photos[1].sha256: [Box("horse", 0.7, *whole), Box("chair", 0.4, *whole)],
        photos[2].sha256: [Box("car", 0.8, *whole)],
    }
    figures, unnamed = agreement(photos, boxes, 0.5)
    # the dog, and the horse by its parent; dog and chair were said, orange is a colour
    assert (figures["tags"], figures["tags_named_in_caption"]) == (4, 2)
    assert (figures["classes_in_captions"], figures["classes_found"]) == (2, 1)
    # the cat's category is the dog's
    assert (figures["category_tags"], figures["category_named"]) == (3, 0.6667)
    assert [line.split("\t")[:2] for line in unnamed] == [["photos/1.jpg", "cat"], ["photos/3.jpg", "car"]]
