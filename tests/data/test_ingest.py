"""`ingest`: what is copied, shrunk, rejected and reported as a duplicate, and what calling it again changes."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight.data.images import decode
from safelight.data.manifest import read_manifest, write_manifest
from safelight.data.photo import Tag
from safelight.data.prepare.ingest import NOTES_NAME, ingest
from safelight.data.sources.caption import is_camera_name
from safelight.errors import UserError


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "originals"
    folder.mkdir()
    return folder


@pytest.fixture
def dataset(tmp_path):
    return tmp_path / "dataset"


@pytest.mark.parametrize(("image_format", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_file_that_needs_no_change_is_copied_byte_for_byte(source, dataset, make_noise, image_format, suffix):
    original = source / f"a b_1.{suffix.upper()}"
    make_noise(1).save(original, image_format)
    summary = ingest([source], dataset)
    (photo,) = summary.photos
    assert (dataset / photo.file).read_bytes() == original.read_bytes()
    assert photo.file == f"images/a-b_1-{photo.sha256[:8]}.{suffix}"
    assert photo.sha256 == hashlib.sha256(original.read_bytes()).hexdigest()
    assert (photo.width, photo.height, photo.captions) == (40, 30, ("a b",))
    assert (summary.num_copied, summary.num_shrunk) == (1, 0)


def test_large_photo_is_shrunk_and_stored_in_the_given_format(source, dataset, make_noise):
    ramp = np.linspace(0, 255, 400, dtype=np.uint8)[None, :, None].repeat(200, 0).repeat(3, 2)
    Image.fromarray(ramp).save(source / "ramp.png")
    summary = ingest([source], dataset, max_megapixels=0.02, image_format="webp")
    (photo,) = summary.photos
    assert (photo.width, photo.height) == (200, 100)
    assert summary.num_shrunk == 1
    with Image.open(dataset / photo.file) as stored:
        assert stored.format == "WEBP"
        assert np.abs(np.asarray(stored)[50, :, 0] - np.linspace(0, 255, 200)).max() < 8


def test_rotated_photo_is_stored_upright(source, dataset):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, :30] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(source / "a.jpg", exif=exif, quality=95)
    (photo,) = ingest([source], dataset).photos
    assert (photo.width, photo.height) == (30, 60)
    with Image.open(dataset / photo.file) as stored:
        assert stored.getexif().get(0x0112, 1) == 1
        # rotated clockwise, so that the left half is now on top
        assert stored.getpixel((15, 10))[0] > 200 > 60 > stored.getpixel((15, 50))[0]


def test_originals_are_untouched(source, dataset, make_noise):
    make_noise(1, (400, 300)).save(source / "a.png")
    make_noise(2).save(source / "b.gif")
    (source / "b.txt").write_text("b")
    before = snapshot(source)
    ingest([source], dataset, max_megapixels=0.01)
    assert snapshot(source) == before


def test_duplicates_by_decoded_content_are_dropped_and_listed(source, dataset, make_noise):
    make_noise(1).save(source / "a.png")
    make_noise(1).save(source / "b.webp", lossless=True, exact=True)
    make_noise(1).save(source / "c.tiff")
    make_noise(2).save(source / "d.png")
    summary = ingest([source], dataset)
    assert [photo.captions[0] for photo in summary.photos] == ["a", "d"]
    assert summary.num_duplicates == 2
    assert [(os.path.basename(item.path), item.reason) for item in summary.rejected] == [
        ("b.webp", "same picture as originals/a.png"),
        ("c.tiff", "same picture as originals/a.png"),
    ]
    assert len(list((dataset / "images").iterdir())) == 2


def test_a_source_given_twice_is_listed_as_duplicates(source, dataset, make_noise):
    make_noise(1).save(source / "a.png")
    summary = ingest([source, source], dataset)
    assert (len(summary.photos), summary.num_duplicates, summary.num_copied) == (1, 1, 1)


def test_every_rejected_file_is_listed_and_none_is_fatal(source, dataset, make_noise):
    make_noise(1).save(source / "good.png")
    content = (source / "good.png").read_bytes()
    (source / "cut.png").write_bytes(content[: len(content) // 2])
    (source / "empty.jpg").write_bytes(b"")
    (source / "notes.md").write_text("hello")
    (source / "dangling.jpg").symlink_to(source / "nowhere.jpg")
    Image.new("RGB", (4, 4)).save(source / "dot.png")
    (source / ".hidden.png").write_bytes(content)
    (source / "captions.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    summary = ingest([source], dataset)
    assert len(summary.photos) == 1
    reasons = {os.path.basename(item.path): item.reason for item in summary.rejected}
    assert reasons.keys() == {"cut.png", "empty.jpg", "notes.md", "dangling.jpg", "dot.png", "captions.jsonl:1"}
    assert "truncated" in reasons["cut.png"]
    assert "not an image" in reasons["notes.md"]
    assert "No such file" in reasons["dangling.jpg"]
    assert "too small" in reasons["dot.png"]
    listed = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    assert {os.path.basename(row["path"]): row["reason"] for row in listed} == reasons


def test_no_warnings_of_pillow_reach_the_user(source, dataset, make_noise, recwarn, monkeypatch):
    """Neither a huge photo nor a damaged EXIF tag triggers a visible Python warning."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    make_noise(1).save(source / "huge.png")
    make_noise(2, (30, 30)).save(source / "tag.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)
    make_noise(3, (50, 50)).save(source / "bomb.png")
    summary = ingest([source], dataset)
    assert [photo.captions[0] for photo in summary.photos] == ["huge", "tag"]
    assert "decompression bombs" in summary.rejected[0].reason
    assert len(recwarn) == 0


def test_same_call_again_gives_the_same_dataset(source, dataset, make_noise):
    make_noise(1).save(source / "a.png")
    make_noise(2, (200, 150)).save(source / "b.gif")
    make_noise(1).save(source / "c.tiff")
    ingest([source], dataset, max_megapixels=0.02)
    before = {name: content for name, (content, _) in snapshot(dataset).items()}
    ingest([source], dataset, max_megapixels=0.02)
    assert {name: content for name, (content, _) in snapshot(dataset).items()} == before


def test_second_source_extends_the_manifest_and_finds_old_duplicates(tmp_path, source, dataset, make_noise):
    make_noise(1).save(source / "a.png")
    make_noise(2, (200, 150)).save(source / "large.png")
    first = ingest([source], dataset, max_megapixels=0.02).photos
    second_source = tmp_path / "more"
    second_source.mkdir()
    make_noise(3).save(second_source / "new.png")
    make_noise(1).save(second_source / "again.tiff")
    make_noise(2, (200, 150)).save(second_source / "large again.tiff")
    summary = ingest([second_source], dataset, max_megapixels=0.02)
    assert summary.photos[:2] == first
    assert [photo.captions[0] for photo in summary.photos[2:]] == ["new"]
    assert summary.num_duplicates == 2
    assert read_manifest(dataset) == summary.photos


def test_second_call_applies_changed_captions_settings_and_photos(source, dataset, make_noise):
    make_noise(1, (200, 150)).save(source / "a.png")
    make_noise(2).save(source / "b.png")
    ingest([source], dataset)
    (source / "a.txt").write_text("better words")
    photos = ingest([source], dataset, max_megapixels=0.02).photos
    assert [photo.captions[0] for photo in photos] == ["better words", "b"]
    assert photos[0].width * photos[0].height <= 20000
    # the file at the old size was deleted
    assert {f"images/{path.name}" for path in (dataset / "images").iterdir()} == {photo.file for photo in photos}
    make_noise(5).save(source / "b.png")
    summary = ingest([source], dataset, max_megapixels=0.02)
    assert len(summary.photos) == 3
    assert "b.png changed since it was last prepared" in summary.warnings[0]


def test_photo_deleted_from_the_dataset_is_removed_from_the_manifest(source, dataset, make_noise, tmp_path):
    for i in range(2):
        make_noise(i).save(source / f"{i}.png")
    photos = ingest([source], dataset).photos
    (dataset / photos[0].file).unlink()
    (source / "0.png").unlink()
    summary = ingest([source], dataset)
    assert summary.photos == photos[1:]
    assert "no longer exists" in summary.warnings[0]


def captioned_by_a_model(dataset, photos):
    """Write into the manifest what `safelight caption --overwrite` writes, with and without --tags."""
    said = {"caption_source": "captioner tiny", "captioner": '{"model": "tiny"}', "tagger": '{"model": "clip"}'}
    photos = [replace(p, captions=(f"said {i}",), tags=(Tag("dog", 2),), **said) for i, p in enumerate(photos)]
    write_manifest(dataset, photos)
    return photos


def test_a_photo_made_anew_from_the_same_file_keeps_what_models_said_of_it(source, dataset, make_noise):
    for i in range(3):
        make_noise(i).save(source / f"{i}.png")
    (source / "2.txt").write_text("by hand")
    before = captioned_by_a_model(dataset, ingest([source], dataset, max_megapixels=0.01).photos)
    for photo in before:
        (dataset / photo.file).unlink()
    make_noise(9).save(source / "1.png")
    summary = ingest([source], dataset, max_megapixels=0.01)
    after = {photo.source: photo for photo in summary.photos}
    assert after["originals/0.png"] == before[0]
    assert (after["originals/1.png"].captions, after["originals/1.png"].captioner) == (("1",), "")
    assert after["originals/2.png"].captions == ("by hand",)
    assert after["originals/2.png"].tags == (Tag("dog", 2),)
    assert [note.text for note in summary.notes if note.kind == "file"] == [
        f"{before[0].file} no longer existed; it was made anew from {source}/0.png, with the caption and tags that a "
        "model wrote",
        f"{before[2].file} no longer existed; it was made anew from {source}/2.png, with the tags that a model wrote",
        f"{before[1].file} no longer exists; its line was removed from the manifest",
    ]


def test_captions_of_the_source_that_replace_a_models_are_counted(source, dataset, make_noise):
    for i in range(3):
        make_noise(i).save(source / f"{i}.png")
    for i in range(2):
        (source / f"{i}.txt").write_text(f"by hand {i} | cat:2")
    captioned_by_a_model(dataset, ingest([source], dataset).photos)
    summary = ingest([source], dataset)
    assert [photo.captions[0] for photo in summary.photos] == ["by hand 0", "by hand 1", "said 2"]
    assert [note.text for note in summary.notes if note.kind == "caption"] == [
        f"2 photographs have the {what} of the source, no longer a model's, such as {source}/0.png; for the model's, "
        f"which are remembered, run `safelight caption {dataset}{option} --overwrite` again, with the options that "
        "it had"
        for what, option in (("caption", ""), ("tags", " --tags FILE"))
    ]
    assert [note for note in ingest([source], dataset).notes if note.kind == "caption"] == []


def test_folders_are_walked_sorted_without_loops_or_the_dataset(source, make_noise):
    (source / "b" / ".git").mkdir(parents=True)
    (source / "a").mkdir()
    for i, name in enumerate(("z.png", "b/y.png", "a/x.png", "b/.git/hidden.png")):
        make_noise(i).save(source / name)
    (source / "a" / "loop").symlink_to(source)
    (source / "b" / "up").symlink_to(source / "a")
    dataset = source / "dataset"
    for _ in range(2):
        summary = ingest([source], dataset)
        assert [photo.source for photo in summary.photos] == [f"originals/{x}.png" for x in ("a/x", "b/y", "z")]
        assert summary.rejected == []


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((200_000, 20), "200000 x 20 px, shrunk to 122474 x 12 px is too narrow; each side needs at least 16 px: crop"),
        ((30, 100_000), "30 x 100000 px, shrunk to 21 x 70710 px: jpeg allows at most 65500 px a side; crop it"),
        ((70_000, 16), "70000 x 16 px: jpeg allows at most 65500 px a side; crop it"),
    ],
)
def test_a_picture_too_narrow_for_its_length_is_listed_with_its_own_size(source, dataset, size, reason):
    Image.new("L", size).save(source / "long.png")
    with pytest.raises(UserError, match=reason):
        ingest([source], dataset)


def test_photographs_that_are_links_out_of_the_source_are_copied_with_a_note(tmp_path, source, dataset, make_noise):
    (tmp_path / "elsewhere").mkdir()
    for i, name in enumerate(("a.png", "b.png")):
        make_noise(i).save(tmp_path / "elsewhere" / name)
        (source / name).symlink_to(tmp_path / "elsewhere" / name)
    make_noise(2).save(source / "inside.png")
    (source / "same.png").symlink_to("inside.png")
    summary = ingest([source], dataset)
    assert len(summary.photos) == 3
    assert [note.text for note in summary.notes if note.kind == "link"] == [
        f"2 photographs lie behind links out of the folder, such as {source}/a.png; the dataset has a copy of what is "
        "there"
    ]


def test_of_a_folder_that_is_a_link_out_of_the_source_only_photographs_are_read(tmp_path, source, dataset, make_noise):
    private = tmp_path / "private"
    (private / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "deep/c.png")):
        make_noise(i).save(private / name)
    (private / "a.txt").write_text("a secret")
    (private / "captions.jsonl").write_text('{"file_name": "b.png", "text": "a secret"}')
    (private / "global.yaml").write_text("repeats: 7")
    (private / "data.tar").write_bytes(b"")
    make_noise(3, mode="L").save(private / "deep" / "c-mask.png")
    (source / "x").symlink_to(private)
    # masks that are links: out of the source, and inside it
    for i, name in ((4, "d"), (5, "e")):
        make_noise(i).save(source / f"{name}.png")
    make_noise(6, mode="L").save(source / ".mask", "PNG")
    (source / "d-mask.png").symlink_to(private / "deep" / "c-mask.png")
    (source / "e-mask.png").symlink_to(source / ".mask")
    summary = ingest([source], dataset)
    photos = {photo.source.partition("/")[2]: photo for photo in summary.photos}
    assert {name: (photo.captions, photo.settings.repeats, bool(photo.mask)) for name, photo in photos.items()} == {
        "d.png": (("d",), 1, False),
        "e.png": (("e",), 1, True),
        "x/a.png": (("a",), 1, False),
        "x/b.png": (("b",), 1, False),
        "x/deep/c.png": (("c",), 1, False),
    }
    assert [note.text for note in summary.notes if note.kind == "link"] == [
        f"3 photographs lie behind links out of the folder, such as {source}/x/a.png; the dataset has a copy of what "
        "is there",
        f"4 files with captions, settings or masks not read, behind links out of the folder, such as {source}/x/a.txt; "
        f"give {private} as a source of its own, or copy it",
    ]
    listed = {Path(item.path).relative_to(source).as_posix(): item.reason for item in summary.rejected}
    assert listed["d-mask.png"] == "a link out of this folder, which is not followed; copy the file it points to"
    assert listed["x/data.tar"].startswith("in a folder that is a link out of this one, where only photographs are")


def test_single_files_are_sources_too(source, dataset, make_noise):
    for i in range(2):
        make_noise(i).save(source / f"n{i}.png")
    (source / "captions.jsonl").write_text('{"file_name": "n1.png", "text": "a caption"}\n')
    assert [photo.captions for photo in ingest([source / "n1.png"], dataset).photos] == [("a caption",)]


def test_progress_counts_every_file(source, dataset, make_noise):
    for i in range(7):
        make_noise(i).save(source / f"{i}.png")
    calls = []
    ingest([source], dataset, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 7) for i in range(1, 8)]


def test_errors_name_the_value_and_the_fix(tmp_path, source, dataset, make_noise):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        ingest([tmp_path / "nowhere"], dataset)
    with pytest.raises(ValueError, match="no photos found"):
        ingest([source], dataset)
    (source / "a.jpg").write_bytes(b"x")
    (source / "b.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"2 rejected\); the first is .*a\.jpg: not an image"):
        ingest([source], dataset)
    assert not (dataset / "manifest.jsonl").exists()
    make_noise(1).save(source / "good.png")
    ingest([source], dataset)
    with pytest.raises(ValueError, match="is inside the dataset folder"):
        ingest([dataset / "images"], dataset)
    with pytest.raises(ValueError, match="quality 0"):
        ingest([source], dataset, quality=0)


@pytest.mark.parametrize(
    ("name", "safe"),
    [("Ünï çode", "Uni-code"), ("日本", "photo"), ("a/..b".replace("/", " "), "a-..b"), ("x" * 200, "x" * 64)],
)
def test_stored_file_names_are_portable(source, dataset, make_noise, name, safe):
    make_noise(1).save(source / f"{name}.png")
    (photo,) = ingest([source], dataset).photos
    assert photo.file == f"images/{safe}-{photo.sha256[:8]}.png"


def test_reencoded_pixels_are_close_to_the_original(source, dataset, make_noise):
    image = make_noise(8, mode="RGBA")
    image.save(source / "a.png")
    (photo,) = ingest([source], dataset, quality=100).photos
    stored = np.asarray(decode((dataset / photo.file).read_bytes()).image, float)
    original = np.asarray(decode((source / "a.png").read_bytes()).image, float)
    assert np.abs(stored - original).mean() < 2


def test_duplicates_keep_the_written_caption(tmp_path):
    """Even if the file without one comes first, in this call or in an earlier one."""
    source = tmp_path / "photos"
    source.mkdir()
    Image.new("RGB", (80, 60), "teal").save(source / "a beach at night_3.jpg")
    ingest([source], tmp_path / "before")
    (source / "z.jpg").write_bytes((source / "a beach at night_3.jpg").read_bytes())
    (source / "captions.jsonl").write_text(json.dumps({"file_name": "z.jpg", "text": "a man in a beanie"}))
    for dataset in ("before", "anew", "anew"):
        summary = ingest([source], tmp_path / dataset)
        (photo,) = read_manifest(tmp_path / dataset)
        assert photo.captions == ("a man in a beanie",)
        assert photo.caption_source == "captions.jsonl"
        (rejection,) = summary.rejected
        assert rejection.reason == f"same picture as {photo.source}, which now uses the caption of this file"


def test_another_dataset_among_the_photos_is_skipped(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    Image.new("RGB", (80, 60), "teal").save(source / "one.png")
    ingest([source], source / "dataset")
    summary = ingest([source], tmp_path / "other")
    assert [photo.source for photo in summary.photos] == ["photos/one.png"]
    assert [(Path(r.path).name, r.reason) for r in summary.rejected] == [
        ("dataset", "a dataset made by `safelight prepare`, not a folder of originals")
    ]


@pytest.mark.parametrize(
    "caption", ["IMG", "DSC01234", "P1010001", "20230801 123456", "PXL", "", "photo (3)", "Screenshot"]
)
def test_camera_names_are_recognized(caption):
    assert is_camera_name(caption)


@pytest.mark.parametrize("caption", ["a cat", "IMG of a cat", "Paris", "portrait 3", "sand"])
def test_words_are_not_camera_names(caption):
    assert not is_camera_name(caption)


def test_names_of_the_other_kind_in_the_dataset_are_refused_before_any_work(source, dataset, make_noise):
    make_noise(1).save(source / "a.png")
    for name in ("images", "manifest.jsonl", NOTES_NAME, "rejected.jsonl", "sources.json"):
        dataset.mkdir()
        (dataset / name).touch() if name == "images" else (dataset / name).mkdir()
        with pytest.raises(UserError, match=f"{name} is a f.* where a dataset keeps a f.*; move it away"):
            ingest([source], dataset, progress=lambda *_: pytest.fail("a photo was read"))
        assert os.listdir(dataset) == [name]
        dataset.rename(dataset.with_name(f"refused {name}"))


@pytest.mark.parametrize("name", [".a.png.1-2.tmp", ".a\nb.tmp"])
def test_what_has_the_name_of_a_half_written_file_is_in_nobodys_way(source, dataset, make_noise, name):
    make_noise(1).save(source / "a.png")
    (source / "outside").write_text("precious")
    (dataset / "masks").mkdir(parents=True)
    (dataset / "images" / name).mkdir(parents=True)
    (dataset / "images" / ".b.tmp").touch()
    (dataset / "masks" / name).symlink_to("../images")
    ingest([source], dataset)
    assert [path.name for path in (dataset / "images").iterdir() if path.name.startswith(".")] == [name]
    assert list((dataset / "masks").iterdir()) == []


@pytest.mark.parametrize("name", ["manifest.jsonl", "./sources.json", "images", "images/.", "images/sub"])
def test_a_manifests_line_cannot_name_what_else_of_a_dataset_is_deleted(source, dataset, make_noise, name):
    make_noise(1).save(source / "a.png")
    ingest([source], dataset)
    (dataset / "images" / "sub").mkdir()
    before = sorted(path.relative_to(dataset) for path in dataset.rglob("*"))
    row = json.loads((dataset / "manifest.jsonl").read_text())
    planted = {**row, "sha256": "0" * 64, "source": "x/y.png", "mask": name, "mask_sha256": "0" * 64}
    with open(dataset / "manifest.jsonl", "a") as manifest:
        manifest.write(json.dumps({**planted, "file": "images/gone.png"}) + "\n")
    summary = ingest([source], dataset)
    assert any("images/gone.png no longer exists" in note.text for note in summary.notes)
    assert sorted(path.relative_to(dataset) for path in dataset.rglob("*")) == sorted(
        [*before, Path("prepare_notes.txt")]
    )


def plant(dataset, mask):
    """Add a line to the manifest whose photo is gone, so that its mask is deleted."""
    row = json.loads((dataset / "manifest.jsonl").read_text().splitlines()[0])
    planted = {**row, "sha256": "0" * 64, "source": "x/y.png", "mask": mask, "mask_sha256": "0" * 64}
    with open(dataset / "manifest.jsonl", "a") as manifest:
        manifest.write(json.dumps({**planted, "file": "images/gone.png"}) + "\n")


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize(
    ("link", "target", "mask"),
    [
        ("images", ".", "images/cache/index.sqlite"),
        ("masks", "cache", "masks/index.sqlite"),
        ("images/sub", "../cache", "images/sub/index.sqlite"),
        ("masks/sub", "..", "masks/sub/cache/index.sqlite"),
    ],
)
def test_nothing_behind_a_link_is_deleted(source, dataset, make_noise, link, target, mask, prune):
    make_noise(1).save(source / "a.png")
    ingest([source], dataset)
    (dataset / "cache").mkdir()
    (dataset / "cache" / "index.sqlite").write_text("precious")
    (dataset / "cache" / ".index.tmp").write_text("precious")
    (dataset / "masks").mkdir(exist_ok=True)
    if "/" not in link:
        (dataset / link).rename(dataset / "was")
    (dataset / link).symlink_to(target)
    plant(dataset, mask)
    if "/" in link:
        ingest([source], dataset, prune=prune)
    else:
        with pytest.raises(UserError, match=f"{link} is a link where a dataset keeps a folder; replace it by what"):
            ingest([source], dataset, prune=prune)
    assert sorted(os.listdir(dataset / "cache")) == [".index.tmp", "index.sqlite"]


@pytest.mark.parametrize("name", ["images/{}", "images//{}", "images/./{}", "./images/{}", "masks/sub/{}"])
def test_a_used_photo_is_not_deleted_under_another_name(source, dataset, make_noise, name):
    make_noise(1).save(source / "a.png")
    (photo,) = ingest([source], dataset).photos
    (dataset / "masks").mkdir(exist_ok=True)
    (dataset / "masks" / "sub").symlink_to("../images")
    plant(dataset, name.format(photo.file.split("/")[1]))
    ingest([source], dataset)
    assert (dataset / photo.file).is_file()


def test_a_mask_in_a_folder_of_the_masks_is_deleted_with_its_photo(source, dataset, make_noise):
    make_noise(1).save(source / "a.png")
    ingest([source], dataset)
    (dataset / "masks" / "sub").mkdir(parents=True)
    (dataset / "masks" / "sub" / "m.png").touch()
    plant(dataset, "masks/sub/m.png")
    ingest([source], dataset)
    assert os.listdir(dataset / "masks" / "sub") == []


def test_photos_behind_a_link_that_leads_nowhere_are_not_pruned(source, dataset, make_noise, tmp_path):
    """As on a disk that is not mounted: nothing is known about them."""
    (tmp_path / "disk").mkdir()
    make_noise(1).save(source / "here.png")
    make_noise(2).save(tmp_path / "disk" / "there.png")
    (source / "link").symlink_to(tmp_path / "disk")
    assert len(ingest([source], dataset).photos) == 2
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    assert len(ingest([source], dataset, prune=True).photos) == 2
    (source / "link").unlink()
    assert len(ingest([source], dataset, prune=True).photos) == 1


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"])
def test_thumbnails_and_deleted_files_of_a_network_drive_are_no_photographs(source, dataset, make_noise, name):
    (source / "2024" / name / "IMG_1.jpg").mkdir(parents=True)
    make_noise(1).save(source / "2024" / "IMG_1.jpg")
    make_noise(2).save(source / "2024" / name / "IMG_1.jpg" / "SYNOPHOTO_THUMB_XL.jpg")
    summary = ingest([source], dataset)
    assert [photo.source for photo in summary.photos] == ["originals/2024/IMG_1.jpg"]
    (item,) = summary.rejected
    assert item.path.endswith(f"2024/{name}")
    assert item.reason == "a folder for thumbnails or deleted files, which is not entered"
    # earlier versions entered it
    lines = (dataset / "manifest.jsonl").read_text()
    lines = lines.replace("2024/IMG_1.jpg", f"2024/{name}/IMG_1.jpg/SYNOPHOTO_THUMB_XL.jpg")
    (dataset / "manifest.jsonl").write_text(lines)
    (source / "2024" / "IMG_1.jpg").unlink()
    make_noise(3).save(source / "2024" / "IMG_3.jpg")
    summary = ingest([source], dataset)
    assert len(summary.photos) == 2
    assert any("is in a folder for thumbnails or deleted files; the dataset keeps" in text for text in summary.warnings)
    (photo,) = ingest([source], dataset, prune=True).photos
    assert photo.source == "originals/2024/IMG_3.jpg"


@pytest.mark.parametrize("name", ["sources.json", "rejected.jsonl"])
def test_lists_of_a_folder_that_is_no_dataset_are_not_overwritten(source, dataset, make_noise, name):
    make_noise(1).save(source / "a.png")
    dataset.mkdir(exist_ok=True)
    (dataset / name).write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=f"is no dataset and holds {name}, which would be overwritten"):
        ingest([source], dataset)
    assert (dataset / name).read_text() == '{"mine": 1}\n'


def test_a_first_call_without_usable_photos_can_be_repeated(source, dataset, make_noise):
    (source / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="can be used"):
        ingest([source], dataset)
    assert (dataset / "rejected.jsonl").is_file()
    make_noise(1).save(source / "a.png")
    assert len(ingest([source], dataset).photos) == 1
