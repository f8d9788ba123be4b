"""Caches of killed processes and damaged files: exactly the lost rows are found and encoded again."""

import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from safelight.data.cache import Cache, CorruptRow
from safelight.errors import UserError
from tests.data.damaged_rows import damaged_rows
from tests.data.rows import all_keys, contents


def run_child(dataset, cache_path, how, at, **options):
    script = Path(__file__).with_name("fakes.py")
    command = [sys.executable, str(script), str(dataset), str(cache_path), how, str(at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_kill_at_any_moment_loses_at_most_a_batch(tmp_path, noise_dataset, fakes, filled):
    """Killed during a write, before the commit, after it, and at any time; filling the rest gives the same rows."""
    reference_cache, samples = filled
    keys = all_keys(samples)
    path = tmp_path / "killed"
    num_before = 0
    # the first three writes are text rows, the rest latents; each further child continues with the missing rows
    for how, at, min_added in (("within", 6, 9), ("before_commit", 3, 6), ("after_commit", 2, 6), ("any_time", 0, 1)):
        child = run_child(noise_dataset, path, how, at)
        if how == "any_time":
            while int(child.stdout.readline()) < 9:
                pass
            child.kill()
        assert child.wait(timeout=60) == -9
        child.stdout.close()
        with Cache(path) as cache:
            assert damaged_rows(cache) == []
            num_rows = len(cache)
            assert num_rows >= num_before + min_added, how
            present = [key for key in keys if key not in set(cache.missing(keys))]
            assert len(present) == num_rows
            assert contents(cache, present) == contents(reference_cache, present)
        num_before = num_rows
    assert num_before < len(keys)
    vae = fakes.FakeVae()
    with Cache(path) as cache:
        assert fakes.fill(cache, noise_dataset, vae, fakes.FakeTextEncoder()) == len(keys) - num_before
        assert vae.num_encoded == len(keys) - num_before
        assert contents(cache, keys) == contents(reference_cache, keys)
        assert damaged_rows(cache) == []
    # nothing of the lost batches is left: the shards are of exactly the size of the uninterrupted run's together
    sizes = [sum(file.stat().st_size for file in (p / "shards").iterdir()) for p in (path, reference_cache.path)]
    assert sizes[0] == sizes[1]


def test_flipped_bit_is_found_on_reading(filled):
    cache, samples = filled
    shard = max((cache.path / "shards").glob("posterior-*"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    cache.close()
    shard.write_bytes(content)
    with Cache(cache.path) as again:
        (bad,) = damaged_rows(again)
        assert bad.shard == shard.name
        with pytest.raises(CorruptRow, match=shard.name) as caught:
            again.read([bad.key])
        assert caught.value.key == bad.key
        assert isinstance(caught.value, ValueError)
        good = [key for key in all_keys(samples) if key != bad.key]
        assert len(contents(again, good)) == len(good)


def flip_bits(path: Path, offsets: list[int]) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


def test_exactly_the_damaged_rows_are_encoded_again(filled, noise_dataset, fakes):
    """Flipped bits in three rows of two shards and a truncated shard: found when the cache is next filled."""
    cache, samples = filled
    keys = all_keys(samples)
    before = contents(cache, keys)
    cache.close()
    posterior, other = sorted((cache.path / "shards").glob("posterior-*"))[:2]
    (text,) = (cache.path / "shards").glob("text-*")
    row_bytes = 8 * np.prod([int(side) for side in posterior.name.split("-")[1].split("x")[1:]]) * 2
    flip_bits(posterior, [0, row_bytes - 1, 2 * row_bytes])
    flip_bits(text, [text.stat().st_size - 1])
    other.write_bytes(other.read_bytes()[:-1])
    vae, encoder = fakes.FakeVae(), fakes.FakeTextEncoder()
    with Cache(cache.path) as again:
        assert fakes.fill(again, noise_dataset, vae, encoder) == 4
        assert (again.num_dropped, vae.num_encoded, len(encoder.encoded)) == (4, 3, 1)
        assert contents(again, keys) == before
        assert damaged_rows(again) == []
    with Cache(cache.path) as again:
        assert fakes.fill(again, noise_dataset, vae, encoder) == 0
        assert again.num_dropped == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_damage_whatever_their_checksum(filled, noise_dataset, fakes, value):
    """Training would blame the base's weights."""
    cache, samples = filled
    keys = all_keys(samples)
    before = contents(cache, keys)
    cache.close()
    posterior = min((cache.path / "shards").glob("posterior-*"))
    row_bytes = 8 * np.prod([int(side) for side in posterior.name.split("-")[1].split("x")[1:]]) * 2
    with open(posterior, "r+b") as file:
        file.seek(row_bytes - 2)
        file.write(np.float16(value).tobytes())
        file.seek(0)
        crc32 = zlib.crc32(file.read(row_bytes))
    with sqlite3.connect(cache.path / "index.sqlite") as index:
        index.execute(
            "UPDATE rows SET crc32 = ? WHERE row = 0 AND shard = (SELECT id FROM shards WHERE file = ?)",
            (crc32, posterior.name),
        )
    index.close()
    with Cache(cache.path) as again:
        with pytest.raises(UserError, match=r"has values that are not finite; `safelight cache` .* encodes it again"):
            contents(again, keys)
        assert fakes.fill(again, noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder()) == 1
        assert again.num_dropped == 1
        assert contents(again, keys) == before


def test_cut_and_lost_shards_are_found(filled):
    cache, _ = filled
    cut, lost = sorted((cache.path / "shards").glob("posterior-*"))[:2]
    lost_rows = lost.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-1])
    lost.unlink()
    bad = damaged_rows(cache)
    assert {error.shard for error in bad} == {cut.name, lost.name}
    assert sum(error.shard == cut.name for error in bad) == 1
    row_bytes = 8 * np.prod([int(x) for x in lost.name.split("-")[1].split("x")[1:]]) * 2
    assert sum(error.shard == lost.name for error in bad) == lost_rows // row_bytes
