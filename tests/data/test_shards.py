"""Shards: rows are appended completely or not at all and once per key, with several writers and on a full disk."""

import sqlite3
import threading
import time

import numpy as np
import pytest

from safelight.data import index
from safelight.data.cache import Cache
from tests.data.damaged_rows import damaged_rows


def test_damaged_index_and_other_format_are_errors(tmp_path):
    with Cache(tmp_path / "a"):
        pass
    (tmp_path / "a" / "index.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(ValueError, match=r"index\.sqlite is damaged"):
        Cache(tmp_path / "a")
    with Cache(tmp_path / "b"):
        pass
    other = sqlite3.connect(tmp_path / "b" / "index.sqlite")
    other.execute("PRAGMA user_version = 77")
    other.close()
    with pytest.raises(ValueError, match="format 77"):
        Cache(tmp_path / "b")


def test_rows_of_several_shapes_over_several_shards(tmp_path, monkeypatch):
    """With shards of three rows, so that some appends span shards."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(index, "MAX_SHARD_BYTES", 3 * 2 * 4 * 5 * 4 + 7)
    written = {}
    with Cache(tmp_path / "cache", "float32") as cache:
        for num in (1, 4, 2, 1):
            rows = rng.standard_normal((num, 2, 4, 5)).astype(np.float32)
            keys = [f"key {len(written) + i}" for i in range(num)]
            assert cache.append("latent", keys, rows) == num
            written |= dict(zip(keys, rows, strict=True))
        other = rng.standard_normal((2, 3)).astype(np.float32)
        cache.append("text", ["x", "y"], other)
        names = sorted(file.name for file in (tmp_path / "cache" / "shards").iterdir())
        assert names == [*(f"latent-2x4x5-float32-{i:04d}.bin" for i in range(3)), "text-3-float32-0000.bin"]
        order = rng.permutation(list(written)).tolist()
        np.testing.assert_array_equal(
            cache.read([*order, order[0]]), np.stack([written[k] for k in [*order, order[0]]])
        )
        np.testing.assert_array_equal(cache.read(["y", "x"]), other[::-1])
        with pytest.raises(ValueError, match="one shape"):
            cache.read(["x", "key 0"])
        with pytest.raises(ValueError, match="no row z"):
            cache.read(["z"])


def test_append_removes_bytes_left_by_a_killed_process(tmp_path):
    with Cache(tmp_path / "cache", "float32") as cache:
        cache.append("text", ["a"], np.array([[1.0]]))
        (shard,) = (tmp_path / "cache" / "shards").iterdir()
        shard.write_bytes(shard.read_bytes() + b"left by a kill")
        cache.append("text", ["b"], np.array([[2.0]]))
        assert cache.read(["a", "b"]).ravel().tolist() == [1, 2]
        assert shard.read_bytes() == np.array([1, 2], np.float32).tobytes()


def test_append_keeps_the_first_row_of_a_key(tmp_path):
    with Cache(tmp_path / "cache") as cache:
        assert cache.append("text", ["a", "b", "a"], np.array([[1.0], [2.0], [3.0]])) == 2
        assert cache.append("text", ["b", "c"], np.array([[8.0], [9.0]])) == 1
        assert cache.read(["a", "b", "c"]).ravel().tolist() == [1, 2, 9]
        assert cache.missing(["d", "a", "d"]) == ["d"]


@pytest.mark.parametrize(
    ("kind", "keys", "rows", "message"),
    [
        ("image", ["a"], [[1.0]], "kind 'image'"),
        ("text", ["a"], [[1.0], [2.0]], "1 keys do not match"),
        ("text", ["a"], [[np.inf]], "not finite"),
        ("text", ["a"], [[1e6]], "not finite in float16.*float32"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_stored(tmp_path, kind, keys, rows, message):
    with Cache(tmp_path / "cache") as cache:
        with pytest.raises(ValueError, match=message):
            cache.append(kind, keys, np.array(rows))
        assert len(cache) == 0
    with pytest.raises(ValueError, match="float64"):
        Cache(tmp_path / "cache", "float64")


def test_full_disk_leaves_the_cache_usable(tmp_path, monkeypatch):
    with Cache(tmp_path / "cache") as cache:
        cache.append("text", ["a"], np.array([[1.0]]))

        def full(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("safelight.data.shards.os.fsync", full)
            with pytest.raises(OSError, match="No space left"):
                cache.append("text", ["b"], np.array([[2.0]]))
        assert cache.missing(["a", "b"]) == ["b"]
        cache.append("text", ["c"], np.array([[3.0]]))
        assert cache.read(["a", "c"]).ravel().tolist() == [1, 3]
        assert damaged_rows(cache) == []


def test_two_writers_and_a_reader_do_not_disturb_each_other(tmp_path):
    """Two caches on one folder append overlapping keys while a third reads: every row is right and stored once."""
    errors = []

    def write(start):
        with Cache(tmp_path / "cache") as cache:
            for i in range(start, start + 30):
                cache.append("text", [str(i), str(i + 5)], np.array([[i, i], [i + 5, i + 5]]))

    def read(stop):
        with Cache(tmp_path / "cache") as cache:
            while not stop.is_set():
                present = [str(i) for i in range(60) if not cache.missing([str(i)])]
                if present and cache.read(present)[:, 0].tolist() != [int(key) for key in present]:
                    errors.append(present)
                time.sleep(0.005)

    with Cache(tmp_path / "cache"):
        stop = threading.Event()
        reader = threading.Thread(target=read, args=(stop,))
        writers = [threading.Thread(target=write, args=(start,)) for start in (0, 12)]
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        reader.join()
    assert errors == []
    with Cache(tmp_path / "cache") as cache:
        assert len(cache) == 47
        assert cache.read([str(i) for i in range(47)])[:, 1].tolist() == list(range(47))
        assert damaged_rows(cache) == []
