"""Deleting rows gives their space back, loses no other row even when killed, and never happens under a reader."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from safelight.data.garbage import collect_garbage
from safelight.data.index import Index
from safelight.data.shards import Cache
from safelight.errors import UserError
from tests.data.damaged_rows import damaged_rows

NUM = 60
# dies at the n-th of all writes to shards, commits, cuts and deleted files of a clean-up
DYING = """
import os, sys
from pathlib import Path
import safelight.data.index as index, safelight.data.compaction as compaction, safelight.data.shards as shards
from safelight.data.garbage import collect_garbage
index.MAX_SHARD_BYTES = 64
compaction._BYTES_AT_ONCE = 8
path, left = Path(sys.argv[1]), [int(sys.argv[2])]

def counting(name, owner):
    original = getattr(owner, name)
    def wrapper(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return original(*args, **options)
    setattr(owner, name, wrapper)

for owner, names in ((os, ("fsync", "replace")), (Path, ("unlink",)), (index.Index, ("move", "shorten", "remove"))):
    for name in names:
        counting(name, owner)
with shards.Cache(path, exclusive=True) as cache:
    collect_garbage(cache, {str(n) for n in range(1, 60, 3)}, (), False)
"""
READER = """
import sys
from safelight.data.shards import Cache
with Cache(sys.argv[1]):
    print(1, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("safelight.data.index.MAX_SHARD_BYTES", 64)


def fill(path) -> None:
    with Cache(path) as cache:
        cache.append("text", [str(n) for n in range(NUM)], np.arange(NUM)[:, None] * np.ones((1, 2)))
        cache.append("mask", [f"mask {n}" for n in range(NUM)], np.arange(NUM)[:, None] * np.ones((1, 3)))


def num_shard_bytes(path) -> int:
    return sum(file.stat().st_size for file in (path / "shards").iterdir())


def test_what_is_needed_stays_and_the_rest_is_given_back(tmp_path):
    """Any selection of rows, several times in a row, with rows added between."""
    fill(tmp_path / "cache")
    draws = random.Random(0)
    needed = {str(n) for n in range(NUM)} | {f"mask {n}" for n in range(NUM)}
    for _ in range(8):
        chance = draws.random()
        gone = {key for key in sorted(needed) if not key.startswith("mask") and draws.random() < chance}
        needed -= gone
        with Cache(tmp_path / "cache", exclusive=True) as cache:
            planned = collect_garbage(cache, needed, (), is_dry_run=True)
            freed = collect_garbage(cache, needed, (), is_dry_run=False)
            assert planned.rows == freed.rows == ({"text": len(gone)} if gone else {})
            assert freed.num_kept == len(cache) == len(needed)
            assert num_shard_bytes(cache.path) == sum(6 if key.startswith("mask") else 4 for key in needed)
            new = [str(draws.randrange(100, 999)) for _ in range(5)]
            cache.append("text", new, np.array([[int(key)] * 2 for key in new]))
            needed |= set(new)
        with Cache(tmp_path / "cache") as cache:
            for key in needed:
                assert set(cache.read([key]).ravel().tolist()) == {int(key.split()[-1])}
            assert damaged_rows(cache) == []


def test_the_index_shrinks_and_photographs_that_left_are_forgotten(tmp_path):
    with Cache(tmp_path, exclusive=True) as cache:
        for start in range(0, 4000, 1000):
            cache.append("text", [f"{n:064}" for n in range(start, start + 1000)], np.ones((1000, 1)))
        cache.note_photos({"a.jpg": ("0", 1, 2), "b.jpg": ("0", 1, 2)})
        before = cache.index_bytes()
        collect_garbage(cache, {f"{7:064}"}, {"b.jpg"}, is_dry_run=False)
        assert cache.index_bytes() < before / 4
        assert list(cache.seen_photos(["a.jpg", "b.jpg"])) == ["b.jpg"]
        assert cache.read([f"{7:064}"]).tolist() == [[1]]
    with Cache(tmp_path) as cache:
        assert len(cache) == 1


def test_killed_at_any_moment_it_loses_no_row_and_the_next_call_does_the_rest(tmp_path):
    needed = {str(n) for n in range(1, NUM, 3)}
    for at in (2, 6, 14, 24):
        path = tmp_path / str(at)
        fill(path)
        child = subprocess.run([sys.executable, "-c", DYING, str(path), str(at)], check=False)
        assert child.returncode == -9, at
        with Cache(path, exclusive=True) as cache:
            assert damaged_rows_of(cache, needed) == []
            collect_garbage(cache, needed, (), is_dry_run=False)
            assert num_shard_bytes(path) == 4 * len(needed)
            assert damaged_rows_of(cache, needed) == []
            assert len(cache) == len(needed)


def damaged_rows_of(cache: Cache, keys) -> list[str]:
    return [key for key in keys if set(cache.read([key]).ravel().tolist()) != {int(key)}]


def test_a_damaged_row_stays_damaged_where_it_is_moved(tmp_path):
    fill(tmp_path)
    last = sorted((tmp_path / "shards").glob("text-*"))[-1]
    os.truncate(last, last.stat().st_size - 1)
    with Cache(tmp_path, exclusive=True) as cache:
        collect_garbage(cache, {"58", "59"}, (), is_dry_run=False)
        assert [error.key for error in cache.drop_damaged(["58", "59"], "text", (2,))] == ["59"]
        assert cache.read(["58"]).tolist() == [[58, 58]]


def test_files_of_no_shard_are_deleted_and_others_left_alone(tmp_path):
    fill(tmp_path)
    for name in ("text-2-float16-0099.bin", "notes.txt"):
        (tmp_path / "shards" / name).write_text("x")
    with Cache(tmp_path, exclusive=True) as cache:
        collect_garbage(cache, {str(n) for n in range(NUM)}, (), is_dry_run=False)
    names = {file.name for file in (tmp_path / "shards").iterdir()}
    assert "notes.txt" in names
    assert "text-2-float16-0099.bin" not in names


def test_nothing_is_deleted_while_another_process_has_the_cache_open(tmp_path):
    """And nobody opens it while rows are deleted; a killed process keeps nobody out."""
    fill(tmp_path / "cache")
    reader = (
        "import sys\nfrom safelight.data.cache import Cache\nwith Cache(sys.argv[1]):\n print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", reader, str(tmp_path / "cache")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match=rf"cache is in use by process {child.pid} on .*; wait until it has finished"):
        Cache(tmp_path / "cache", exclusive=True)
    # readers do not exclude each other
    Cache(tmp_path / "cache").close()
    child.kill()
    child.communicate()
    with Cache(tmp_path / "cache", exclusive=True), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        Cache(tmp_path / "cache")
    assert not (tmp_path / "cache" / ".lock").exists()


def test_nothing_is_deleted_where_no_lock_shows_who_reads(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setattr("fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    with pytest.raises(UserError, match=r"without locks .*rows are deleted only where locks show that nobody reads"):
        Cache(tmp_path, exclusive=True)
    Cache(tmp_path).close()


def test_a_row_that_was_stored_anew_meanwhile_is_not_removed(tmp_path):
    """Two processes find the same damaged row; one has replaced it when the other removes it."""
    fill(tmp_path)
    with Cache(tmp_path) as cache:
        (old,) = Index(tmp_path).find(["5"]).values()
        cache._index.remove([old])
        cache.append("text", ["5"], np.array([[5.0, 5.0]]))
        cache._index.remove([old])
        assert cache.read(["5"]).tolist() == [[5, 5]]
