"""What was seen becomes weighted tags: their weights, and their order."""

from __future__ import annotations

import pytest

from safelight.data.photo import Tag
from safelight.trainer.tagging.boxes import Box
from safelight.trainer.tagging.categories import parse_categories
from safelight.trainer.tagging.weights import tags_of_boxes, tags_of_probabilities

CATEGORIES = parse_categories("animal: cat, dog\nplant\ntableware: cup, spoon")


def test_a_weight_is_confidence_times_the_side_of_the_area():
    """Two dogs are one tag: as sure as the surer one, as large as what both cover; the animals' boxes overlap."""
    boxes = [
        Box("dog", 0.8, 0, 0, 0.5, 0.5),
        Box("dog", 0.6, 0.5, 0, 1, 0.5),
        Box("cat", 0.9, 0, 0, 0.5, 0.02),
        Box("ghost", 0.95, 0, 0, 1, 1),
        Box("spoon", 0.49, 0, 0, 1, 1),
    ]
    assert tags_of_boxes(boxes, CATEGORIES, 0.5) == (
        Tag("ghost", 1.95),
        # 1 + 0.9 * sqrt(0.5)
        Tag("animal", 1.64),
        # 1 + 0.8 * sqrt(0.5)
        Tag("dog", 1.57),
        Tag("cat", 1.09),
    )
    names = [tag.name for tag in tags_of_boxes(boxes, CATEGORIES, 0.4)]
    assert names == ["ghost", "animal", "dog", "cat", "tableware", "spoon"]
    assert tags_of_boxes(boxes, CATEGORIES, 0.96) == ()


def test_a_class_that_is_a_category_is_one_tag():
    boxes = [Box("plant", 0.5, 0, 0, 1, 1), Box("animal", 0.7, 0, 0, 0.1, 1), Box("cat", 0.6, 0, 0, 1, 1)]
    assert [tag.name for tag in tags_of_boxes(boxes, CATEGORIES, 0.5)] == ["animal", "cat", "plant"]


def test_equal_weights_have_one_order():
    boxes = [Box(name, 0.5, 0, 0, 1, 1) for name in ("ghost", "cup", "cat", "dog")]
    names = ["animal", "cat", "dog", "ghost", "tableware", "cup"]
    assert [tag.name for tag in tags_of_boxes(boxes, CATEGORIES, 0.5)] == names
    assert [tag.name for tag in tags_of_boxes(boxes[::-1], CATEGORIES, 0.5)] == names


def test_a_category_has_the_probability_of_its_things_together():
    animals, others = {"animal": 0.05, "cat": 0.3, "dog": 0.2}, {"tableware": 0.05, "cup": 0.03, "spoon": 0.01}
    probabilities = {**animals, "plant": 0.36, **others}
    assert tags_of_probabilities(probabilities, CATEGORIES, 0.3) == (
        Tag("animal", pytest.approx(1.55)),
        Tag("cat", 1.3),
        Tag("plant", 1.36),
    )
    assert [tag.name for tag in tags_of_probabilities(probabilities, CATEGORIES, 0.5)] == ["animal"]
    assert tags_of_probabilities(probabilities, CATEGORIES, 0.6) == ()
