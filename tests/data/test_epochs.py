"""Epoch plans with repeats, batch ids and carried batches: every use is counted, trained once, and keyed."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import astuple, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.data.buckets import make_buckets
from safelight.data.epochs import (
    SampleColumns,
    Span,
    count_batches,
    count_uses,
    group_of,
    left_over,
    num_uses,
    plan_epoch,
    uses_by_group,
)
from safelight.data.photo import Photo, PhotoSettings
from safelight.data.placement import place_photos
from safelight.data.samples import Sample, plan_samples
from safelight.kernels.philox import Key, Purpose, uniforms
from tests.data.plan_by_uses import plan_by_uses

few = settings(deadline=None, max_examples=40, derandomize=True)
SHAPES = ((40, 40), (80, 40), (40, 80), (120, 40))


def photo(number: int, repeats: float = 1.0, batch_id: str = "", **own) -> Photo:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    chosen = PhotoSettings(repeats=repeats, batch_id=batch_id, **own)
    return Photo(f"{number}.png", digest, *SHAPES[number % 4], ("a", "b"), f"{number}.png", "s", settings=chosen)


def samples_of(photos: list[Photo], *resolutions: int) -> list[Sample]:
    return plan_samples(
        place_photos(photos, *(make_buckets(side, 8) for side in resolutions or (64,))),
        variants=2,
        crop_jitter=0.1,
        flip_p=0.5,
        seed=1,
        vae_fingerprint="v",
        text_fingerprint="t",
        dtype="float16",
    )


repeats = st.sampled_from([0.0, 0.25, 1.0, 1.5, 3.0])
photos = st.lists(st.builds(photo, st.integers(0, 999), repeats, st.sampled_from(["", "", "a", "b"])), min_size=1)
unique_photos = photos.map(lambda found: list({one.file: one for one in found}.values()))
spans = st.lists(st.builds(Span, st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3)
runs = {"found": unique_photos, "stages": spans, "seed": st.integers(0, 2**64 - 1), "carries": st.booleans()}


def plans(samples: list[Sample], stages: list[Span], seed: int, carries: bool, **more) -> list[list]:
    """Return the plan of every epoch of a run."""
    made, epoch = [], 0
    for span in stages:
        for _ in range(span.epochs):
            carried = left_over(samples, stages, seed=seed, epoch=epoch) if carries else None
            options = {"seed": seed, "epoch": epoch, "caption_dropout": 0.1, "carried": carried, **more}
            made.append(plan_epoch(samples, batch_size=span.batch_size, **options))
            epoch += 1
    return made


@few
@given(**runs, grouped=st.booleans())
def test_plans_equal_those_made_a_use_at_a_time(found, stages, seed, carries, grouped):
    # one photo twice, which two samples of one id are
    samples = samples_of([*found, replace(found[0], file="again.png")], 64, 80)
    carried = None
    for epoch in range(3):
        if carries:
            carried = left_over(samples, [Span(3, stages[0].batch_size)], seed=seed, epoch=epoch)
        options = {"seed": seed, "epoch": epoch, "batch_size": stages[0].batch_size, "caption_dropout": 0.3}
        options |= {"grouped": grouped, "carried": carried}
        expected = plan_by_uses(samples, **options)
        assert plan_epoch(samples, **options) == expected
        assert plan_epoch(SampleColumns.of(samples), **options) == expected
        assert all(type(value) is int for batch in expected for ref in batch.refs for value in astuple(ref))


@few
@given(**runs)
def test_the_plan_has_the_batches_that_were_counted(found, stages, seed, carries):
    samples = samples_of(found)
    counts = count_batches(samples, stages, seed=seed, carries=carries)
    expected = [
        numbers[0] if len(numbers) == 1 else numbers[i]
        for numbers, span in zip(counts, stages, strict=True)
        for i in range(span.epochs)
    ]
    assert [len(plan) for plan in plans(samples, stages, seed, carries)] == expected
    # placements without cache keys, as `safelight plan` has them, count the same
    assert count_batches(place_photos(found, make_buckets(64, 8)), stages, seed=seed, carries=carries) == counts


@few
@given(**runs)
def test_every_use_that_is_due_is_trained_once_or_left_over(found, stages, seed, carries):
    samples, num_epochs = samples_of(found), sum(span.epochs for span in stages)
    due = Counter()
    for epoch in range(num_epochs):
        for sample, num in zip(samples, num_uses(samples, seed, [epoch])[0].tolist(), strict=True):
            assert num in (int(sample.photo.settings.repeats), int(sample.photo.settings.repeats) + 1)
            due[sample.sample_id] += num
    trained, batch_sizes = Counter(), [span.batch_size for span in stages for _ in range(span.epochs)]
    for plan, batch_size in zip(plans(samples, stages, seed, carries), batch_sizes, strict=True):
        refs = [ref for batch in plan for ref in batch.refs]
        assert len({(ref.sample_id, ref.occurrence) for ref in refs}) == len(refs)
        trained.update(ref.sample_id for ref in refs)
        for batch in plan:
            assert len({group_of(samples[ref.sample_index]) for ref in batch.refs}) == 1
            assert len(batch.refs) == batch_size if carries else 1 <= len(batch.refs) <= batch_size
    left = left_over(samples, stages, seed=seed, epoch=num_epochs) if carries else {}
    assert not trained - due
    assert sum((due - trained).values()) == sum(left.values())
    missing = Counter()
    for sample in samples:
        missing[group_of(sample)] += (due - trained)[sample.sample_id]
    assert +missing == +Counter(left)
    assert count_uses(samples, seed=seed, num_epochs=num_epochs) == due.total()
    assert sum(uses_by_group(samples, seed=seed, num_epochs=num_epochs).values()) == due.total()


@few
@given(**runs, grouped=st.booleans())
def test_a_plan_does_not_depend_on_the_order_of_the_manifest(found, stages, seed, carries, grouped):
    both = []
    for ordered in (found, found[::-1]):
        samples = samples_of(ordered, 64, 96)
        both.append(
            [
                [
                    [(ref.sample_id, ref.occurrence, ref.variant, ref.caption, batch.bucket) for ref in batch.refs]
                    for batch in plan
                ]
                for plan in plans(samples, stages, seed, carries, grouped=grouped)
            ]
        )
    assert both[0] == both[1]


def test_a_fraction_is_one_more_use_as_its_key_draws():
    samples = samples_of([photo(number, 2.3) for number in range(8)])
    counts = num_uses(samples, 5, range(400))
    assert set(counts.ravel().tolist()) == {2, 3}
    assert abs(counts.mean() - 2.3) < 4 * (0.21 / counts.size) ** 0.5
    for index, sample in enumerate(samples):
        drawn = [uniforms(Key(5, Purpose.REPEAT, sample.sample_id, epoch))[0] < 0.3 for epoch in range(5)]
        assert (counts[:5, index] == 3).tolist() == [bool(more) for more in drawn]


def test_what_is_carried_over_comes_first_and_the_oldest_first():
    """One bucket of 5, batches of 4: each use is trained before any use that is due later."""
    samples, stages = samples_of([photo(4 * number) for number in range(5)]), [Span(8, 4)]
    made = plans(samples, stages, 3, True)
    assert [len(plan) for plan in made] == [1, 1, 1, 2, 1, 1, 1, 2]
    total = Counter()
    for plan in made:
        total.update(ref.sample_id for batch in plan for ref in batch.refs)
    assert set(total.values()) == {8}
    # after the first epoch one photograph waits; it is in the first batch of the second
    first = {ref.sample_id for ref in made[0][0].refs}
    (waiting,) = {sample.sample_id for sample in samples} - first
    assert waiting in {ref.sample_id for ref in made[1][0].refs}


def test_more_epochs_than_keys_are_refused_where_epochs_differ():
    samples = samples_of([photo(1, 1.5)])
    with pytest.raises(ValueError, match="70,000 epochs are more than the 65,536"):
        count_batches(samples, [Span(70_000, 1)], seed=1, carries=False)
    assert count_batches(samples_of([photo(1)]), [Span(10**9, 1)], seed=1, carries=False) == [(1,)]


def test_dropout_of_a_photo_comes_before_the_runs():
    samples = samples_of([photo(0, caption_dropout=1.0), photo(1, caption_dropout=0.0), photo(2)])
    seen = {number: set() for number in range(3)}
    for epoch in range(40):
        for batch in plan_epoch(samples, seed=2, epoch=epoch, batch_size=2, caption_dropout=0.5):
            for ref in batch.refs:
                seen[ref.sample_index].add(ref.caption)
    assert seen == {0: {-1}, 1: {0, 1}, 2: {-1, 0, 1}}
