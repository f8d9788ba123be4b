"""Which buckets photos are trained in: several budgets, small photos, merged buckets, and what crops lose."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.data.buckets import Bucket, make_buckets, nearest_bucket
from safelight.data.photo import Photo, PhotoSettings
from safelight.data.placement import MAX_ENLARGEMENT, Placement, place_photos, too_small

few = settings(deadline=None, max_examples=100, derandomize=True)
AT_512, AT_768, AT_1024 = (make_buckets(side, 64) for side in (512, 768, 1024))


def photo(width: int, height: int, number: int = 0, repeats: float = 1.0) -> Photo:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return Photo(f"{number}.png", digest, width, height, ("a",), f"{number}.png", "s", settings=PhotoSettings(repeats))


@pytest.mark.parametrize(("width", "height"), [(6000, 4000), (1600, 1067), (1067, 1600), (5184, 3456), (3008, 2000)])
@pytest.mark.parametrize("buckets", [AT_512, AT_768, AT_1024])
def test_3_2_photographs_lose_at_most_2_percent(width, height, buckets):
    (placed,) = place_photos([photo(width, height)], buckets)
    assert placed.crop_loss <= 0.02


def test_crop_loss_is_what_the_canonical_crop_leaves_out():
    assert Placement(photo(1000, 1000), Bucket(512, 512)).crop_loss == 0
    assert Placement(photo(2000, 1000), Bucket(512, 512)).crop_loss == 0.5
    assert Placement(photo(1000, 1600), Bucket(512, 512)).crop_loss == pytest.approx(0.375)


def test_a_photo_is_used_in_every_budget_that_it_fills():
    photos = [photo(2000, 2000, 0), photo(800, 800, 1), photo(500, 500, 2), photo(420, 420, 3), photo(400, 400, 4)]
    sizes = {}
    for upscale in MAX_ENLARGEMENT:
        placed = place_photos(photos, AT_512, AT_768, AT_1024, upscale=upscale)
        sizes[upscale] = [[one.bucket.width for one in placed if one.photo is each] for each in photos]
    assert sizes["skip"] == [[512, 768, 1024], [512, 768], [], [], []]
    # 1.28 times from 800 to 1024, 1.22 times from 420 to 512
    assert sizes["allow"] == [[512, 768, 1024], [512, 768], [512], [512], []]
    assert sizes["always"] == [[512, 768, 1024]] * 5
    assert too_small(photos, place_photos(photos, AT_512, upscale="allow")) == [photos[4]]


def test_a_bucket_of_two_budgets_is_used_once():
    shared = set(AT_512) & set(make_buckets(576, 64))
    bucket = min(shared)
    placed = place_photos([photo(bucket.width * 2, bucket.height * 2)], (bucket,), (bucket,))
    assert [one.bucket for one in placed] == [bucket]


sides = st.integers(300, 3000)
photo_lists = st.lists(st.tuples(sides, sides, st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=1, max_size=40)


@few
@given(sizes=photo_lists, min_uses=st.integers(1, 12), upscale=st.sampled_from(list(MAX_ENLARGEMENT)))
def test_merged_buckets_hold_a_batch_or_none_could_take_them(sizes, min_uses, upscale):
    photos = [photo(width, height, number, repeats) for number, (width, height, repeats) in enumerate(sizes)]
    limit = MAX_ENLARGEMENT[upscale]
    alone = place_photos(photos, AT_512, upscale=upscale)
    merged = place_photos(photos, AT_512, upscale=upscale, min_uses=min_uses)
    assert [one.photo for one in merged] == [one.photo for one in alone]
    assert all(one.bucket == nearest_bucket(one.photo.width, one.photo.height, AT_512) for one in alone)
    assert all(one.enlargement <= limit for one in merged)
    uses = Counter()
    for one in merged:
        uses[one.bucket] += one.photo.settings.repeats
    for bucket in uses:
        if uses[bucket] < min_uses:
            members = [one.photo for one in merged if one.bucket == bucket]
            for other in set(uses) - {bucket}:
                assert any(Placement(member, other).enlargement > limit for member in members)
    backwards = place_photos(photos[::-1], AT_512, upscale=upscale, min_uses=min_uses)
    assert {one.photo.file: one.bucket for one in backwards} == {one.photo.file: one.bucket for one in merged}
    assert place_photos(photos, AT_512, upscale=upscale, min_uses=0) == alone
