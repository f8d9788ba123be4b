"""Sharpness and exposure of photographs, what captions have in common, near-copies that are dropped, HEIC."""

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from safelight.data import images
from safelight.data.images import RejectedImage, decode
from safelight.data.manifest import read_manifest, write_manifest
from safelight.data.photo import Photo, Tag
from safelight.data.prepare.caption_words import caption_words
from safelight.data.prepare.ingest import ingest
from safelight.data.prepare.quality import doubtful, measure
from tests.called import call


def scene(seed: int = 1, size: tuple[int, int] = (480, 320)) -> Image.Image:
    """Return a picture with detail of every size."""
    draws = np.random.default_rng(seed)
    layers = [
        Image.fromarray(draws.integers(0, 256, (4 << n, 6 << n, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for n in range(6)
    ]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8))


def test_a_blurred_picture_is_less_sharp_and_a_larger_one_is_not():
    sharp = measure(scene(size=(512, 384)))
    assert measure(scene(size=(512, 384)).filter(ImageFilter.GaussianBlur(4))).sharpness < sharp.sharpness / 10
    assert measure(scene(size=(2048, 1536))).sharpness == pytest.approx(sharp.sharpness, rel=0.35)
    assert measure(scene(3, (512, 384)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == measure(scene(3, (512, 384)))


def test_sharpness_is_the_variance_of_the_laplacian():
    pixels = np.zeros((3, 4), np.uint8)
    pixels[1, 1] = 90
    laplacian = np.zeros((3, 4))
    laplacian[1, 1] = -360
    laplacian[0, 1] = laplacian[2, 1] = laplacian[1, 0] = laplacian[1, 2] = 90
    found = measure(Image.fromarray(np.stack([pixels] * 3, axis=2)))
    assert found.sharpness == round(laplacian.var(), 1)
    assert found.brightness == round(90 / 12 / 255, 3)
    assert (found.dark, found.light) == (round(11 / 12, 3), 0)


def photo(number: int, caption: str = "a red house", **changes) -> Photo:
    return replace(Photo(f"images/{number}.png", f"{number:064x}", 9, 9, (caption,), f"p/{number}", "s"), **changes)


def test_photographs_to_look_at_are_named_the_least_sharp_first():
    usual = [photo(n, quality=measure(scene(n))) for n in range(10)]
    blurred = photo(16, quality=measure(scene().filter(ImageFilter.GaussianBlur(6))))
    night = photo(17, quality=replace(usual[0].quality, dark=0.8))
    found = doubtful([*usual, night, blurred, photo(18)])
    assert [one for one, _, _ in found] == [blurred, night]
    assert found[0][2].startswith("little fine detail (sharpness ")
    assert found[1][1:] == ("exposure", "80% of it is black")
    # among a few photographs nothing is usual
    assert doubtful([*usual[:5], blurred]) == []


def test_what_captions_have_in_common():
    photos = [
        photo(1, "A dog on the grass"),
        photo(2, "a dog"),
        photo(3, "a dog"),
        photo(4, ""),
        photo(5, "a cat's toy"),
    ]
    photos += [replace(photo(6, "dog"), tags=(Tag("on green grass"),))]
    found = caption_words(photos)
    assert found.captions == {"a dog": 2}
    assert list(found.words.items())[:2] == [("dog", 4), ("grass", 2)]
    assert "cat's" in found.words
    assert [one.source for one in found.short] == ["p/2", "p/3", "p/4"]


def test_equally_common_words_and_captions_have_one_order():
    """A photo's words are a set, whose order changes from one call to the next."""
    words = [f"{first}{second}" for first in "zyxw" for second in "dcba"]
    photos = [photo(number, text) for number, text in enumerate([" ".join(words), *"bbaacc"])]
    found = caption_words(photos)
    # "a" is none that says anything
    assert list(found.words) == ["b", "c", *sorted(words)[:8]]
    assert list(found.captions) == ["a", "b", "c"]


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(3):
        scene(number).save(source / f"{number}.png")
    scene(1).resize((240, 160)).save(source / "copy.png")
    return source


def test_only_the_largest_of_near_copies_stays(folder, tmp_path):
    summary = ingest([folder], tmp_path / "dataset", drop_near_copies=True)
    assert [p.source for p in summary.photos] == ["photos/0.png", "photos/1.png", "photos/2.png"]
    assert (summary.num_near_copies_dropped, summary.near_copies) == (1, [])
    (left_out,) = summary.rejected
    assert (left_out.path, left_out.kind) == ("photos/copy.png", "duplicate")
    assert "near-copy of photos/1.png" in left_out.reason
    assert summary.num_of_source == {str(folder): 3}
    assert len(list((tmp_path / "dataset" / "images").iterdir())) == 3
    # the same again, and all of them without the option
    assert ingest([folder], tmp_path / "dataset", drop_near_copies=True).photos == summary.photos
    assert len(ingest([folder], tmp_path / "dataset").photos) == 4


def test_the_largest_of_near_copies_takes_over_captions_and_masks(folder, tmp_path):
    """Of a person before a captioner; a mask is scaled, and left out where it does not fit or is mirrored."""
    dataset = tmp_path / "dataset"
    (folder / "copy.txt").write_text("by hand | dog:2")
    left = Image.new("L", (240, 160))
    left.paste(255, (0, 0, 120, 160))
    left.save(folder / "copy-mask.png")
    scene(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((240, 160)).save(folder / "mirrored.png")
    left.save(folder / "mirrored-mask.png")
    scene(2).crop((12, 0, scene(2).width, scene(2).height)).resize((230, 160)).save(folder / "crop.png")
    left.resize((230, 160)).save(folder / "crop-mask.png")
    (folder / "2.txt").write_text("its own")
    (folder / "crop.txt").write_text("not this")
    for _ in range(2):
        summary = ingest([folder], dataset, drop_near_copies=True)
        photos = {photo.source: photo for photo in summary.photos}
        assert list(photos) == [f"photos/{number}.png" for number in range(3)]
        assert (summary.num_near_copies_dropped, summary.num_captions_inherited) == (3, 1)
        assert summary.num_masks_inherited == 1
        assert [photo.captions[0] for photo in photos.values()] == ["0", "by hand", "its own"]
        assert photos["photos/1.png"].tags == (Tag("dog", 2),)
        with Image.open(dataset / photos["photos/1.png"].mask) as mask:
            assert mask.size == (photos["photos/1.png"].width, photos["photos/1.png"].height)
            assert (mask.getpixel((10, 10)), mask.getpixel((mask.width - 10, 10))) == (255, 0)
        assert [bool(photo.mask) for photo in photos.values()] == [False, True, False]
        reasons = {item.path: item.reason for item in summary.rejected}
        assert reasons["photos/copy.png"].endswith("and now uses the caption and mask of this one")
        assert reasons["photos/crop.png"].endswith("larger or sharper")
        assert [note.text.partition("; ")[0] for note in summary.notes if note.kind == "mask"] == [
            "photos/0.png: the mask of its near-copy photos/mirrored.png is not used: one is mirrored or damaged",
            "photos/2.png: the mask of its near-copy photos/crop.png is not used: their shapes differ, 230 x 160 px "
            f"and {photos['photos/2.png'].width} x {photos['photos/2.png'].height} px",
        ]
        assert sorted(path.name for path in (dataset / "masks").iterdir()) == [photos["photos/1.png"].mask[6:]]
    assert (
        "near-copies: 3 photographs dropped; the largest of each picture stays, 1 with the caption of a smaller one, "
        "1 with the mask of a smaller one\n"
    ) in call("prepare", folder, "-o", dataset, "--drop-near-duplicates").out


def test_quality_is_in_the_manifest_also_of_earlier_versions(folder, tmp_path):
    dataset = tmp_path / "dataset"
    photos = ingest([folder], dataset).photos
    assert all(p.quality is not None for p in photos)
    write_manifest(dataset, [replace(p, quality=None) for p in photos])
    ingest([folder], dataset)
    again = read_manifest(dataset)
    assert [p.quality for p in again] == [p.quality for p in photos]


def heic(image: Image.Image, **options) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    pillow_heif.register_heif_opener()
    content = io.BytesIO()
    image.save(content, "HEIF", **options)
    return content.getvalue()


def test_heic_photographs_are_read_upright_and_in_srgb(tmp_path):
    image = scene(size=(96, 64))
    decoded = decode(heic(image, quality=95))
    difference = np.abs(np.asarray(decoded.image, np.int16) - np.asarray(image, np.int16))
    assert (decoded.format, decoded.is_copyable) == ("HEIF", False)
    assert difference.mean() < 10
    # as iPhones store portraits: lying pixels, and which way is up
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode(heic(image, exif=exif.tobytes())).image.size == (64, 96)


def test_a_damaged_heic_is_left_out():
    content = heic(scene(size=(96, 64)))
    for damaged in (content[: len(content) // 2], content[:200] + bytes(len(content) - 200)):
        with pytest.raises(RejectedImage) as error:
            decode(damaged)
        assert not str(error.value).endswith(("\\n", "\n"))


def test_without_pillow_heif_the_reason_has_the_pip_line(monkeypatch):
    content = heic(scene(size=(96, 64)))
    monkeypatch.setattr(images, "_has_heif", lambda: False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(RejectedImage, match="pip install pillow-heif"):
        decode(content)
