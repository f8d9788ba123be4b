"""Epoch plans contain every sample once and depend only on their arguments; batches are cached rows, read ahead."""

import hashlib
import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from safelight.data.batches import iterate, load_batch
from safelight.data.buckets import Bucket, make_buckets
from safelight.data.cache import Cache, CorruptRow, plan_samples
from safelight.data.draws import draw_words
from safelight.data.epochs import MicroBatch, SampleRef, plan_epoch
from safelight.data.photo import Photo
from safelight.data.placement import place_photos
from safelight.kernels import philox
from safelight.kernels.philox import Key, Purpose
from tests.data.rows import EMPTY, source

SIZES = ((100, 100), (150, 100), (100, 150), (300, 100))


def make_samples(num, captions=3, variants=4):
    photos = [
        Photo(
            f"images/{i}.jpg",
            hashlib.sha256(str(i).encode()).hexdigest(),
            *SIZES[i % 4],
            tuple(f"{i} {j}" for j in range(captions)),
            "",
            "",
        )
        for i in range(num)
    ]
    return plan_samples(
        place_photos(photos, make_buckets(64, 8)),
        variants=variants,
        crop_jitter=0.1,
        flip_p=0.5,
        seed=1,
        vae_fingerprint="v",
        text_fingerprint="text-a",
        dtype="float16",
    )


def plan(samples, **change):
    return plan_epoch(samples, **{"seed": 3, "epoch": 0, "batch_size": 4, "caption_dropout": 0.1, **change})


def refs_of(batches):
    return [ref for batch in batches for ref in batch.refs]


def draws(batches):
    """Return each sample's (variant, caption), without its place in the plan."""
    return {(ref.sample_id, ref.occurrence): (ref.variant, ref.caption) for ref in refs_of(batches)}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_every_sample_is_planned_once_and_in_its_bucket(batch_size):
    samples = make_samples(103)
    batches = plan(samples, batch_size=batch_size)
    assert sorted(ref.sample_index for ref in refs_of(batches)) == list(range(103))
    for batch in batches:
        assert 1 <= len(batch.refs) <= batch_size
        for ref in batch.refs:
            assert samples[ref.sample_index].bucket == batch.bucket
            assert samples[ref.sample_index].photo.sample_id == ref.sample_id
    # at most one short batch per bucket
    sizes = {
        bucket: Counter(len(b.refs) for b in batches if b.bucket == bucket) for bucket in {b.bucket for b in batches}
    }
    for counts in sizes.values():
        assert sum(count for size, count in counts.items() if size < batch_size) <= 1


def test_draws_depend_on_neither_batch_size_nor_order():
    samples = make_samples(60)
    first = draws(plan(samples))
    assert draws(plan(samples, batch_size=7)) == first
    assert draws(plan(samples[::-1])) == first
    assert draws(plan(samples[:20])).items() <= first.items()


def test_the_plan_does_not_depend_on_the_manifest_order():
    samples = make_samples(40)
    there = [[ref.sample_id for ref in batch.refs] for batch in plan(samples)]
    back = [[ref.sample_id for ref in batch.refs] for batch in plan(samples[::-1])]
    assert there == back


def test_plans_differ_between_epochs_and_seeds_and_repeat_otherwise():
    samples = make_samples(40)
    assert plan(samples) == plan(samples)
    orders = [[ref.sample_id for ref in refs_of(plan(samples, **c))] for c in ({}, {"epoch": 1}, {"seed": 4})]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert draws(plan(samples)) != draws(plan(samples, epoch=1))


def test_draws_are_those_of_philox():
    """The vectorized draws equal those of the scalar functions bit for bit and use the documented keys."""
    samples = make_samples(30)
    meetings = [(s.photo.sample_id, 0) for s in samples]
    expected = [philox.words(Key(3, Purpose.EPOCH_ORDER, i, 5), 2) for i, _ in meetings]
    keys = [Key(3, Purpose.EPOCH_ORDER, i, 5) for i, _ in meetings]
    np.testing.assert_array_equal(draw_words(keys)[:, :2], expected)
    for (sample_id, _), (variant, caption) in draws(plan(samples, epoch=5, caption_dropout=0.3)).items():
        dropped = philox.uniforms(Key(3, Purpose.CAPTION_DROPOUT, sample_id, 5))[0] < 0.3
        assert variant == philox.integers(Key(3, Purpose.VARIANT, sample_id, 5), 4)[0]
        assert caption == (-1 if dropped else philox.integers(Key(3, Purpose.CAPTION_CHOICE, sample_id, 5), 3)[0])
    order = sorted(samples, key=lambda s: philox.sort_key(Key(3, Purpose.EPOCH_ORDER, s.photo.sample_id, 5)))
    first_of_bucket = {}
    for sample in order:
        first_of_bucket.setdefault(sample.bucket, []).append(sample.photo.sample_id)
    for batch in plan(samples, epoch=5):
        ids = [ref.sample_id for ref in batch.refs]
        start = first_of_bucket[batch.bucket].index(ids[0])
        assert first_of_bucket[batch.bucket][start : start + len(ids)] == ids
        assert start % 4 == 0
    places = [philox.sort_key(Key(3, Purpose.BATCH_ORDER, b.refs[0].sample_id, 5)) for b in plan(samples, epoch=5)]
    assert places == sorted(places)


def test_rates_of_dropout_variants_and_captions():
    samples = make_samples(80)
    met = [pair for epoch in range(25) for pair in draws(plan(samples, epoch=epoch, caption_dropout=0.2)).values()]
    variants, captions = (np.array(column) for column in zip(*met, strict=True))
    assert np.bincount(variants, minlength=4) / 2000 == pytest.approx([0.25] * 4, abs=0.04)
    assert np.mean(captions == -1) == pytest.approx(0.2, abs=0.04)
    assert np.bincount(captions[captions >= 0], minlength=3) / sum(captions >= 0) == pytest.approx(
        [1 / 3] * 3, abs=0.05
    )
    # independent: the rate of dropout is the same in each variant
    for variant in range(4):
        assert np.mean(captions[variants == variant] == -1) == pytest.approx(0.2, abs=0.08)
    assert all(caption >= 0 for _, caption in draws(plan(samples, caption_dropout=0.0)).values())
    assert all(caption == -1 for _, caption in draws(plan(samples, caption_dropout=1.0)).values())


def test_buckets_are_mixed_over_the_epoch():
    """Batches of one bucket do not follow each other: after the shuffle, runs of equal buckets are short."""
    batches = plan(make_samples(400), batch_size=2)
    buckets = [batch.bucket for batch in batches]
    changes = sum(a != b for a, b in itertools.pairwise(buckets))
    assert changes > 0.6 * len(buckets)


def test_repeated_samples_count_occurrences_and_draw_anew_for_each():
    samples = make_samples(30)
    batches = plan(samples * 3)
    assert Counter(ref.occurrence for ref in refs_of(batches)) == {0: 30, 1: 30, 2: 30}
    met = draws(batches)
    first, second = ([met[s.photo.sample_id, k] for s in samples] for k in (0, 1))
    assert first != second
    assert {pair: met[pair] for pair in met if pair[1] == 0} == draws(plan(samples))


def test_bad_settings_are_named():
    samples = make_samples(3)
    with pytest.raises(ValueError, match="batch_size 0"):
        plan(samples, batch_size=0)
    with pytest.raises(ValueError, match=r"caption_dropout 1\.2"):
        plan(samples, caption_dropout=1.2)
    with pytest.raises(ValueError, match="no sample"):
        plan([])


@pytest.fixture(scope="module")
def filled(tmp_path_factory, noise_dataset, fakes):
    with Cache(tmp_path_factory.mktemp("batches") / "cache") as cache:
        fakes.fill(cache, noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder())
        yield cache, fakes.plan(noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder())


def test_batch_holds_the_rows_of_its_refs(filled):
    cache, samples = filled
    for micro_batch in plan(samples, caption_dropout=0.4):
        batch = load_batch(source(cache, samples), micro_batch)
        assert batch.bucket == micro_batch.bucket
        assert batch.sample_ids == tuple(ref.sample_id for ref in micro_batch.refs)
        assert {t.dtype for t in (batch.mean_BCHW, batch.logvar_BCHW, batch.conditioning.text_BTD)} == {torch.float32}
        for i, ref in enumerate(micro_batch.refs):
            sample = samples[ref.sample_index]
            row = cache.read([sample.latent_keys[ref.variant]])[0].astype(np.float32)
            np.testing.assert_array_equal(batch.mean_BCHW[i], row[:4])
            np.testing.assert_array_equal(batch.logvar_BCHW[i], row[4:])
            text = cache.read([EMPTY if ref.caption == -1 else sample.text_keys[ref.caption]])[0]
            np.testing.assert_array_equal(batch.conditioning.text_BTD[i], text.astype(np.float32))


def test_batch_without_posterior_has_no_logvar(tmp_path, filled, noise_dataset, fakes):
    vae, text = fakes.FakeVae(has_posterior=False), fakes.FakeTextEncoder()
    with Cache(tmp_path / "cache") as cache:
        fakes.fill(cache, noise_dataset, vae, text)
        samples = fakes.plan(noise_dataset, vae, text)
        batch = load_batch(source(cache, samples), plan(samples)[0])
        assert batch.logvar_BCHW is None
        assert batch.mean_BCHW.shape[1] == 4


@pytest.mark.parametrize("prefetch", [1, 2, 50])
def test_iterate_gives_the_same_batches_in_order(filled, prefetch):
    cache, samples = filled
    micro_batches = plan(samples)
    for micro_batch, batch in zip(micro_batches, iterate(source(cache, samples), micro_batches, prefetch), strict=True):
        expected = load_batch(source(cache, samples), micro_batch)
        assert torch.equal(batch.mean_BCHW, expected.mean_BCHW)
        assert torch.equal(batch.conditioning.text_BTD, expected.conditioning.text_BTD)
        assert batch.sample_ids == expected.sample_ids


def test_iterate_reads_ahead_and_no_further(filled, monkeypatch):
    cache, samples = filled
    # of runs that other tests ended by an error, which still holds their batches
    before = set(threading.enumerate())
    micro_batches = plan(samples, batch_size=1)
    loaded = threading.Semaphore(0)
    num_loaded = []

    def counted(*args):
        batch = load_batch(*args)
        num_loaded.append(1)
        loaded.release()
        return batch

    monkeypatch.setattr("safelight.data.batches.load_batch", counted)
    batches = iterate(source(cache, samples), micro_batches, prefetch=3)
    next(batches)
    for _ in range(4):
        assert loaded.acquire(timeout=10)
    assert not loaded.acquire(timeout=0.1)
    batches.close()
    assert len(num_loaded) == 4
    assert not [thread for thread in {*threading.enumerate()} - before if thread.name.startswith("load-batch")]


def test_iterate_raises_an_error_of_the_thread_at_its_batch(filled):
    cache, samples = filled
    micro_batches = plan(samples)
    missing = MicroBatch(Bucket(64, 64), (SampleRef(1, 0, 0, 0, -1),))
    batches = iterate(source(cache, samples, "no such key"), [micro_batches[0], missing, micro_batches[1]])
    with pytest.raises(ValueError, match="no row no such key"):
        list(batches)
    batches = iterate(source(cache, samples), [*micro_batches[:2], missing])
    assert len([batch for _, batch in zip(range(2), batches, strict=False)]) == 2


def test_damaged_row_reaches_the_consumer(tmp_path, noise_dataset, fakes):
    with Cache(tmp_path / "cache") as cache:
        fakes.fill(cache, noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder())
    for shard in (tmp_path / "cache" / "shards").glob("posterior-*"):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    samples = fakes.plan(noise_dataset, fakes.FakeVae(), fakes.FakeTextEncoder())
    with Cache(tmp_path / "cache") as cache, pytest.raises(CorruptRow):
        list(iterate(source(cache, samples), plan(samples)))
