"""A full disk while preparing, caching, saving and logging.

Each gives one line; everything saved before is intact, and with free space the command succeeds. A limit on file size
makes the kernel refuse a write halfway, as a full disk does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight import library_log
from safelight.__main__ import quiet_libraries
from safelight.data.manifest import read_manifest
from safelight.data.shards import Cache
from safelight.trainer.checkpoint.files import check_files, folder_of, list_checkpoints
from safelight.trainer.config.schema import Config
from safelight.trainer.run_log.boards import TensorBoard
from tests.data.damaged_rows import damaged_rows
from tests.small_base import small_base


@contextlib.contextmanager
def files_up_to(num_bytes: int):
    """Within the block no file can grow beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_sync(monkeypatch):
    """A context in which fsync fails with "no space left" from the n-th file below a folder on."""

    @contextlib.contextmanager
    def full(folder: Path, number: int):
        num_left = [number]

        def fsync(descriptor, original=os.fsync):
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder)):
                num_left[0] -= 1
                if num_left[0] <= 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            yield

    return full


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four photographs, of which the third in order is large."""
    folder = tmp_path_factory.mktemp("photos")
    for number, side in enumerate((40, 48, 300, 56)):
        values = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"photo {number}.png")
    return folder


@pytest.fixture
def place(photos, tmp_path, call) -> Path:
    """A dataset of the first photograph, and a config."""
    assert call("prepare", photos / "photo 0.png", "-o", tmp_path / "dataset").status == 0
    (tmp_path / "run.toml").write_text(
        f'[run]\ndir = "{tmp_path}/run"\ndevice = "cpu"\n[model]\nbase = "{small_base()}"\n'
        f'[data]\npath = "{tmp_path}/dataset"\nresolution = 64\n'
        'upscale = "always"\n'
        "variants = 12\n[train]\nbatch_size = 2\nepochs = 4\n[validate]\nevery_epochs = 0\n[sample]\nevery_epochs = 0\n"
        "[save]\nevery_steps = 1\n[log]\ntensorboard = false\nevery_steps = 1\n"
    )
    return tmp_path


FULL = (
    "; free some disk space and run it again: everything saved before is intact",
    "free some disk space, or delete the dataset's cache",
)


def assert_full(called, command: str) -> None:
    called.assert_refused(command, "")
    assert called.err.rstrip().endswith(FULL[0]) or FULL[1] in called.err


@pytest.mark.parametrize("how", ["write", 1, 2, 5])
def test_while_preparing(how, place, photos, call, no_sync):
    dataset = place / "dataset"
    before = (dataset / "manifest.jsonl").read_bytes()
    with files_up_to(50_000) if how == "write" else no_sync(dataset, how):
        assert_full(call("prepare", photos, "-o", dataset), "prepare")
    assert (dataset / "manifest.jsonl").read_bytes() == before
    assert not list(dataset.rglob("*.tmp"))
    assert call("prepare", photos, "-o", dataset).status == 0
    assert [photo.captions for photo in read_manifest(dataset)] == [(f"photo {number}",) for number in range(4)]


@pytest.mark.parametrize("how", ["write", 1, 3])
def test_while_caching(how, place, photos, call, no_sync):
    assert call("prepare", photos, "-o", place / "dataset").status == 0
    with files_up_to(65_000) if how == "write" else no_sync(place / "dataset" / "cache", how):
        assert_full(call("cache", place / "run.toml"), "cache")
    with Cache(place / "dataset" / "cache") as cache:
        num_rows = len(cache)
        assert damaged_rows(cache) == []
        # texts, which come first, are there unless they failed
        assert (num_rows == 0) == (how == 1)
    made = json.loads(call("cache", place / "run.toml", "--json").out)
    assert made["made"] == made["rows"] - num_rows > 0
    with Cache(place / "dataset" / "cache") as cache:
        assert damaged_rows(cache) == []


def run_to(place: Path, call, step: int, *more: str):
    return call("train", place / "run.toml", "--resume", "--train.max-steps", step, *more)


@pytest.mark.parametrize("how", ["write", 1, 4])
@pytest.mark.long
def test_while_saving(how, place, call, no_sync):
    run = place / "run"
    assert run_to(place, call, 1).status == 0
    with files_up_to(200_000) if how == "write" else no_sync(run / "checkpoints", how):
        called = run_to(place, call, 2)
    called.assert_refused("train", f"{run}/checkpoints/.step-00000002.partial/")
    assert "; a checkpoint takes " in called.err
    go_on = f"go on from step 1, the newest checkpoint, with: safelight train {run}/config.toml --resume\n"
    assert called.err.endswith(go_on)
    assert list_checkpoints(run) == [1]
    check_files(folder_of(run, 1))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"], (
        "the partial checkpoint must be deleted"
    )
    assert run_to(place, call, 2).status == 0
    assert list_checkpoints(run)[-1] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]


def test_while_logging(place, call):
    run = place / "run"
    assert run_to(place, call, 1).status == 0
    path = run / "metrics.jsonl"
    # longer than any other file that a start writes; the weights are longer, and come after the line that fails
    row = json.dumps({"kind": "event", "step": 0, "event": "long", "detail": "x" * 300_000}) + "\n"
    path.write_text(row + path.read_text())
    shutil.copytree(folder_of(run, 1), place / "kept")
    resumed = 160
    with files_up_to(path.stat().st_size + resumed):
        called = run_to(place, call, 2)
    # before the first step, or in one
    assert str(path) in called.err, called.err[-700:]
    assert FULL[0] in called.err or called.err.endswith(f"safelight train {run}/config.toml --resume\n")
    assert list_checkpoints(run) == [1]
    check_files(folder_of(run, 1))
    assert run_to(place, call, 2).status == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]


def test_tensorboard_on_a_full_disk_is_no_traceback(place, monkeypatch, capsys):
    """TensorBoard writes in its own thread; its error is raised again in ours and must not be printed twice."""

    def log_much() -> None:
        board = TensorBoard(place, Config(), -1)
        for step in range(400):
            board.write(step, {"a": 1.0})
        board.close()

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    quiet_libraries()
    try:
        with files_up_to(2_500), pytest.raises(OSError, match="File too large"):
            log_much()
        assert any("File too large" in line for line in library_log.lines())
    finally:
        library_log.release()
    assert capsys.readouterr().err == ""
