"""Boxes: which of overlapping ones stay, how much they cover, what of a detector's rows is left out."""

from __future__ import annotations

import numpy as np
import pytest

from safelight.trainer.tagging.boxes import MAX_BOXES, Box, boxes_of, boxes_of_row, covered, keep_best, row_of_boxes


def kept(*rows: tuple) -> list[int]:
    """Return the indices that remain of rows (left, top, right, bottom, score, class)."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return keep_best(values[:, :4], values[:, 4], values[:, 5])


def test_of_overlapping_boxes_of_a_class_the_best_stays():
    whole, shifted, apart = (0, 0, 10, 10), (1, 0, 11, 10), (20, 0, 30, 10)
    assert kept((*whole, 0.5, 1), (*shifted, 0.9, 1), (*apart, 0.7, 1)) == [1, 2]
    # another class; overlaps of less than the limit: 5 / 15 and 6.2 / 13.8
    assert kept((*whole, 0.5, 1), (*shifted, 0.9, 2)) == [1, 0]
    assert kept((*whole, 0.5, 1), (5, 0, 15, 10, 0.9, 1)) == [1, 0]
    assert kept((*whole, 0.5, 1), (3.8, 0, 13.8, 10, 0.9, 1)) == [1, 0]
    assert kept((*whole, 0.5, 1), (3.7, 0, 13.7, 10, 0.9, 1)) == [1]
    # a box that was dropped drops no other: the third overlaps only the second
    assert kept((0, 0, 10, 10, 0.9, 1), (3, 0, 13, 10, 0.8, 1), (6, 0, 16, 10, 0.7, 1)) == [0, 2]
    assert kept() == []
    # of equal scores the first; boxes without an area overlap nothing
    assert kept((*whole, 0.5, 1), (*whole, 0.5, 1)) == [0]
    assert kept((3, 3, 3, 3, 0.5, 1), (3, 3, 3, 3, 0.5, 1)) == [0, 1]


def plain_keep_best(rows: np.ndarray, max_overlap: float) -> list[int]:
    """Non-maximum suppression, one pair at a time."""
    chosen: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (-rows[i, 4], i)):
        left, top, right, bottom, _, kind = rows[index]
        for other in chosen:
            a, b, c, d, _, other_kind = rows[other]
            width, height = max(0, min(right, c) - max(left, a)), max(0, min(bottom, d) - max(top, b))
            together = (right - left) * (bottom - top) + (c - a) * (d - b) - width * height
            if kind == other_kind and together > 0 and width * height / together > max_overlap:
                break
        else:
            chosen.append(index)
    return chosen[:MAX_BOXES]


def test_it_equals_the_plain_way_for_random_boxes():
    rng = np.random.default_rng(1)
    for _ in range(60):
        num = rng.integers(0, 60)
        start, size = rng.integers(0, 20, (num, 2)), rng.integers(0, 15, (num, 2))
        scores = rng.integers(0, 8, (num, 1)) / 8
        rows = np.concatenate([start, start + size, scores, rng.integers(0, 2, (num, 1))], axis=1).astype(np.float64)
        assert keep_best(rows[:, :4], rows[:, 4], rows[:, 5], 0.4) == plain_keep_best(rows, 0.4)


def test_the_number_of_boxes_is_bounded():
    num = 3 * MAX_BOXES
    places = np.arange(num)[:, None] * [10, 0, 10, 0] + [0, 0, 5, 5]
    assert keep_best(places.astype(float), np.ones(num), np.zeros(num)) == list(range(MAX_BOXES))


def test_what_boxes_cover_is_counted_once():
    assert covered([]) == 0
    assert covered([Box("a", 1, 0, 0, 0.5, 0.5)]) == 0.25
    twice = [Box("a", 1, 0, 0, 0.5, 0.5), Box("a", 1, 0.25, 0, 0.75, 0.5)]
    assert covered(twice) == pytest.approx(0.375)
    rng, grid = np.random.default_rng(2), 40
    for _ in range(40):
        corners = rng.integers(0, grid, (rng.integers(1, 9), 4))
        corners = [(min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1) for a, b, c, d in corners]
        picture = np.zeros((grid, grid), dtype=bool)
        for left, top, right, bottom in corners:
            picture[top:bottom, left:right] = True
        boxes = [Box("a", 1, *(side / grid for side in corner)) for corner in corners]
        assert covered(boxes) == pytest.approx(picture.mean())


def test_rows_without_a_name_or_an_area_are_left_out_and_others_are_clipped():
    corners = np.array([[-1, 0.2, 0.5, 3], [0.3, 0.3, 0.3, 0.9], [1.5, 0, 2, 1], *[[0, 0, 1, 1]] * 3])
    classes = np.array([1, 1, 1, 0, 7, 1])
    scores = np.array([0.4, 0.9, 0.9, 0.9, 0.9, 0.09])
    assert boxes_of(["", "dog"], classes, scores, corners) == [Box("dog", 0.4, 0, 0.2, 0.5, 1)]
    nan = np.full((1, 4), np.nan)
    assert boxes_of(["dog"], np.array([0]), np.array([0.9]), nan) == []
    assert boxes_of(["dog"], np.array([0]), np.array([np.nan]), np.array([[0, 0, 1, 1]])) == []


def test_a_row_of_a_journal_gives_the_same_boxes_and_a_damaged_one_none():
    boxes = [Box("dog", 0.5, 0, 0.25, 1, 0.75), Box("wine glass", 0.123, 0.1, 0.2, 0.3, 0.4)]
    assert boxes_of_row(row_of_boxes(boxes)) == boxes
    assert boxes_of_row({"boxes": []}) == []
    good = ["dog", 0.5, 0, 0.25, 1, 0.75]
    for bad in (None, {}, "x", [good[:5]], [[5, *good[1:]]], [["dog", 2, *good[2:]]], [["dog", 0.5, 1, 0, 0, 1]]):
        assert boxes_of_row({"boxes": bad}) is None
    assert boxes_of_row({"boxes": [good] * (MAX_BOXES + 1)}) is None
    assert boxes_of_row({"boxes": [["dog", True, float("nan"), 0, 1, 1]]}) is None
