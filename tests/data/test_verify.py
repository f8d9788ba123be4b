"""`safelight cache --verify` and `--stats`: what is damaged is named by photograph, and what is unusual too."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from safelight.data.cache import Cache, encode_latent, fill_latents, latent_kind, latent_shape
from safelight.data.cache_stats import cache_stats
from safelight.data.prepare.ingest import ingest
from safelight.data.verify import NeededRow, sample_keys, verify


def needed_rows(dataset, samples, vae) -> dict[str, NeededRow]:
    return {
        key: NeededRow(
            latent_kind(vae),
            latent_shape(vae, sample.bucket),
            sample.photo.source,
            partial(encode_latent, dataset, sample, variant, vae),
            variant,
        )
        for sample in samples
        for variant, key in enumerate(sample.latent_keys)
    }


@pytest.fixture
def rows(noise_dataset, filled, fakes):
    return needed_rows(noise_dataset, filled[1], fakes.FakeVae())


def overwrite(cache, key: str, values: np.ndarray | bytes, is_checksum_right: bool) -> None:
    (address,) = cache._index.find([key]).values()
    content = values.tobytes() if isinstance(values, np.ndarray) else values
    with open(cache.path / "shards" / address.shard.file, "r+b") as file:
        file.seek(address.row * address.shard.row_bytes)
        file.write(content)
    if is_checksum_right:
        with contextlib.closing(sqlite3.connect(cache.path / "index.sqlite")) as index, index:
            index.execute("UPDATE rows SET crc32 = ? WHERE key = ?", (zlib.crc32(content), key))


def test_a_sound_cache_is_sound(filled, rows):
    cache, _ = filled
    calls = []
    found = verify(cache, rows, len(rows), 1, lambda *call: calls.append(call))
    assert found.is_sound
    assert found.num_rows == len(cache)
    assert found.num_unneeded == len(cache) - len(rows)
    assert found.num_encoded == len(rows)
    # float16 rounds by up to half of a unit
    assert 0.1 < found.max_roundings <= 0.5
    assert calls[-1] == ("rows encoded again", len(rows), len(rows))


def test_flipped_bits_are_named_by_photograph_and_nothing_is_changed(filled, rows):
    cache, samples = filled
    key, other = samples[3].latent_keys[1], samples[4].text_keys[0]
    for damaged in (key, other):
        row = bytearray(cache.read([damaged])[0].tobytes())
        row[-1] ^= 1
        overwrite(cache, damaged, bytes(row), is_checksum_right=False)
    num_rows = len(cache)
    found = verify(cache, rows, 0, 1)
    assert not found.is_sound
    assert len(cache) == num_rows
    assert {(problem.name, problem.key) for problem in found.problems} == {(samples[3].photo.source, key), ("", other)}
    assert all("does not match its checksum" in problem.what for problem in found.problems)


def test_rows_of_the_right_checksum_and_the_wrong_values_are_found_by_encoding_them_again(filled, rows):
    """The row of another photograph, one that is a little too large, and values that are no numbers."""
    cache, samples = filled
    keys = [samples[i].latent_keys[0] for i in (0, 4, 8)]
    before = {key: cache.read([key])[0] for key in keys}
    overwrite(cache, keys[0], before[keys[1]], is_checksum_right=True)
    overwrite(cache, keys[1], (before[keys[1]] * np.float16(1.01)).astype(np.float16), is_checksum_right=True)
    overwrite(cache, keys[2], np.full_like(before[keys[2]], np.nan), is_checksum_right=True)
    found = verify(cache, rows, len(rows), 1)
    assert {problem.key for problem in found.problems} == set(keys)
    assert [problem.name for problem in found.problems if "not finite" in problem.what] == [samples[8].photo.source]
    assert sum("differs from what is encoded now by" in problem.what for problem in found.problems) == 2


def test_missing_rows_and_rows_of_another_form_are_named(filled, rows, tmp_path, noise_dataset, fakes):
    cache, samples = filled
    cache._index.remove(cache._index.find([samples[2].latent_keys[0]]).values())
    wrong = NeededRow("posterior", (8, 1, 1), "wrong.jpg", lambda: None)
    found = verify(cache, {**rows, samples[5].latent_keys[0]: wrong}, 0, 1)
    assert found.missing == [samples[2].photo.source]
    assert [(problem.name, problem.what.split(" is not ")[1]) for problem in found.problems] == [
        ("wrong.jpg", "posterior 8x1x1 float16")
    ]


def test_a_photograph_that_changed_is_named(tmp_path, fakes, make_noise):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        make_noise(number, (80, 80)).save(tmp_path / "photos" / f"{number}.png")
    ingest([tmp_path / "photos"], tmp_path / "dataset")
    samples, vae = fakes.plan(tmp_path / "dataset", fakes.FakeVae(), fakes.FakeTextEncoder()), fakes.FakeVae()
    with Cache(tmp_path / "cache") as cache:
        fill_latents(cache, tmp_path / "dataset", samples, vae, 3)
        os.truncate(tmp_path / "dataset" / samples[1].photo.file, 100)
        found = verify(cache, needed_rows(tmp_path / "dataset", samples, vae), 99, 1)
    assert {problem.name for problem in found.problems} == {samples[1].photo.source}
    assert "changed since it was prepared" in found.problems[0].what


def test_the_sample_depends_on_seed_and_keys_alone():
    keys = [f"{n:064x}" for n in range(50)]
    drawn = sample_keys(keys, 5, 1)
    assert drawn == sample_keys(keys[::-1], 5, 1) == sample_keys(keys, 9, 1)[:5]
    assert drawn != sample_keys(keys, 5, 2)
    assert [key for key in drawn if key != keys[0]] == sample_keys(keys[1:], 5, 1)[: len(drawn) - (keys[0] in drawn)]


def test_statistics_are_those_of_the_pixels_and_a_blank_photograph_is_far(tmp_path, fakes, make_noise):
    (tmp_path / "photos").mkdir()
    for number in range(11):
        make_noise(number, (80, 80)).save(tmp_path / "photos" / f"{number}.png")
    Image.new("RGB", (80, 80), (9, 9, 9)).save(tmp_path / "photos" / "blank.png")
    make_noise(99, (96, 64)).save(tmp_path / "photos" / "wide.png")
    ingest([tmp_path / "photos"], tmp_path / "dataset")
    vae = fakes.FakeVae()
    samples = fakes.plan(tmp_path / "dataset", vae, fakes.FakeTextEncoder())
    with Cache(tmp_path / "cache") as cache:
        fill_latents(cache, tmp_path / "dataset", samples, vae, 3)
        cache.append("text", ["x"], np.ones((1, 2, 3)))
        stats = cache_stats(cache, needed_rows(tmp_path / "dataset", samples, vae))
        means = [cache.read([key])[0][:4].reshape(4, -1) for sample in samples for key in sample.latent_keys]
    pixels = np.concatenate(means, axis=1).astype(np.float64)
    np.testing.assert_allclose(stats.channel_means, pixels.mean(axis=1))
    np.testing.assert_allclose(stats.channel_stds, pixels.std(axis=1))
    assert (stats.num_latents, stats.rows) == (39, {"posterior": 39, "text": 1})
    assert (stats.unneeded_rows, stats.unneeded_bytes) == ({"text": 1}, {"text": 12})
    assert [(far.name, far.num_crops) for far in stats.outliers] == [("photos/blank.png", 3)]


def test_token_ids_are_stored_as_whole_numbers_and_compared_exactly(tmp_path):
    ids = np.arange(6).reshape(2, 1, 3) + 40_000
    with Cache(tmp_path / "cache", "float16") as cache:
        assert cache.append("tokens", ["a", "b"], ids) == 2
        assert np.array_equal(cache.read(["a", "b"]), ids)
        with pytest.raises(ValueError, match="token ids are never float32"):
            cache.append("tokens", ["c"], ids[:1].astype(np.float32))
        rows = {key: NeededRow("tokens", (1, 3), key, lambda row=row: row) for key, row in zip("ab", ids, strict=True)}
        assert verify(cache, rows, 2, 1).is_sound
        rows["b"] = NeededRow("tokens", (1, 3), "b", lambda: ids[1] + [[0, 0, 1]])
        (problem,) = verify(cache, rows, 2, 1).problems
        assert (problem.key, problem.what) == ("b", "differs from what is encoded now")
        # rows of embeddings in their place are damage
        assert cache.append("text", ["c"], np.zeros((1, 1, 3))) == 1
        (error,) = cache.drop_damaged(["a", "c"], "tokens", (1, 3))
        assert error.reason == "is not tokens 1x3 int32"
        assert cache.missing(["a", "b", "c"]) == ["c"]
    # another dtype of embeddings leaves them as they are
    with Cache(tmp_path / "cache", "float32") as cache:
        assert cache.drop_damaged(["a", "b"], "tokens", (1, 3)) == []


def test_a_rows_own_limit_counts(filled, rows):
    cache, samples = filled
    key = samples[0].latent_keys[0]
    stored = cache.read([key])[0].astype(np.float32)
    # ten roundings of its largest value
    shifted = stored + 10 * 2.0**-10 * np.abs(stored).max()
    usual = replace(rows[key], again=lambda: shifted)
    (problem,) = verify(cache, {key: usual}, 1, 1).problems
    assert problem.what.endswith("roundings of float16 (limit 4)")
    assert verify(cache, {key: replace(usual, max_roundings=32)}, 1, 1).is_sound
    (problem,) = verify(cache, {key: replace(usual, max_roundings=9)}, 1, 1).problems
    assert problem.what.endswith("(limit 9)")
