"""Crops of detected things: what is found and kept, the record that comes of it, and what its sentence may say."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from safelight.errors import UserError
from safelight.trainer.captioning.journal import Form
from safelight.trainer.evaluation.crops import (
    Picture,
    compare_crops,
    crop_area,
    find_crops,
    sentence,
)
from safelight.trainer.features.cache import FeatureCache
from safelight.trainer.metrics.crop_divergence import OTHER, Beyond, Crops
from safelight.trainer.report.evaluation import ClassDivergence, CropDivergence
from safelight.trainer.tagging.boxes import Box, boxes_of_row, row_of_boxes
from safelight.trainer.tagging.taggers import TaggerSource, open_detector

CPU = torch.device("cpu")
SHARED = Path(os.environ.get("SAFELIGHT_SHARED", "/nowhere"))
CAT = Box("cat", 0.9, 0.25, 0.25, 0.75, 0.75)


class Finder:
    """A detector that finds the same in every picture, and counts what it looked at."""

    device = CPU

    def __init__(self, *boxes: Box):
        self.boxes, self.num_seen = list(boxes), 0

    def look(self, images):
        self.num_seen += len(images)
        return [self.boxes for _ in images]

    def source(self, weights: str = "a" * 16) -> TaggerSource:
        form = Form("boxes", row_of_boxes, boxes_of_row)
        return TaggerSource("finder", {"kind": "boxes", "weights": weights}, form, lambda device: self)


class Colours:
    """An extractor: mean and spread of each channel."""

    name, fingerprint, width = "colours", "c" * 16, 6

    def features(self, images):
        pixels = [np.asarray(image, dtype=np.float32).reshape(-1, 3) for image in images]
        return np.stack([np.concatenate([each.mean(0), each.std(0)]) for each in pixels]).astype(np.float32)


def pictures(num: int, tag: str, seed: int, contrast: float = 1.0) -> list[Picture]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(num):
        base = rng.integers(60, 190, 3)
        noise = rng.normal(0, rng.uniform(8, 24), (32, 32, 3))
        values = np.clip(128 + contrast * (base + noise - 128), 0, 255)
        image = Image.fromarray(values.astype(np.uint8))
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        made.append(Picture(digest, f"{tag}{number}", lambda image=image: image))
    return made


def found(folder, *args, detector=None, **kwargs) -> Crops:
    return find_crops(
        pictures(*args, **kwargs), (detector or Finder(CAT)).source(), FeatureCache(folder, Colours()), CPU, folder
    )


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        # grown by a tenth on each side
        (Box("x", 1, 0.4, 0.4, 0.6, 0.6), (100, 100), (38, 38, 62, 62)),
        # to a square; moved inside at an edge
        (Box("x", 1, 0.0, 0.4, 0.1, 0.9), (100, 100), (0, 35, 60, 95)),
        (Box("x", 1, 0.9, 0.9, 1.0, 1.0), (100, 100), (88, 88, 100, 100)),
        # not larger than the picture
        (Box("x", 1, 0.0, 0.0, 1.0, 1.0), (100, 60), (0, 0, 100, 60)),
        (Box("x", 1, 0.3, 0.0, 0.7, 1.0), (100, 60), (14, 0, 86, 60)),
        (Box("x", 1, 0.5, 0.5, 0.501, 0.501), (10, 10), (5, 5, 6, 6)),
    ],
)
def test_a_crop_is_a_square_with_something_around_inside_the_picture(box, size, expected):
    assert crop_area(box, size) == expected


def test_one_crop_of_a_class_and_group_the_largest_and_none_that_are_doubtful_or_small(tmp_path):
    boxes = (
        CAT,
        Box("cat", 0.8, 0.0, 0.0, 0.2, 0.2),
        Box("dog", 0.3, 0.0, 0.0, 0.5, 0.5),
        Box("cup", 0.29, 0.0, 0.0, 0.5, 0.5),
        Box("pen", 0.9, 0.0, 0.0, 0.9, 0.06),
    )
    images = pictures(3, "a", 0)
    images[2] = Picture(images[2].sha256, "a0", images[2].decode)
    crops = find_crops(images, Finder(*boxes).source(), FeatureCache(tmp_path, Colours()), CPU, tmp_path)
    assert list(zip(crops.names, crops.groups, strict=True)) == [("cat", g) for g in ("a0",)] + [
        ("dog", "a0"),
        ("cat", "a1"),
        ("dog", "a1"),
    ]
    expected = Colours().features([images[0].decode().crop((6, 6, 25, 25))])
    assert crops.features[0] == pytest.approx(expected[0])
    assert crops.sizes[0] == pytest.approx(0.25)


def test_boxes_are_kept_by_picture_and_detector(tmp_path):
    finder, images = Finder(CAT), pictures(20, "a", 0)
    seen = []
    first = find_crops(
        images, finder.source(), FeatureCache(tmp_path, Colours()), CPU, tmp_path, lambda *done: seen.append(done)
    )
    assert (finder.num_seen, seen[0], seen[-1]) == (20, (0, 20), (20, 20))
    # neither the detector nor the extractor needs a picture again
    known = [Picture(picture.sha256, picture.group, pytest.fail) for picture in images]
    again = find_crops(known, finder.source(), FeatureCache(tmp_path, Colours()), CPU, tmp_path)
    assert finder.num_seen == 20
    assert (again.features == first.features).all()
    # another picture, and another detector
    find_crops([*images, *pictures(1, "b", 9)], finder.source(), FeatureCache(tmp_path, Colours()), CPU, tmp_path)
    assert finder.num_seen == 21
    find_crops(images, finder.source("b" * 16), FeatureCache(tmp_path, Colours()), CPU, tmp_path)
    assert finder.num_seen == 41
    # a damaged journal is found anew
    for path in (tmp_path / "boxes").iterdir():
        path.write_text('{"sha256": "' + images[0].sha256 + '", "boxes": [["cat", 7, 0, 0, 1, 1]]}\n')
    find_crops(images, finder.source(), FeatureCache(tmp_path, Colours()), CPU, tmp_path)
    assert finder.num_seen == 61


def test_pictures_without_things_give_no_crops(tmp_path):
    crops = found(tmp_path, 5, "a", 0, detector=Finder())
    assert crops.features.shape == (0, 6)
    record = compare_crops("step-3", crops, crops, crops, "finder", "colours")
    assert "0 things in your photographs, 0 things in the base's" in record.sentence
    assert (record.points, record.gain) == ((), None)


def test_an_extractor_that_sees_nothing_is_named(tmp_path):
    blind = Crops(np.ones((30, 4)), ["cat"] * 30, [str(number) for number in range(30)], [1.0] * 30)
    with pytest.raises(UserError, match="lite finds no difference between any crops"):
        compare_crops("step-3", blind, blind, blind, "finder", "lite")


def test_a_model_that_came_nearer_and_one_that_burnt(tmp_path):
    real = found(tmp_path, 80, "photo", 1)
    base, trained = found(tmp_path, 60, "prompt", 2, contrast=1.5), found(tmp_path, 60, "prompt", 2, contrast=1.05)
    better = compare_crops("step-30", real, base, trained, "finder", "colours")
    assert CropDivergence.model_validate_json(better.model_dump_json()) == better
    assert [(each.first, each.second) for each in better.divergences] == [("BM", "TM"), ("OD", "TM"), ("OD", "BM")]
    assert better.gain.value < 0
    assert better.gain.p < 0.05
    assert "differ from those in your photographs less than the base's do" in better.sentence
    pooled = [each.pooled for each in better.divergences]
    assert (pooled[1].num_first, pooled[1].num_second, pooled[1].is_grey) == (80, 60, False)
    assert f"{pooled[1].kl:.2f} against {pooled[2].kl:.2f}" in better.sentence
    assert {point.set for point in better.points} == {"BM", "TM", "OD"}
    assert len(better.points) == 200
    worse = compare_crops("step-90", real, trained, base, "finder", "colours")
    assert worse.gain.value > 0
    assert "more than the base's do" in worse.sentence
    assert "training made the pictures worse" in worse.sentence


def test_the_same_pictures_twice_are_no_change(tmp_path):
    real, base = found(tmp_path, 60, "photo", 1), found(tmp_path, 60, "prompt", 2)
    same = compare_crops("step-0", real, base, base, "finder", "colours")
    assert (same.divergences[0].pooled.kl, same.divergences[0].pooled.p) == (pytest.approx(0, abs=1e-6), 1)
    assert same.gain.p == 1
    assert "no change by training is seen" in same.sentence


def test_too_few_things_are_said_to_be_so(tmp_path):
    few = compare_crops(
        "step-3", found(tmp_path, 60, "p", 1), found(tmp_path, 60, "q", 2), found(tmp_path, 19, "q", 3), "f", "c"
    )
    assert few.gain is None
    assert [each.pooled for each in few.divergences] == [None, None, None]
    assert few.sentence.startswith(
        "Too few things were found for a comparison: 60 things in your photographs, 60 things"
    )
    assert "19 things in the trained model's" in few.sentence
    # the classes of two sets that have enough are there all the same
    assert [each.name for each in few.divergences[2].classes] == [OTHER]
    grey = compare_crops(
        "step-3", found(tmp_path, 60, "p", 1), found(tmp_path, 30, "q", 2), found(tmp_path, 30, "q", 3), "f", "c"
    )
    assert grey.divergences[0].pooled.is_grey
    assert grey.sentence.endswith("That is from few pictures: take it as a hint.")


def pooled(kl: float, p: float, is_grey: bool = False) -> ClassDivergence:
    return ClassDivergence(
        name="all", num_first=60, num_second=60, kl=kl, z=3.0, p=p, mmd=0.1, mmd_z=1.0, mmd_p=0.1, is_grey=is_grey
    )


@pytest.mark.parametrize(
    ("change", "to_trained", "to_base", "difference", "has", "lacks"),
    [
        (
            (0.5, 0.001),
            (0.02, 0.4),
            (1.3, 0.001),
            (-1.2, 0.001),
            ["less", "0.02 against 1.30", "no more than chance"],
            [],
        ),
        ((0.5, 0.001), (0.4, 0.001), (1.3, 0.001), (-0.9, 0.001), ["less"], ["chance", "worse"]),
        ((0.5, 0.001), (1.3, 0.001), (0.4, 0.001), (0.9, 0.001), ["more", "worse"], ["less", "chance"]),
        (
            (0.5, 0.001),
            (0.9, 0.001),
            (0.8, 0.001),
            (0.1, 0.4),
            ["as far from", "did change them (0.50"],
            ["less", "worse"],
        ),
        ((0.0, 0.5), (0.9, 0.001), (0.8, 0.001), (0.1, 0.4), ["as far from", "no change by training"], ["less", "did"]),
        ((0.0, 0.5), (-0.1, 0.8), (0.03, 0.3), (-0.1, 0.4), ["Neither", "0.00 against 0.03", "no change"], ["less"]),
        ((9.0, 0.5), (1234.5, 0.001), (12.3, 0.001), (1222, 0.001), ["1,234 against 12 ("], []),
    ],
)
def test_what_the_sentence_says(change, to_trained, to_base, difference, has, lacks):
    value, p = difference
    text = sentence(pooled(*change), pooled(*to_trained), pooled(*to_base), Beyond(value, 4.0, p), {})
    assert all(part in text for part in has), text
    assert not any(part in text for part in lacks), text
    assert text.endswith(".")
    assert "hint" not in text
    assert "hint" in sentence(
        pooled(*change, is_grey=True), pooled(*to_trained), pooled(*to_base), Beyond(value, 4.0, p), {}
    )


@pytest.mark.slow
def test_real_things_in_real_photographs(tmp_path):
    """YOLOX nano on shared photographs: burnt ones are further from others than unchanged ones are."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = SHARED / "weights" / "yolox_nano" / "yolox_nano.onnx"
    if not model.is_file():
        pytest.skip("SAFELIGHT_SHARED names no folder with the detector")
    paths = sorted((SHARED / "photos").glob("*.jpg"))

    def altered(change, part, tag):
        def load(path):
            image = Image.open(path).convert("RGB")
            image.thumbnail((256, 256))
            return change(image)

        digest = [hashlib.sha256(f"{change.__name__} {path}".encode()).hexdigest() for path in paths[part::3]]
        return [
            Picture(digest, f"{tag} {path}", lambda path=path: load(path))
            for digest, path in zip(digest, paths[part::3], strict=True)
        ]

    def unchanged(image):
        return image

    def burnt(image):
        return ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(2)).enhance(2)

    with open_detector(str(model)) as source:
        real, half, burnt_half = (
            find_crops(altered(change, part, f"{part}"), source, FeatureCache(tmp_path, Colours()), CPU, tmp_path)
            for change, part in ((unchanged, 0), (unchanged, 1), (burnt, 1))
        )
    record = compare_crops("step-9", real, half, burnt_half, "yolox", "colours")
    by_sets = {(each.first, each.second): each.pooled for each in record.divergences}
    assert by_sets["OD", "BM"].p > 0.01
    assert by_sets["OD", "TM"].z > 4
    assert record.gain.value > 0
    assert record.gain.p < 0.01
    assert "training made the pictures worse" in record.sentence
