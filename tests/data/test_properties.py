"""Property tests (hypothesis) of buckets, crops, splits, epoch plans and text."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.data.buckets import Bucket, make_buckets, nearest_bucket
from safelight.data.epochs import plan_epoch
from safelight.data.manifest import split_validation
from safelight.data.photo import Photo
from safelight.data.placement import place_photos
from safelight.data.samples import plan_samples
from safelight.text import collapse, printable, storable
from tests.data.crops import crop_of_variant

few = settings(deadline=None, max_examples=150, derandomize=True)
sides = st.integers(16, 5000)
multiples = st.sampled_from([8, 16, 32, 64])


@st.composite
def bucket_settings(draw) -> tuple[int, int, float]:
    """Valid (resolution, multiple, max_aspect)."""
    multiple = draw(multiples)
    return multiple * draw(st.integers(2, 24)), multiple, draw(st.floats(1, 16))


@few
@given(chosen=bucket_settings())
def test_buckets_keep_the_budget_the_multiple_and_the_aspect(chosen):
    resolution, multiple, max_aspect = chosen
    buckets = make_buckets(resolution, multiple, max_aspect)
    assert any((b.width, b.height) == (resolution, resolution) for b in buckets)
    for b in buckets:
        assert b.width % multiple == b.height % multiple == 0
        assert b.width * b.height <= resolution**2
        assert max(b.width, b.height) <= max_aspect * min(b.width, b.height)
        # neither side can grow by one multiple, unless the bucket exists for its exact 3:2
        is_camera = 2 * max(b.width, b.height) == 3 * min(b.width, b.height)
        wider, taller = ((b.width + multiple, b.height), (b.width, b.height + multiple))
        fits = [w * h <= resolution**2 and max(w, h) <= max_aspect * min(w, h) for w, h in (wider, taller)]
        assert is_camera or not any(fits)
    assert {(b.height, b.width) for b in buckets} == {(b.width, b.height) for b in buckets}


@few
@given(chosen=bucket_settings(), width=sides, height=sides)
def test_a_photo_goes_to_the_nearest_aspect_and_its_transpose_to_one_as_near(chosen, width, height):
    buckets = make_buckets(*chosen)
    bucket = nearest_bucket(width, height, buckets)

    def distance(b) -> float:
        return abs(math.log(b.width / b.height) - math.log(width / height))

    assert distance(bucket) <= min(map(distance, buckets)) + 1e-8
    assert nearest_bucket(width, height, buckets[::-1]) == bucket
    # of two equally near ones the first in order is chosen, so the transposed photo may get the other one
    mirrored = nearest_bucket(height, width, buckets)
    assert abs(distance(Bucket(mirrored.height, mirrored.width)) - distance(bucket)) <= 1e-8


@few
@given(
    chosen=bucket_settings(),
    width=sides,
    height=sides,
    sample=st.integers(0, 2**56 - 1),
    variant=st.integers(0, 63),
    jitter=st.floats(0, 0.5, exclude_max=True),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_crop_lies_in_its_photo_and_has_the_buckets_aspect(chosen, width, height, sample, variant, jitter, seed):
    bucket = nearest_bucket(width, height, make_buckets(*chosen))
    left, top, right, bottom = crop_of_variant(width, height, bucket, seed, sample, variant, jitter)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    # a side is rounded twice at most: to the window, and to the jittered window
    wide, high = right - left, bottom - top
    assert abs(wide - high * bucket.aspect) <= 1 + bucket.aspect or min(wide, high) == 1


def photo(number: int, captions: int = 1) -> Photo:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    words = tuple(f"{number} {index}" for index in range(captions))
    return Photo(f"images/{number}.png", digest, 40 + number % 7 * 20, 40 + number % 5 * 30, words, "s", "c")


numbers = st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True)
fractions = st.floats(0, 1, exclude_max=True)
seeds = st.integers(0, 2**64 - 1)


@few
@given(names=numbers, fraction=fractions, seed=seeds)
def test_a_split_is_a_partition_of_the_right_size(names, fraction, seed):
    photos = [photo(number) for number in names]
    train, held_out = split_validation(photos, fraction, seed)
    assert sorted(p.file for p in train + held_out) == sorted(p.file for p in photos)
    assert train
    if fraction == 0:
        assert held_out == []
    elif len(photos) > 1:
        assert len(held_out) == min(max(1, math.ceil(round(fraction * len(photos), 9))), len(photos) - 1)


@few
@given(names=numbers, more=numbers, fraction=st.floats(0.01, 0.5), seed=seeds)
def test_added_photos_do_not_reshuffle_the_split(names, more, fraction, seed):
    """Of the old photos, more or fewer are held out than before, but always the same ones first."""
    old = [photo(number) for number in names]
    new = [photo(number) for number in more if number not in names]
    before = {p.file for p in split_validation(old, fraction, seed)[1]}
    after = {p.file for p in split_validation(new + old, fraction, seed)[1]} & {p.file for p in old}
    assert before <= after or after <= before


@few
@given(
    names=numbers,
    batch_size=st.integers(1, 20),
    epoch=st.integers(0, 1000),
    seed=seeds,
    dropout=st.floats(0, 1),
    repeat=st.integers(1, 3),
)
def test_every_photo_is_met_exactly_once_an_epoch(names, batch_size, epoch, seed, dropout, repeat):
    samples = (
        plan_samples(
            place_photos([photo(number, captions=1 + number % 3) for number in names], make_buckets(64, 8)),
            variants=1 + len(names) % 4,
            crop_jitter=0.1,
            flip_p=0.5,
            seed=seed,
            vae_fingerprint="v",
            text_fingerprint="t",
            dtype="float16",
        )
        * repeat
    )
    options = {"seed": seed, "epoch": epoch, "caption_dropout": dropout}
    plan = plan_epoch(samples, batch_size=batch_size, **options)
    refs = [ref for batch in plan for ref in batch.refs]
    assert sorted(ref.sample_index for ref in refs) == list(range(len(samples)))
    assert Counter((ref.sample_id, ref.occurrence) for ref in refs).most_common(1)[0][1] == 1
    for batch in plan:
        assert 1 <= len(batch.refs) <= batch_size
        for ref in batch.refs:
            sample = samples[ref.sample_index]
            assert sample.bucket == batch.bucket
            assert 0 <= ref.variant < len(sample.latent_keys)
            assert -1 <= ref.caption < len(sample.captions)
    # grouped: the same batches, all full ones of a shape in one run, the short ones at the end
    together = plan_epoch(samples, batch_size=batch_size, grouped=True, **options)
    assert Counter(together) == Counter(plan)
    shapes = [(batch.bucket, len(batch.refs)) for batch in together]
    runs = [shape for shape, _ in itertools.groupby(shapes)]
    assert len(runs) == len(set(runs))
    sizes = [size for _, size in shapes]
    assert [size < batch_size for size in sizes] == sorted(size < batch_size for size in sizes)
    # shapes, and batches within a shape, keep the order of the shuffle
    for shape in runs:
        mine = [[b for b in order if (b.bucket, len(b.refs)) == shape] for order in (together, plan)]
        assert mine[0] == mine[1]
    full = [shape for shape in dict.fromkeys((b.bucket, len(b.refs)) for b in plan) if shape[1] == batch_size]
    assert [shape for shape in runs if shape[1] == batch_size] == full
    # the order of the manifest has no influence
    backwards = plan_epoch(samples[::-1], batch_size=batch_size, grouped=True, **options)
    ids = [[[(ref.sample_id, ref.occurrence) for ref in b.refs] for b in order] for order in (together, backwards)]
    assert ids[0] == ids[1]
    # each photo's variant and caption depend on neither the batch size nor the order
    met = {(ref.sample_id, ref.occurrence): (ref.variant, ref.caption) for ref in refs}
    other = [ref for batch in plan_epoch(samples[::-1], batch_size=1, **options) for ref in batch.refs]
    assert met == {(ref.sample_id, ref.occurrence): (ref.variant, ref.caption) for ref in other}


texts = st.text(st.characters(), max_size=40)


@few
@given(text=texts)
def test_a_collapsed_caption_is_one_line_of_valid_utf8_and_collapses_to_itself(text):
    caption = collapse(text)
    assert collapse(caption) == caption
    assert caption.encode("utf-8").decode("utf-8") == caption
    assert not set(caption) & set("\0\x1b\n\r\t\u2028")
    # no visible character is lost
    assert [c for c in text if c.isprintable() and not c.isspace()] == [
        c for c in caption if c.isprintable() and not c.isspace() and (c != "\ufffd" or "\ufffd" in text)
    ]


@few
@given(text=texts)
def test_printable_text_prints_and_storable_text_encodes(text):
    assert printable(text).isprintable()
    assert storable(text).encode("utf-8").decode("utf-8") == storable(text)
    if text.isprintable():
        assert printable(text) == storable(text) == text
