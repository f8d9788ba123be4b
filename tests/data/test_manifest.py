"""The manifest: round trip, errors that name the bad line, and a validation split independent of the order."""

import dataclasses
import hashlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from safelight.data import manifest
from safelight.data.atomic import atomic_write_bytes
from safelight.data.manifest import has_manifest, how_to_prepare, read_manifest, split_validation, write_manifest
from safelight.data.photo import MAX_CAPTIONS, Credit, Photo, PhotoSettings, Quality, Tag, row_of_photo
from safelight.errors import UserError
from tests.called import call


def photo(i: int) -> Photo:
    digest = hashlib.sha256(str(i).encode()).hexdigest()
    return Photo(f"images/{i}.jpg", digest, 10 + i, 20, (f"a „photo“ {i}", "b\u2028c"), "s", "c")


def test_round_trip_keeps_every_field(tmp_path):
    photos = [photo(i) for i in range(5)]
    write_manifest(tmp_path, photos)
    assert read_manifest(tmp_path) == photos


def test_sample_id_is_the_head_of_the_sha256():
    assert photo(3).sample_id == int.from_bytes(hashlib.sha256(b"3").digest()[:7], "big")


def test_missing_manifest_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="safelight prepare"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("command", ["caption {}", "cache {toml} --data.path {}"])
def test_a_manifest_in_place_of_its_folder_is_one_line(tmp_path, command):
    write_manifest(tmp_path, [photo(1)])
    (tmp_path / "run.toml").write_text('[run]\ndevice = "cpu"\n[model]\nbase = "tiny"\n')
    words = command.format(tmp_path / "manifest.jsonl", toml=tmp_path / "run.toml").split()
    expected = f"{tmp_path}/manifest.jsonl is the manifest of a dataset; give its folder: {tmp_path}"
    call(*words).assert_refused(words[0], expected)


@pytest.mark.parametrize("picture", ["IMG 1.JPG", "2021/summer/a.heic"])
def test_a_folder_of_photographs_in_place_of_a_dataset_gets_the_exact_command(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my photos" / picture
    path.parent.mkdir(parents=True)
    path.touch()
    command = "safelight prepare 'my photos' -o 'datasets/my photos'"
    with pytest.raises(UserError) as refused:
        read_manifest(Path("my photos"))
    assert str(refused.value) == (
        f"my photos holds photographs and is no dataset yet; run `{command}`, then set data.path to datasets/my photos"
    )
    # never into the folder of the photographs itself
    (tmp_path / "datasets").symlink_to(tmp_path)
    sibling = tmp_path / "my photos-prepared"
    assert how_to_prepare(Path("my photos")) == (f"safelight prepare 'my photos' -o '{sibling}'", sibling)
    (tmp_path / "words.txt").touch()
    assert how_to_prepare(Path("none")) == ("safelight prepare PHOTOS -o none", Path("none"))


def test_empty_manifest_is_refused(tmp_path):
    write_manifest(tmp_path, [])
    with pytest.raises(ValueError, match="lists no photos"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line[:-5], "line 3"),
        (lambda line: "[1]", "not an object"),
        (lambda line: line.replace('"width": 12', '"width": "12"'), "'width' is '12'"),
        (lambda line: line.replace('"width": 12', '"width": 0'), "not positive"),
        (lambda line: line.replace("images/2.jpg", "../2.jpg"), "not a path inside"),
        (lambda line: line.replace("images/2.jpg", "/2.jpg"), "not a path inside"),
        (lambda line: line.replace("images/2.jpg", "images/1.jpg"), "is already listed on line 2"),
        (lambda line: line.replace('"sha256": "', '"sha256": "Z'), "hex digits"),
    ],
)
def test_bad_line_is_named(tmp_path, change, reason):
    write_manifest(tmp_path, [photo(i) for i in range(5)])
    path = tmp_path / "manifest.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    assert change(lines[2]) != lines[2]
    lines[2] = change(lines[2])
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as caught:
        read_manifest(tmp_path)
    assert "line 3" in str(caught.value)


def test_the_captions_of_a_photo_and_of_all_are_bounded(tmp_path, monkeypatch):
    write_manifest(tmp_path, [replace(photo(0), captions=("a",) * MAX_CAPTIONS)])
    assert len(read_manifest(tmp_path)[0].captions) == MAX_CAPTIONS
    write_manifest(tmp_path, [photo(0), replace(photo(1), captions=("a",) * (MAX_CAPTIONS + 1))])
    with pytest.raises(ValueError, match=r"line 2: has 1,001 captions \(limit 1,000\); fix or delete the line"):
        read_manifest(tmp_path)
    monkeypatch.setattr(manifest, "MAX_TEXTS", 5)
    write_manifest(tmp_path, [replace(photo(n), captions=("a",), tags=(Tag("b", 1.0),)) for n in range(3)])
    with pytest.raises(ValueError, match="line 3: is where the captions and tags become more than 5"):
        read_manifest(tmp_path)


SURROGATE = "half a pair: \ud83d"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("file", 3, "'file' is 3, not a str"),
        ("file", SURROGATE, "'file' holds .*, which is not a text that UTF-8 can hold"),
        ("file", "images/\0", "is not a path inside"),
        ("file", ".", "is not a path inside"),
        ("width", True, "'width' is True, not a int"),
        ("width", 1e3, r"'width' is 1000\.0, not a int"),
        ("width", 10**400, "the number 10000000000000000000 is too large"),
        ("width", 10**18, "over the limit of 1,000,000 px a side"),
        ("height", float("inf"), "Infinity is not a number"),
        ("captions", "text", "'captions' is 'text', not a list"),
        ("captions", [None], "'captions' holds None"),
        ("captions", [SURROGATE], "'captions' holds .*UTF-8"),
        ("captions", ["x" * 2**24], "is longer than 16,777,216 bytes"),
        ("source", SURROGATE, "'source' holds"),
        ("caption_source", 3, "'caption_source' is 3, not a str"),
        ("origin_sha256", ["unhashable"], r"'origin_sha256' is \['unhashable'\], not a str"),
        ("content_sha256", {}, "'content_sha256' is {}, not a str"),
        ("note", [[[[]]]] * 9, None),
        ("note", "\x1b[2J", None),
    ],
)
def test_values_of_a_wrong_type_are_named(tmp_path, name, value, reason):
    row = {**row_of_photo(photo(1)), name: value}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    if reason is None:
        # of a later version, or of somebody's own
        assert read_manifest(tmp_path) == [photo(1)]
        return
    with pytest.raises(UserError, match=f"line 1: .*{reason}") as caught:
        read_manifest(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_manifest_that_is_a_pipe_or_leads_out_is_not_read(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (tmp_path / "elsewhere").write_text("secret")
    (folder / "manifest.jsonl").symlink_to("../elsewhere")
    with pytest.raises(UserError, match="leads out of this folder"):
        read_manifest(folder)
    (folder / "manifest.jsonl").unlink()
    os.mkfifo(folder / "manifest.jsonl")
    assert has_manifest(folder)
    with pytest.raises(UserError, match="is not a regular file but a device or pipe"):
        read_manifest(folder)


def test_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("safelight.data.atomic.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_planted_temporary_file_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    planted = tmp_path / f".file.{os.getpid()}-{threading.get_ident()}.tmp"
    planted.symlink_to("precious")
    atomic_write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize(("num", "fraction", "held_out"), [(100, 0.07, 7), (10, 0.1, 1), (11, 0.1, 2), (3, 0.01, 1)])
def test_split_size(num, fraction, held_out):
    train, validation = split_validation([photo(i) for i in range(num)], fraction, seed=1)
    assert len(validation) == held_out
    assert len(train) == num - held_out


def test_split_never_holds_out_all_and_may_hold_out_none():
    photos = [photo(i) for i in range(4)]
    assert split_validation(photos, 0.0, 1) == (photos, [])
    assert len(split_validation(photos, 0.99, 1)[0]) == 1
    assert split_validation(photos[:1], 0.5, 1) == (photos[:1], [])
    with pytest.raises(ValueError, match=r"1\.0 is outside"):
        split_validation(photos, 1.0, 1)


def test_split_ignores_manifest_order_and_keeps_it():
    photos = [photo(i) for i in range(50)]
    train, validation = split_validation(photos, 0.2, seed=9)
    reversed_train, reversed_validation = split_validation(photos[::-1], 0.2, seed=9)
    assert reversed_train[::-1] == train
    assert reversed_validation[::-1] == validation
    assert train == [p for p in photos if p in train]
    assert split_validation(photos, 0.2, seed=10)[1] != validation


def test_split_keeps_its_photos_when_captions_change():
    photos = [photo(i) for i in range(20)]
    renamed = [dataclasses.replace(p, captions=("other",)) for p in photos]
    before, after = (split_validation(p, 0.2, 3)[1] for p in (photos, renamed))
    assert [p.sha256 for p in before] == [p.sha256 for p in after]


def test_a_byte_order_mark_at_the_start_is_no_part_of_the_first_line(tmp_path):
    photos = [photo(1), photo(2)]
    write_manifest(tmp_path, photos)
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_manifest(tmp_path) == photos


def full_photo() -> Photo:
    return dataclasses.replace(
        photo(3),
        tags=(Tag("animal", 1.5), Tag("a dog")),
        settings=PhotoSettings(2.5, 0.1, 0.5, 0.75, False, 2, "portraits"),
        credit=Credit("Ann Example", "https://example.org/ann"),
        quality=Quality(120.5, 0.4, 0.0, 0.01),
        mask="masks/3.png",
        mask_sha256="0" * 64,
        captioner="model a, num_beams 4",
    )


def test_tags_settings_credit_quality_and_mask_are_kept(tmp_path):
    write_manifest(tmp_path, [photo(1), full_photo()])
    assert read_manifest(tmp_path) == [photo(1), full_photo()]


def test_a_photo_without_them_is_written_as_before(tmp_path):
    assert list(row_of_photo(photo(1))) == [field.name for field in dataclasses.fields(Photo)][:11]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("tags", {"dog": float("inf")}, "is not"),
        ("tags", {"dog": -1}, "tag 'dog' -1 is not a number from 0 to 1000"),
        ("tags", {" ": 1}, "tags has an empty name"),
        ("tags", {str(n): 1 for n in range(1001)}, "has 1,001 tags"),
        ("settings", {"repeats": "3"}, "settings.repeats '3' is not a number"),
        ("settings", {"flip_p": 1.5}, "settings.flip_p 1.5 is not a number from 0 to 1"),
        ("settings", {"keep_tags": 1.5}, "settings.keep_tags 1.5 is not a whole number"),
        ("settings", {"shuffle_tags": 1}, "settings.shuffle_tags 1 is not true or false"),
        ("settings", {"batch_id": 1}, "'settings.batch_id' holds 1"),
        ("quality", {"sharpness": 1}, "lacks a value"),
        ("mask", "../m.png", "mask '../m.png' is not a path inside"),
        ("mask", "", "mask and mask_sha256 belong together"),
    ],
)
def test_wrong_values_of_what_a_photo_may_have_are_named(tmp_path, name, value, reason):
    (tmp_path / "manifest.jsonl").write_text(json.dumps({**row_of_photo(full_photo()), name: value}) + "\n")
    with pytest.raises(UserError, match=f"line 1: .*{reason}"):
        read_manifest(tmp_path)
