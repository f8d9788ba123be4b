"""Every hostile picture, name and caption is either left out with a reason or prepared, and nothing else is lost."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight.data.manifest import read_manifest
from safelight.data.prepare.ingest import ingest
from safelight.trainer.run_log.terminal import Terminal

GOOD = {"good one": "a written caption", "good two": "good two"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A folder with two good photographs, one of them with a caption, and a folder with an earlier photograph."""
    root = tmp_path_factory.mktemp("clean")
    for folder, names in (("photos", GOOD), ("before", ["earlier"])):
        (root / folder).mkdir()
        for name in names:
            values = np.random.default_rng(len(name) + ord(name[-1])).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(values).save(root / folder / f"{name}.png")
    (root / "photos" / "good one.txt").write_text(GOOD["good one"])
    return root


@pytest.fixture
def place(clean, tmp_path) -> Path:
    """Those folders, and a dataset of the earlier photograph."""
    shutil.copytree(clean, tmp_path / "place")
    ingest([tmp_path / "place" / "before"], tmp_path / "place" / "dataset")
    return tmp_path / "place"


def snapshot(folder: Path) -> dict:
    """Return path -> SHA-256 for regular files below a folder, path -> mode for everything else."""
    return {
        os.path.relpath(path, folder): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**30
        else path.lstat().st_mode
        for path in map(Path, (os.path.join(at, name) for at, dirs, files in os.walk(folder) for name in dirs + files))
    }


@pytest.fixture
def deny(monkeypatch):
    """A context in which files and folders of some names cannot be read, even by root, who ignores permissions."""

    def refusing(original, names):
        def call(path=".", *rest, **options):
            if isinstance(path, (str, os.PathLike)) and os.path.basename(path) in names:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *rest, **options)

        return call

    @contextlib.contextmanager
    def denied(names: tuple[str, ...]):
        with monkeypatch.context() as patch:
            for module, function in ((builtins, "open"), (io, "open"), (os, "listdir"), (os, "scandir"), (os, "open")):
                patch.setattr(module, function, refusing(getattr(module, function), names))
            yield

    return denied


def test_beside_good_photographs(picture, place, call, deny):
    photos, dataset = place / "photos", place / "dataset"
    num_good = len(list(photos.glob("*.png")))
    picture.make(photos)
    originals = snapshot(photos)
    with deny(picture.denied):
        called = call("prepare", photos, "-o", dataset, *picture.options)
    assert called.status == 0, called.err
    assert "Traceback" not in called.err
    manifest = read_manifest(dataset)
    # good photographs have their captions, the earlier one is there, stored files are intact, originals unchanged
    captions = [photo.captions for photo in manifest]
    assert captions[0] == ("earlier",)
    assert all((caption,) in captions for caption in GOOD.values())
    for photo in manifest:
        assert hashlib.sha256((dataset / photo.file).read_bytes()).hexdigest() == photo.sha256
        assert Image.open(dataset / photo.file).convert("RGB").size == (photo.width, photo.height)
    assert snapshot(photos) == originals
    # every line is one of ours and contains no terminal control codes
    lines = called.err.removesuffix("\n").split("\n")
    # the dataset has the photograph of another source
    added = f"note: {photos} was added; the dataset also has photographs of {place / 'before'} (1)"
    assert sum(line.startswith(added) for line in lines) == 1
    lines = [line for line in lines if not line.startswith(added)]
    assert all(line.startswith(("left out ", "note: ", "photos ")) and line.isprintable() for line in lines), lines
    listed = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    num_new = len(manifest) - 1 - num_good
    if picture.says:
        line = called.line(picture.says)
    if picture.outcome == "left out":
        assert num_new == 0
        assert line.startswith("left out ")
        assert picture.shown in line
        assert len(listed) == 1
        assert picture.says in listed[0]["reason"]
    elif picture.outcome == "taken":
        assert num_new >= 1
        if picture.caption is not None:
            assert (picture.caption,) in captions
    else:
        assert num_new == 0
        assert listed == []
    if not picture.says:
        assert all(line.startswith("photos ") for line in lines), lines
    # the same call again gives the same manifest
    before = (dataset / "manifest.jsonl").read_bytes()
    with deny(picture.denied):
        assert call("prepare", photos, "-o", dataset, *picture.options).status == 0
    assert (dataset / "manifest.jsonl").read_bytes() == before


def test_the_corpus_is_large(corpus_names):
    assert len(set(corpus_names)) == len(corpus_names) >= 60


def test_long_lists_of_rejections_and_notes_are_cut_on_screen(tmp_path, call):
    """For example, if a user copied 30 photos together with the caption table of 120."""
    (tmp_path / "p").mkdir()
    Image.new("RGB", (80, 80), "teal").save(tmp_path / "p" / "0.png")
    rows = [json.dumps({"file_name": f"{n}.png", "text": "a photo"}) for n in range(120)]
    (tmp_path / "p" / "captions.jsonl").write_text("\n".join(rows))
    for n in range(30):
        (tmp_path / "p" / f"{n}.txt").write_text("")
        Image.new("RGB", (80, 80), (n, 99, 3 * n)).save(tmp_path / "p" / f"{n}.png")
    called = call("prepare", str(tmp_path / "p"), "-o", str(tmp_path / "d"))
    lines = called.err.splitlines()
    assert sum(line.startswith("left out ") for line in lines) == 5
    assert f"and 85 more caption rows; all are listed in {tmp_path / 'd' / 'rejected.jsonl'}" in lines
    assert sum(line.startswith("note: ") for line in lines) == 5
    assert f"and 25 more like it; all are in {tmp_path / 'd' / 'prepare_notes.txt'}" in lines
    assert "30 photographs" in called.out
    assert "0 left out, 90 caption rows)" in called.out
    assert len((tmp_path / "d" / "rejected.jsonl").read_text().splitlines()) == 90
    assert len((tmp_path / "d" / "prepare_notes.txt").read_text().splitlines()) == 30
    all_of_it = json.loads(call("prepare", str(tmp_path / "p"), "-o", str(tmp_path / "d"), "--json").out)
    assert (len(all_of_it["rejected"]), len(all_of_it["warnings"])) == (90, 30)


def test_no_text_becomes_an_emoji(capsys):
    Terminal().say("left out p/captions.jsonl:100: :smile:")
    assert capsys.readouterr().err == "left out p/captions.jsonl:100: :smile:\n"
