"""Filling the cache: rows equal the encoders' output, each is encoded once, and changed inputs are noticed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.data import cache as cache_module
from safelight.data.buckets import make_buckets
from safelight.data.cache import (
    Cache,
    Crop,
    decode_photo,
    empty_text_key,
    fill_latents,
    fill_texts,
    latent_key,
    plan_samples,
    sample_captions,
    text_key,
)
from safelight.data.manifest import read_manifest
from safelight.data.placement import place_photos
from safelight.data.prepare.ingest import ingest
from safelight.errors import UserError
from tests.data.crops import crop_of_variant, is_flipped
from tests.data.rows import all_keys, contents
from tests.pixels import load_pixels


def test_rows_are_the_encoding_of_the_crop(filled, noise_dataset, fakes):
    cache, samples = filled
    for sample in samples[:6]:
        for key, crop in zip(sample.latent_keys, sample.crops, strict=True):
            size = (sample.bucket.width, sample.bucket.height)
            pixels = load_pixels(noise_dataset / sample.photo.file, crop.box, size, crop.is_flipped)
            mean, logvar = fakes.FakeVae().encode(torch.from_numpy(pixels)[None])
            expected = torch.cat([mean, logvar], dim=1)[0].numpy().astype(np.float16)
            np.testing.assert_array_equal(cache.read([key])[0], expected)
            assert cache.kind_of(key) == "posterior"
        expected = fakes.FakeTextEncoder().encode([sample.captions[0]])[0].numpy().astype(np.float16)
        np.testing.assert_array_equal(cache.read([sample.text_keys[0]])[0], expected)


def test_filling_again_encodes_nothing(filled, noise_dataset, fakes):
    cache, samples = filled
    vae, text = fakes.FakeVae(), fakes.FakeTextEncoder()
    before = len(cache)
    assert fakes.fill(cache, noise_dataset, vae, text) == 0
    assert (vae.num_encoded, text.encoded, len(cache)) == (0, [], before)
    assert before == len(all_keys(samples))


def test_shared_captions_are_encoded_once_and_the_empty_one_always(tmp_path, fakes):
    text = fakes.FakeTextEncoder()
    with Cache(tmp_path / "cache") as cache:
        assert fill_texts(cache, ["a", "b", "a"], text, batch_size=2) == 3
        assert text.encoded == ["", "a", "b"]
        assert fill_texts(cache, ["b", "c"], text, batch_size=2) == 1
        assert cache.missing([text_key(t, "text-a", "float16") for t in ("", "a", "b", "c")]) == []


def test_latents_without_posterior(tmp_path, noise_dataset, fakes):
    vae = fakes.FakeVae(has_posterior=False)
    samples = fakes.plan(noise_dataset, vae, fakes.FakeTextEncoder(), variants=1)
    with Cache(tmp_path / "cache") as cache:
        fill_latents(cache, noise_dataset, samples, vae, batch_size=4)
        row = cache.read(samples[0].latent_keys[:1])
        assert cache.kind_of(samples[0].latent_keys[0]) == "latent"
        assert row.shape == (1, 4, samples[0].bucket.height // 8, samples[0].bucket.width // 8)


def test_keys_cover_everything_their_row_depends_on(noise_dataset):
    photo = read_manifest(noise_dataset)[0]
    base = {"variants": 2, "crop_jitter": 0.2, "flip_p": 1.0, "seed": 1, "dtype": "float16"}
    base |= {"vae_fingerprint": "v", "text_fingerprint": "t"}
    buckets = make_buckets(64, 8)

    def keys(buckets=buckets, photo=photo, **change):
        (sample,) = plan_samples(place_photos([photo], buckets), **{**base, **change})
        return (*sample.latent_keys, *sample.text_keys)

    first = keys()
    assert keys() == first
    changes = {
        "vae_fingerprint": ("w", (0, 1)),
        "text_fingerprint": ("u", (2,)),
        "dtype": ("float32", (0, 1, 2)),
        "seed": (2, (1,)),
        "crop_jitter": (0.5, (1,)),
        "flip_p": (0.0, (1,)),
        "prefix": ("x ", (2,)),
        "suffix": (", x", (2,)),
        "buckets": (make_buckets(128, 8), (0, 1)),
    }
    for name, (value, changed) in changes.items():
        other = keys(**{name: value})
        assert {i for i in range(3) if other[i] != first[i]} == set(changed), name


def test_planned_crops_equal_those_drawn_one_at_a_time(noise_dataset, fakes):
    settings = {"variants": 4, "crop_jitter": 0.3, "flip_p": 0.4, "seed": 11}
    for sample in fakes.plan(noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder(), **settings):
        photo = sample.photo
        for variant, crop in enumerate(sample.crops):
            box = crop_of_variant(photo.width, photo.height, sample.bucket, 11, photo.sample_id, variant, 0.3)
            assert crop == Crop(box, is_flipped(11, photo.sample_id, variant, 0.4))


def test_prefix_and_suffix_are_encoded_and_the_empty_caption_has_neither(noise_dataset, fakes):
    vae, text = fakes.FakeVae(), fakes.FakeTextEncoder()
    samples = fakes.plan(noise_dataset, vae, text, prefix="photo of ", suffix=", film")
    assert samples[0].captions == ("photo of noise 0, film",)
    assert len(sample_captions(samples)) == 10
    assert empty_text_key("text-a", "float16") == text_key("", "text-a", "float16")


def test_changed_photo_is_noticed(tmp_path, noise_dataset, fakes, make_noise):
    dataset = tmp_path / "dataset"
    shutil.copytree(noise_dataset, dataset)
    vae, text = fakes.FakeVae(), fakes.FakeTextEncoder()
    name = read_manifest(dataset)[3].file
    make_noise(99, (64, 96)).save(dataset / name)
    with Cache(tmp_path / "cache") as cache:
        with pytest.raises(ValueError, match=f"{name} changed since .*safelight prepare"):
            fakes.fill(cache, dataset, vae, text)
        (dataset / name).unlink()
        with pytest.raises(ValueError, match=f"{name} cannot be read .*safelight prepare"):
            fakes.fill(cache, dataset, vae, text)


def test_a_vae_or_dtype_other_than_planned_is_refused(tmp_path, noise_dataset, fakes):
    samples = fakes.plan(noise_dataset, fakes.FakeVae("vae-a"), fakes.FakeTextEncoder())
    with Cache(tmp_path / "cache") as cache, pytest.raises(ValueError, match="a VAE or dtype other"):
        fill_latents(cache, noise_dataset, samples, fakes.FakeVae("vae-b"), 4)
    with Cache(tmp_path / "cache", "float32") as cache, pytest.raises(ValueError, match="dtype"):
        fill_latents(cache, noise_dataset, samples, fakes.FakeVae("vae-a"), 4)


def test_non_finite_latents_name_the_photo(tmp_path, noise_dataset, fakes):
    class Broken(fakes.FakeVae):
        def encode(self, pixels_BCHW):
            mean, logvar = super().encode(pixels_BCHW)
            mean[-1, 0, 0, 0] = float("nan")
            return mean, logvar

    samples = fakes.plan(noise_dataset, Broken(), fakes.FakeTextEncoder())
    with Cache(tmp_path / "cache") as cache:
        with pytest.raises(ValueError, match=r"values that are not finite for images/noise-"):
            fill_latents(cache, noise_dataset, samples, Broken(), 4)
        assert len(cache) == 0


def test_another_vae_or_dtype_adds_its_own_rows_and_leaves_the_others(filled, noise_dataset, fakes):
    cache, samples = filled
    keys = all_keys(samples)
    before, num_rows = contents(cache, keys), len(cache)
    num_latents = len({key for sample in samples for key in sample.latent_keys})
    vae, encoder = fakes.FakeVae("vae-b"), fakes.FakeTextEncoder()
    assert fakes.fill(cache, noise_dataset, vae, encoder) == vae.num_encoded == num_latents
    assert encoder.encoded == []
    assert contents(cache, keys) == before
    vae = fakes.FakeVae()
    with Cache(cache.path, "float32") as exact:
        planned = fakes.plan(noise_dataset, vae, encoder, dtype="float32")
        made = fill_texts(exact, sample_captions(planned), encoder, 4) + fill_latents(
            exact, noise_dataset, planned, vae, 3
        )
        assert made == num_rows
        assert contents(exact, keys) == before


def test_an_edited_photo_is_noticed_and_only_its_rows_are_encoded_again(tmp_path, fakes, make_noise):
    """Edited in the dataset it is an error, though its rows are cached; edited at its source it gets new rows."""
    source, dataset = tmp_path / "source", tmp_path / "dataset"
    source.mkdir()
    for i in range(3):
        make_noise(i, (64, 48)).save(source / f"same_{i}.png")
    first = ingest([source], dataset).photos
    vae, encoder = fakes.FakeVae(), fakes.FakeTextEncoder()
    with Cache(tmp_path / "cache") as cache:
        assert fakes.fill(cache, dataset, vae, encoder) == 3 * 3 + 2
        stored = (dataset / first[1].file).read_bytes()
        make_noise(77, (64, 48)).save(dataset / first[1].file)
        with pytest.raises(ValueError, match=r"same_1-.* changed since it was prepared; run `safelight prepare` again"):
            fakes.fill(cache, dataset, vae, encoder)
        # preparing again restores the file, so nothing needs encoding
        ingest([source], dataset)
        assert (dataset / first[1].file).read_bytes() == stored
        assert fakes.fill(cache, dataset, vae, encoder) == 0
        make_noise(77, (64, 48)).save(source / "same_1.png")
        ingest([source], dataset)
        vae.num_encoded = 0
        assert fakes.fill(cache, dataset, vae, encoder) == vae.num_encoded == 3


def test_photos_are_read_again_only_when_size_or_time_changed(tmp_path, noise_dataset, fakes, monkeypatch):
    dataset = shutil.copytree(noise_dataset, tmp_path / "dataset")
    reads = []
    read = cache_module.read_stored

    def counting(path, sha256):
        reads.append(path.relative_to(dataset).as_posix())
        return read(path, sha256)

    monkeypatch.setattr(cache_module, "read_stored", counting)
    vae, encoder = fakes.FakeVae(), fakes.FakeTextEncoder()
    with Cache(tmp_path / "cache") as cache:
        fakes.fill(cache, dataset, vae, encoder)
        reads.clear()
        fakes.fill(cache, dataset, vae, encoder)
        assert reads == []
        touched = read_manifest(dataset)[4].file
        os.utime(dataset / touched)
        fakes.fill(cache, dataset, vae, encoder)
        assert reads == [touched]


def test_a_photo_is_decoded_once_for_its_variants(tmp_path, noise_dataset, fakes, monkeypatch):
    calls = []
    monkeypatch.setattr(Image, "open", lambda *a, real=Image.open, **k: calls.append(1) or real(*a, **k))
    samples = fakes.plan(noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder())[:1]
    with Cache(tmp_path / "cache") as cache:
        assert fill_latents(cache, noise_dataset, samples, fakes.FakeVae(), batch_size=8) == 3
    assert len(calls) == 1


def test_latent_key_changes_with_the_photo(noise_dataset, fakes):
    samples = fakes.plan(noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder())
    keys = [latent_key(s.photo, samples[0].crops[0], samples[0].bucket, "v", "float16") for s in samples]
    assert len(set(keys)) == len(samples)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_large(path: Path) -> None:
    # sparse: takes no room on the disk, and would take the memory
    os.truncate(path, 2**30 + 1)


@pytest.mark.parametrize("make", [make_pipe, make_device, make_folder, make_large])
def test_photos_that_are_no_regular_files_of_a_sensible_size_are_not_read(
    tmp_path, noise_dataset, fakes, make: Callable[[Path], None]
):
    dataset = shutil.copytree(noise_dataset, tmp_path / "dataset")
    photo = read_manifest(dataset)[3]
    make(dataset / photo.file)
    encoders = fakes.FakeVae(), fakes.FakeTextEncoder()
    with Cache(tmp_path / "cache") as cache, pytest.raises(UserError, match=f"{photo.file} (is not|has 1,0)") as caught:
        fakes.fill(cache, dataset, *encoders)
    assert str(caught.value).endswith("run `safelight prepare` again to make it anew")
    # an index that says that it was read already, and has the rows
    with Cache(tmp_path / "full") as cache:
        fakes.fill(cache, noise_dataset, *encoders)
        status = os.stat(dataset / photo.file)
        cache.note_photos({photo.file: (photo.sha256, status.st_size, status.st_mtime_ns)})
        if make is not make_large:
            with pytest.raises(UserError, match=f"{photo.file} is not a regular file"):
                fakes.fill(cache, dataset, *encoders)
    with pytest.raises(UserError, match=photo.file):
        decode_photo(dataset, photo)


def test_a_photo_of_a_year_that_the_index_cannot_hold_is_read_each_time(tmp_path, noise_dataset, fakes, monkeypatch):
    dataset = shutil.copytree(noise_dataset, tmp_path / "dataset")
    photo = read_manifest(dataset)[3]
    stat = os.stat

    def future(path, *args, **options):
        status = stat(path, *args, **options)
        if Path(path).name != Path(photo.file).name:
            return status
        return SimpleNamespace(st_size=status.st_size, st_mtime_ns=2**63, st_mode=status.st_mode)

    monkeypatch.setattr(cache_module.os, "stat", future)
    with Cache(tmp_path / "cache") as cache:
        assert fakes.fill(cache, dataset, fakes.FakeVae(), fakes.FakeTextEncoder()) > 0
        files = [photo.file for photo in read_manifest(dataset)]
        assert cache.seen_photos(files).keys() == set(files) - {photo.file}
