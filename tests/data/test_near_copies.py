"""Near-copies: which copies of one picture are found, what is not taken for one, and that groups are stable."""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from safelight.data.manifest import read_manifest, split_validation, write_manifest
from safelight.data.photo import Photo, row_of_photo
from safelight.data.prepare import near_copies
from safelight.data.prepare.ingest import ingest
from safelight.data.prepare.near_copies import find_near_copies, fingerprint, merge_groups, thumbnail
from safelight.trainer.tiny.scenes import draw, random_scene
from tests.called import call

NUM_PICTURES = 24


def picture(seed: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Return a picture with the spectrum of photographs: power falls with the square of frequency."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size[0]) * size[0], np.fft.fftfreq(size[1]) * size[1]))
    # smooth at the edges of the crop, as a photograph is
    waves = np.fft.ifft2(np.fft.fft2(random.standard_normal((3, size[1], size[0]))) / (frequency + 1) ** 1.2).real
    channels = 0.6 * waves.mean(0) + 0.4 * waves
    values = 127 + 50 * channels / channels.std()
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [picture(seed) for seed in range(NUM_PICTURES)]


def saved(image: Image.Image, image_format: str, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop(tuple(map(round, (left * width, top * height, (1 - right) * width, (1 - bottom) * height))))


COPIES = {
    "a quarter": lambda image: image.resize((image.width // 4, image.height // 4)),
    "double": lambda image: image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST),
    "JPEG 30": lambda image: saved(image, "JPEG", 30),
    "WebP 40": lambda image: saved(image, "WEBP", 40),
    "2 % off each side": lambda image: cropped(image, 0.02, 0.02, 0.02, 0.02),
    "5 % off the left": lambda image: cropped(image, 0.05, 0, 0, 0),
    "3 % and 4 % off, half as large, JPEG 50": lambda image: saved(
        cropped(image, 0.03, 0, 0, 0.04).resize((image.width // 2, image.height // 2)), "JPEG", 50
    ),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.15),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def pairs_of(images: list[Image.Image], is_new: list[bool] | None = None) -> list[tuple[int, int]]:
    thumbnails = [thumbnail(image) for image in images]
    aspects = [image.width / image.height for image in images]
    new = is_new or [True] * len(images)
    with tempfile.TemporaryDirectory() as folder:
        prints = [fingerprint(image) for image in images]
        return find_near_copies(prints, aspects, new, thumbnails.__getitem__, Path(folder))


@pytest.mark.parametrize("kind", COPIES)
def test_each_copy_is_found_and_nothing_else(pictures, kind):
    copies = [COPIES[kind](image) for image in pictures]
    assert sorted(pairs_of(pictures + copies)) == [(NUM_PICTURES + i, i) for i in range(NUM_PICTURES)]


def test_other_pictures_are_no_copies(pictures):
    """Neither unrelated pictures, nor flat ones, nor drawn scenes that share shape, colour or background."""
    flat = [Image.new("RGB", (64, 64), (shade, 20, 90)) for shade in range(0, 240, 30)]
    scenes = [draw(random_scene(7, number, in_look=True)).convert("RGB") for number in range(100)]
    turned = [image.rotate(90, expand=True) for image in pictures]
    halves = [image.crop((0, 0, 150, 200)) for image in pictures]
    assert pairs_of(pictures + flat + scenes + turned + halves) == []


def test_only_pairs_with_a_new_photo_are_compared(pictures, monkeypatch):
    copies = [COPIES["JPEG 30"](image) for image in pictures]
    is_new = [False] * NUM_PICTURES + [i < 3 for i in range(NUM_PICTURES)]
    assert sorted(pairs_of(pictures + copies, is_new)) == [(NUM_PICTURES + i, i) for i in range(3)]
    # blocks smaller than the set give the same pairs
    for name, size in (("ROWS", 5), ("COLUMNS", 7), ("PAIRS", 2)):
        monkeypatch.setattr(near_copies, name, size)
    assert sorted(pairs_of(pictures + copies)) == [(NUM_PICTURES + i, i) for i in range(NUM_PICTURES)]


def test_many_photos_of_one_scene_are_joined_without_looking_at_every_pair(pictures, monkeypatch):
    looked_at = []
    same_picture = near_copies.same_picture

    def counting(a, b):
        looked_at.append(len(a))
        return same_picture(a, b)

    monkeypatch.setattr(near_copies, "same_picture", counting)
    images = [*([pictures[0]] * 60), *([pictures[1]] * 60)]
    pairs = pairs_of(images)
    assert len(set(merge_groups([""] * 120, [f"{n}" for n in range(120)], pairs))) == 2
    # of 2 * 60 * 59 / 2 pairs
    assert sum(looked_at) < 600


def test_photos_without_a_fingerprint_or_a_file_match_nothing(pictures, tmp_path):
    texts = ["", fingerprint(pictures[0]), fingerprint(pictures[0])]
    assert find_near_copies(texts, [1.5] * 3, [True] * 3, lambda index: None, tmp_path) == []


def test_groups_keep_the_name_of_their_first_photo():
    names = list("abcdef")
    assert merge_groups([""] * 6, names, []) == [""] * 6
    assert merge_groups([""] * 6, names, [(3, 1), (5, 3)]) == ["", "b", "", "b", "", "b"]
    # a photo that joins two groups, one of them named after a photo that is gone
    assert merge_groups(["", "x", "x", "d", "", "d"], names, [(4, 2), (4, 3)]) == ["", "x", "x", "x", "x", "x"]
    # the rest of a group keeps its name, and so its side of the split
    assert merge_groups(["x", ""], names[:2], []) == ["x", ""]


def photo(number: int, group: str = "") -> Photo:
    sha256 = f"{number * 2654435761 % 2**64:016x}" * 4
    return Photo(f"images/{number}.png", sha256, 60, 40, ("a",), "s", "c", group=group)


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**64 - 1))
def test_a_group_is_on_one_side_and_the_order_does_not_matter(sizes, fraction, seed):
    photos = []
    for size in sizes:
        first = photo(len(photos))
        photos += [photo(len(photos) + i, first.sha256 if size > 1 else "") for i in range(size)]
    train, held_out = split_validation(photos, fraction, seed)
    assert sorted(p.file for p in train + held_out) == sorted(p.file for p in photos)
    assert train
    assert not {p.group for p in train if p.group} & {p.group for p in held_out if p.group}
    wanted = min(max(1, int(np.ceil(round(fraction * len(photos), 9)))), len(photos) - 1)
    # one group alone may be larger than what was asked for
    assert len(sizes) == 1 or 1 <= len(held_out) <= max(wanted, min(sizes))
    assert split_validation(photos[::-1], fraction, seed)[1] == held_out[::-1]


def test_without_groups_the_split_is_what_it_always_was():
    photos = [photo(number) for number in range(40)]
    held_out = [int(p.file[7:-4]) for p in split_validation(photos, 0.2, seed=5)[1]]
    assert held_out == [3, 6, 8, 9, 21, 26, 36, 38]


def test_a_copy_follows_the_photo_that_was_there_first():
    photos = [photo(number) for number in range(40)]
    train, held_out = split_validation(photos, 0.2, seed=5)
    for first in (held_out[0], train[0]):
        group = [dataclasses.replace(p, group=first.sha256) if p is first else p for p in photos]
        copies = [photo(number, first.sha256) for number in (100, 101)]
        new_held_out = {p.file for p in split_validation(group + copies, 0.2, seed=5)[1]}
        assert {p.file in new_held_out for p in (first, *copies)} == {first in held_out}


@pytest.fixture
def place(tmp_path, pictures):
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pictures[number].save(tmp_path / "photos" / f"scene {number}.png")
    return tmp_path


def groups_of(photos: list[Photo]) -> list[list[str]]:
    members: dict[str, list[str]] = {}
    for item in photos:
        if item.group:
            members.setdefault(item.group, []).append(item.source.removeprefix("photos/"))
    return sorted(members.values())


def test_prepare_groups_near_copies_and_says_so(place, pictures):
    ingest([place / "photos"], place / "dataset")
    before = read_manifest(place / "dataset")
    assert groups_of(before) == []
    for number in (1, 4):
        saved(pictures[number], "JPEG", 40).save(place / "photos" / f"web {number}.jpg")
    pictures[4].resize((150, 100)).save(place / "photos" / "small 4.png")
    called = call("prepare", place / "photos", "-o", place / "dataset")
    photos = read_manifest(place / "dataset")
    assert groups_of(photos) == [["scene 1.png", "web 1.jpg"], ["scene 4.png", "small 4.png", "web 4.jpg"]]
    assert {p.group for p in photos} == {"", before[1].sha256, before[4].sha256}
    assert "near-copies: 5 photographs show 2 pictures; those of one picture are held out or" in called.out
    called.line(
        "note: near-copies of photos/scene 4.png, held out or trained on together with it: photos/small 4.png, "
    )
    # ids, and with them every random draw, are those of before
    assert [(p.sha256, p.file) for p in photos[:6]] == [(p.sha256, p.file) for p in before]
    manifest = (place / "dataset" / "manifest.jsonl").read_bytes()
    printed = json.loads(call("prepare", place / "photos", "-o", place / "dataset", "--json").out)
    assert (place / "dataset" / "manifest.jsonl").read_bytes() == manifest
    assert printed["near_copies"][0] == ["photos/scene 1.png", "photos/web 1.jpg"]


def test_a_dataset_of_before_fingerprints_is_grouped_when_it_is_prepared_again(place, pictures):
    saved(pictures[2], "JPEG", 40).save(place / "photos" / "web 2.jpg")
    photos = ingest([place / "photos"], place / "dataset").photos
    rows = [{k: v for k, v in row_of_photo(p).items() if k not in ("fingerprint", "group")} for p in photos]
    (place / "dataset" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert groups_of(read_manifest(place / "dataset")) == []
    (place / "more").mkdir()
    pictures[9].save(place / "more" / "9.png")
    # photos of a source that is not given are compared by their stored files
    assert groups_of(ingest([place / "more"], place / "dataset").photos) == [["scene 2.png", "web 2.jpg"]]


@pytest.mark.parametrize(
    ("field", "value"),
    [("group", "x"), ("group", 5), ("fingerprint", "00"), ("fingerprint", None), ("group", "A" * 64)],
)
def test_groups_and_fingerprints_that_are_none_are_refused(tmp_path, field, value):
    write_manifest(tmp_path, [photo(1)])
    row = json.loads((tmp_path / "manifest.jsonl").read_text())
    (tmp_path / "manifest.jsonl").write_text(json.dumps({**row, field: value}))
    with pytest.raises(ValueError, match=f"line 1: '?{field}'? .*is (not what `safelight prepare` writes|5|None)"):
        read_manifest(tmp_path)
