"""Where photos come from: what left a source, what moved, which folders are one source, and what --prune removes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from safelight.data.manifest import read_manifest
from safelight.data.prepare import collection as collection_module
from safelight.data.prepare.ingest import ingest
from safelight.errors import UserError
from tests.called import call


@pytest.fixture
def photos(tmp_path, make_noise) -> Path:
    return fill(tmp_path / "photos", make_noise, range(4))


@pytest.fixture
def dataset(tmp_path, photos) -> Path:
    """The photographs, prepared."""
    ingest([photos], tmp_path / "dataset")
    return tmp_path / "dataset"


def fill(folder: Path, make_noise, seeds) -> Path:
    """Write 0.png, 1.png, ... with captions that name their content."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        make_noise(seed).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {seed}")
    return folder


def contents(dataset: Path) -> dict[str, str]:
    """Return caption by source; every listed file exists, and no other does."""
    manifest = read_manifest(dataset)
    assert {f"images/{path.name}" for path in (dataset / "images").iterdir()} == {photo.file for photo in manifest}
    assert len({photo.source for photo in manifest}) == len(manifest)
    return {photo.source: photo.captions[0] for photo in manifest}


PICTURES = {f"photos/{number}.png": f"picture {number}" for number in range(4)}


def test_a_photo_that_left_its_folder_is_said_until_it_is_pruned(photos, dataset):
    (photos / "1.png").unlink()
    for _ in range(2):
        called = call("prepare", photos, "-o", dataset)
        line = called.line(f"note: {photos / '1.png'} is no longer in its folder; the dataset keeps it")
        assert line.endswith("and it is trained on (--prune removes it)")
        assert contents(dataset) == PICTURES
    assert "photos/1.png" in (dataset / "manifest.jsonl").read_text()
    before = read_manifest(dataset)
    called = call("prepare", photos, "-o", dataset, "--prune")
    assert "images/1-" in called.line("was removed from the dataset")
    # nothing else changes
    assert read_manifest(dataset) == [before[0], *before[2:]]
    contents(dataset)
    called = call("prepare", photos, "-o", dataset, "--prune")
    # the text of 1.png is left
    assert "note: " not in called.err


def test_folders_of_one_name_are_two_sources(tmp_path, make_noise):
    cats, dogs = (
        fill(tmp_path / name / "photos", make_noise, seeds) for name, seeds in (("cats", (1, 2)), ("dogs", (3, 4)))
    )
    dataset = tmp_path / "dataset"
    ingest([cats], dataset)
    called = call("prepare", dogs, "-o", dataset)
    assert f"sources: 2 from {cats}, 2 from {dogs}" in called.out
    line = called.line(f"note: {dogs} was added; the dataset also has photographs of {cats} (2)")
    assert "--prune keeps only those of the sources given now" in line
    wanted = {
        "photos/0.png": "picture 1",
        "photos/1.png": "picture 2",
        "photos (2)/0.png": "picture 3",
        "photos (2)/1.png": "picture 4",
    }
    assert contents(dataset) == wanted
    assert json.loads((dataset / "sources.json").read_text()) == {"photos": str(cats), "photos (2)": str(dogs)}
    for sources in ([cats], [dogs], [dogs, cats]):
        summary = ingest(sources, dataset)
        assert (summary.notes, summary.rejected) == ([], [])
        assert contents(dataset) == wanted
    (dogs / "1.png").unlink()
    (note,) = ingest([dogs], dataset).notes
    assert note.kind == "removed"
    assert str(dogs / "1.png") in note.text


def test_two_sources_of_one_name_in_one_call(tmp_path, make_noise):
    folders = [fill(tmp_path / name / "photos", make_noise, [seed]) for name, seed in (("a", 1), ("b", 2))]
    assert ingest(folders, tmp_path / "dataset").notes == []
    assert contents(tmp_path / "dataset") == {"photos/0.png": "picture 1", "photos (2)/0.png": "picture 2"}


@pytest.mark.parametrize("name", ["moved/photos", "pictures"])
def test_a_moved_folder_is_recognized_by_its_content(tmp_path, photos, dataset, make_noise, name):
    before = read_manifest(dataset)
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    photos.rename(place)
    (place / "2.png").unlink()
    make_noise(9).save(place / "3.png")
    summary = ingest([place], dataset)
    assert summary.num_duplicates == 0
    assert sorted(note.kind for note in summary.notes) == ["changed", "removed"]
    assert summary.photos[:4] == before
    assert json.loads((dataset / "sources.json").read_text()) == {"photos": str(place)}


def test_another_folder_at_the_old_place_of_none_is_another_source(tmp_path, photos, dataset, make_noise):
    photos.rename(tmp_path / "away")
    other = fill(tmp_path / "other" / "photos", make_noise, (7, 8))
    ingest([other], dataset)
    assert contents(dataset) == {**PICTURES, "photos (2)/0.png": "picture 7", "photos (2)/1.png": "picture 8"}


def test_renamed_files_keep_their_photo_and_take_its_new_caption(photos, dataset):
    ids = [photo.sha256 for photo in read_manifest(dataset)]
    # 0 is renamed, and 1, 2, 3 become 0, 1, 2: each name but the last has another picture now
    for old, new in (("0", "first"), ("1", "0"), ("2", "1"), ("3", "2")):
        for suffix in (".png", ".txt"):
            (photos / f"{old}{suffix}").rename(photos / f"{new}{suffix}")
    (photos / "first.txt").write_text("picture 0, the first")
    summary = ingest([photos], dataset)
    assert (summary.rejected, summary.notes) == ([], [])
    assert [photo.sha256 for photo in summary.photos] == ids
    assert contents(dataset) == {
        "photos/first.png": "picture 0, the first",
        "photos/0.png": "picture 1",
        "photos/1.png": "picture 2",
        "photos/2.png": "picture 3",
    }
    before = (dataset / "manifest.jsonl").read_bytes()
    ingest([photos], dataset)
    assert (dataset / "manifest.jsonl").read_bytes() == before


def without_record(dataset: Path) -> None:
    """Make a dataset what an earlier version of prepare wrote."""
    (dataset / "sources.json").unlink()
    rows = [json.loads(line) for line in (dataset / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        del row["fingerprint"], row["group"]
    (dataset / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("has_hashes", [True, False])
def test_a_dataset_without_a_record_of_its_sources_stays_usable(tmp_path, photos, dataset, make_noise, has_hashes):
    before = read_manifest(dataset)
    without_record(dataset)
    if not has_hashes:
        text = (dataset / "manifest.jsonl").read_text()
        (dataset / "manifest.jsonl").write_text(text.replace('"origin_sha256": "', '"_": "'))
    (photos / "3.png").unlink()
    summary = ingest([photos], dataset)
    assert [photo.sha256 for photo in summary.photos] == [photo.sha256 for photo in before]
    assert summary.num_duplicates == 0
    assert [note.kind for note in summary.notes] == ["removed"]
    assert contents(dataset) == PICTURES
    if has_hashes:
        without_record(dataset)
        other = fill(tmp_path / "other" / "photos", make_noise, (7,))
        ingest([other], dataset)
        assert contents(dataset) == {**PICTURES, "photos (2)/0.png": "picture 7"}


def test_prune_keeps_what_the_given_sources_hold(tmp_path, photos, dataset, make_noise):
    more = fill(tmp_path / "more", make_noise, (2, 9))
    # of photos only picture 2 is left, which the new source holds as well
    called = call("prepare", more, "-o", dataset, "--prune")
    assert called.status == 0
    assert contents(dataset) == {"more/0.png": "picture 2", "more/1.png": "picture 9"}
    assert "2 photographs in" in called.out
    assert json.loads((dataset / "sources.json").read_text()) == {"more": str(more)}


def test_prune_removes_the_earlier_version_of_a_changed_file(photos, dataset, make_noise):
    make_noise(8).save(photos / "0.png")
    (photos / "0.txt").write_text("picture 8")
    assert "--prune removes it" in ingest([photos], dataset).warnings[0]
    # said again, as long as it is true
    assert "0.png changed since it was last prepared" in ingest([photos], dataset).warnings[0]
    ingest([photos], dataset, prune=True)
    assert contents(dataset) == {**PICTURES, "photos/0.png": "picture 8"}


def test_prune_keeps_what_could_not_be_read_or_was_not_looked_for(photos, dataset):
    (photos / "0.png").write_bytes(b"damaged")
    summary = ingest([photos], dataset, prune=True)
    assert [item.reason.split("; ")[-1] for item in summary.rejected] == ["the dataset keeps what was prepared earlier"]
    assert contents(dataset) == PICTURES
    # a single file of a folder says nothing about the others
    with pytest.raises(UserError, match="whole folders"):
        ingest([photos / "1.png"], dataset, prune=True)
    assert contents(dataset) == PICTURES


def test_prune_refuses_a_source_without_photographs(tmp_path, photos, dataset):
    (tmp_path / "empty").mkdir()
    before = (dataset / "manifest.jsonl").read_bytes()
    called = call("prepare", photos, tmp_path / "empty", "-o", dataset, "--prune")
    called.assert_refused("prepare", "empty holds no photograph that can be used; nothing was removed")
    for path in photos.iterdir():
        path.unlink()
    call("prepare", photos, "-o", dataset, "--prune").assert_refused("prepare", "no photos found")
    assert (dataset / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"photos": 5}', '{"a/b": "x"}', '{"a": "x\\u0000"}', "[" * 99999])
def test_a_damaged_record_of_sources_is_one_line(photos, dataset, text):
    (dataset / "sources.json").write_text(text)
    refused = call("prepare", photos, "-o", dataset)
    refused.assert_refused("prepare", "sources.json")
    assert "delete it" in refused.err
    (dataset / "sources.json").unlink()
    assert call("prepare", photos, "-o", dataset).status == 0
    assert contents(dataset) == PICTURES


@pytest.mark.parametrize("source", ["../../x/0.png", "/etc/0.png", "\0", "photos/" + "a" * 9999, ""])
def test_sources_in_a_manifest_of_a_stranger_are_only_words(photos, dataset, source):
    lines = (dataset / "manifest.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "source": source})
    (dataset / "manifest.jsonl").write_text("\n".join(lines))
    assert call("prepare", photos, "-o", dataset).status == 0
    (photos / "0.png").unlink()
    assert call("prepare", photos, "-o", dataset).status == 0
    assert call("prepare", photos, "-o", dataset, "--prune").status == 0


def nest(folder: Path, name: str, depth: int, content: bytes) -> None:
    """Make folders in folders without passing the system a long path; the last one holds x.png."""
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=descriptor)
        below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    with open(os.open("x.png", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor), "wb") as file:
        file.write(content)
    os.close(descriptor)


@pytest.fixture
def no_deep_folders_left(photos):
    """Python's rmtree, with which pytest cleans up, recurses; so does coreutils' rm, but not on Python's stack."""
    yield
    subprocess.run(["rm", "-rf", photos], check=True)


def test_folders_nested_deeper_than_python_recurses(tmp_path, photos, no_deep_folders_left):
    nest(photos, "d", 1100, (photos / "0.png").read_bytes())
    (photos / "0.png").unlink()
    summary = ingest([photos], tmp_path / "dataset")
    assert "photos/" + "d/" * 1100 + "x.png" in {photo.source for photo in summary.photos}
    assert [Path(item.path).name for item in summary.rejected] == ["0.txt"]


def test_paths_that_are_too_long_for_the_system_are_listed(tmp_path, photos, no_deep_folders_left):
    nest(photos, "d" * 200, 25, (photos / "0.png").read_bytes())
    called = call("prepare", photos, "-o", tmp_path / "dataset")
    assert called.status == 0
    assert "cannot be read: File name too long" in called.line("left out ")
    assert contents(tmp_path / "dataset") == PICTURES


@pytest.mark.parametrize("kind", ["device", "pipe", "loop"])
def test_sources_that_are_no_files_are_refused_in_one_line(tmp_path, kind):
    source = tmp_path / "source"
    if kind == "device":
        source.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(source)
    else:
        source.symlink_to("source")
    wanted = "does not exist or cannot be reached" if kind == "loop" else "not a regular file"
    call("prepare", source, "-o", tmp_path / "dataset").assert_refused("prepare", wanted)


def test_captions_of_no_photo_and_tables_of_other_forms_are_listed(tmp_path, photos):
    (photos / "sub").mkdir()
    for name in (
        "b.TXT",
        "sub/readme.txt",
        "data.csv",
        "meta_lat.json",
        "x.parquet",
        "train.jsonl",
        "all.zip",
        "Thumbs.DB",
    ):
        (photos / name).write_text("a")
    (photos / "damaged.png").write_bytes(b"x")
    (photos / "damaged.txt").write_text("of a picture that is there")
    called = call("prepare", photos, "-o", tmp_path / "dataset")
    reasons = {
        os.path.relpath(row["path"], photos): row["reason"]
        for row in map(json.loads, (tmp_path / "dataset" / "rejected.jsonl").read_text().splitlines())
    }
    assert reasons.keys() == {
        "b.TXT",
        "sub/readme.txt",
        "data.csv",
        "meta_lat.json",
        "x.parquet",
        "train.jsonl",
        "all.zip",
        "Thumbs.DB",
        "damaged.png",
    }
    assert reasons["b.TXT"] == "a text that belongs to no photograph: no picture in its folder is named b"
    assert all("metadata.jsonl" in reasons[name] for name in ("meta_lat.json", "train.jsonl"))
    assert "metadata.csv" in reasons["data.csv"]
    assert "pyarrow" in reasons["x.parquet"] or "damaged" in reasons["x.parquet"]
    assert "unpack it" in reasons["all.zip"]
    assert "7 left out, 2 caption files)" in called.out


def test_no_name_reaches_the_terminal_unescaped(tmp_path, make_noise):
    evil = "\x1b]0;x\x07\x9b2J\u202e"
    photos = fill(tmp_path / f"p{evil}", make_noise, range(3))
    make_noise(5).save(photos / f"IMG_{evil}.png")
    (photos / f"{evil}.txt").write_text("x")
    (photos / f"{evil}.jpg").write_bytes(b"x")
    (photos / "captions.jsonl").write_text(json.dumps({"file_name": f"{evil}.gif", "text": "x"}))
    dataset = tmp_path / f"d{evil}"
    called = [call("prepare", photos, "-o", dataset)]
    (photos / "0.png").unlink()
    called.append(call("prepare", photos, "-o", dataset))
    called.append(call("prepare", fill(tmp_path / f"q{evil}", make_noise, [7]), "-o", dataset))
    called.append(call("prepare", photos, "-o", dataset, "--prune"))
    for each in called:
        assert each.status == 0
        for line in (each.out + each.err).splitlines():
            assert line.isprintable(), repr(line)


@pytest.mark.parametrize(
    ("number", "shown"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied")]
)
def test_a_folder_that_cannot_be_written_names_another_one(photos, dataset, monkeypatch, number, shown):
    def refuse(path, data, sync=True):
        raise OSError(number, os.strerror(number), str(path))

    before = (dataset / "manifest.jsonl").read_bytes()
    monkeypatch.setattr(collection_module, "atomic_write_bytes", refuse)
    monkeypatch.setattr(collection_module, "_has_content", lambda path, content: False)
    refused = call("prepare", photos, "-o", dataset)
    refused.assert_refused("prepare", f"cannot be written ({shown}); choose another dataset folder with -o")
    assert (dataset / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "cannot be written (Read-only file system); choose another dataset folder with -o"),
        (errno.ENOSPC, "No space left on device; free some disk space and run it again"),
    ],
)
def test_a_disk_that_refuses_the_lock_is_named_for_what_it_is(photos, tmp_path, monkeypatch, number, advice):
    def refuse(path, *rest, original=os.open, **options):
        if str(path).endswith(".lock"):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *rest, **options)

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        patch.setattr(os, "open", refuse)
        call("prepare", photos, "-o", tmp_path / "new").assert_refused("prepare", advice)
