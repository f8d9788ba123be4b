"""Buckets are the maximal sizes within the pixel budget; crops have the bucket's aspect and lie inside the photo."""

import itertools

import numpy as np
import pytest

from safelight.data.buckets import Bucket, make_buckets, nearest_bucket
from tests.data.crops import crop_of_variant, is_flipped

SETTINGS = [(256, 64), (512, 64), (768, 64), (1024, 64), (64, 8), (128, 8)]


def contains(outer, inner):
    return outer != inner and outer.width >= inner.width and outer.height >= inner.height


def is_3_2(bucket):
    return 2 * bucket.width == 3 * bucket.height or 3 * bucket.width == 2 * bucket.height


@pytest.mark.parametrize("max_aspect", [1.0, 2.0, 2.3, 4.0])
@pytest.mark.parametrize(("resolution", "multiple"), SETTINGS)
def test_buckets_are_exactly_the_maximal_sizes_and_3_2(resolution, multiple, max_aspect):
    """Compare with a brute-force search over all allowed sizes."""
    buckets = make_buckets(resolution, multiple, max_aspect)
    sides = range(multiple, 5 * resolution, multiple)
    allowed = [
        Bucket(w, h)
        for w, h in itertools.product(sides, sides)
        if w * h <= resolution**2 and max(w, h) <= max_aspect * min(w, h)
    ]
    widest_of_height: dict[int, int] = {}
    for bucket in allowed:
        widest_of_height[bucket.height] = max(widest_of_height.get(bucket.height, 0), bucket.width)
    candidates = [Bucket(w, h) for h, w in widest_of_height.items()]
    maximal = {b for b in candidates if not any(contains(other, b) for other in candidates)}
    camera = {b for b in allowed if is_3_2(b)}
    largest = max((b.width * b.height for b in camera), default=0)
    exact = {b for b in camera if b.width * b.height == largest} if largest >= 0.6 * resolution**2 else set()
    assert set(buckets) == maximal | exact
    assert list(buckets) == sorted(set(buckets))
    assert {Bucket(b.height, b.width) for b in buckets} == set(buckets)
    assert Bucket(resolution, resolution) in buckets


@pytest.mark.parametrize(
    ("resolution", "multiple", "width", "height"),
    [(512, 64, 576, 384), (768, 64, 768, 512), (1024, 64, 1152, 768), (64, 8, 72, 48), (128, 8, 144, 96)],
)
def test_3_2_photos_get_an_exact_3_2_bucket(resolution, multiple, width, height):
    buckets = make_buckets(resolution, multiple)
    assert nearest_bucket(6000, 4000, buckets) == Bucket(width, height)
    assert nearest_bucket(1000, 1500, buckets) == Bucket(height, width)


def test_3_2_that_wastes_too_much_is_left_out():
    assert not any(is_3_2(bucket) for bucket in make_buckets(256, 64))


@pytest.mark.parametrize(
    ("resolution", "multiple", "message"),
    [(1000, 64, "use 960 or 1024"), (60, 8, "use 56 or 64"), (64, 64, "use 128 or more"), (0, 8, "too small")],
)
def test_bad_resolution_suggests_valid_ones(resolution, multiple, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_buckets(resolution, multiple)
    assert str(resolution) in str(caught.value)


def test_nearest_is_nearest_by_log_ratio_and_ties_go_to_the_larger():
    buckets = make_buckets(512, 64)
    rng = np.random.default_rng(0)
    for width, height in rng.integers(50, 5000, (300, 2)):
        chosen = nearest_bucket(int(width), int(height), buckets)
        distances = [abs(np.log(b.width / b.height) - np.log(width / height)) for b in buckets]
        assert abs(np.log(chosen.aspect) - np.log(width / height)) == pytest.approx(min(distances), abs=1e-8)
    small, large = Bucket(64, 64), Bucket(128, 128)
    assert nearest_bucket(10, 10, [small, large]) == large
    # 2:1 and 1:2 are equally far from a square, whatever order they come in
    for width, height in itertools.combinations(range(1, 30), 2):
        both = [Bucket(width, height), Bucket(height, width)]
        assert nearest_bucket(10, 10, both) == nearest_bucket(10, 10, both[::-1]) == both[0]


@pytest.mark.parametrize("size", [(767, 767), (1024, 683), (683, 1024), (301, 2000), (16, 16)])
def test_canonical_crop_is_the_largest_centred_window(size):
    width, height = size
    for bucket in make_buckets(512, 64):
        left, top, right, bottom = crop_of_variant(width, height, bucket, 1, 2, 0, 0.5)
        assert right - left == width or bottom - top == height
        assert abs(left - (width - right)) <= 1
        assert abs(top - (height - bottom)) <= 1
        # the cropped side is within half a pixel of its exact length
        if right - left == width:
            assert abs((bottom - top) - width / bucket.aspect) <= 0.5 or bottom - top == height
        else:
            assert abs((right - left) - height * bucket.aspect) <= 0.5


def test_jittered_crops_stay_inside_keep_the_aspect_and_reach_everywhere():
    bucket = Bucket(64, 32)
    boxes = np.array([crop_of_variant(1000, 800, bucket, 5, sample, 1, 0.25) for sample in range(600)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 1000
    assert bottom.max() <= 800
    widths, heights = right - left, bottom - top
    assert np.abs(widths / heights - 2).max() < 0.01
    assert 750 <= widths.min() < 765
    assert 985 < widths.max() <= 1000
    # the offsets cover their whole range uniformly
    place = top / (800 - heights)
    assert place.min() < 0.02
    assert place.max() > 0.98
    assert place.mean() == pytest.approx(0.5, abs=0.05)


def test_crops_are_functions_of_seed_sample_and_variant():
    arguments = (1000, 800, Bucket(64, 64))
    first = crop_of_variant(*arguments, 1, 2, 1, 0.3)
    assert first == crop_of_variant(*arguments, 1, 2, 1, 0.3)
    others = [crop_of_variant(*arguments, *key, 0.3) for key in ((2, 2, 1), (1, 3, 1), (1, 2, 2), (1, 2, 0))]
    assert len({first, *others}) == 5
    with pytest.raises(ValueError, match=r"crop_jitter 1\.0"):
        crop_of_variant(*arguments, 1, 2, 1, 1.0)


def test_flip_rate_and_canonical_variant():
    assert not any(is_flipped(1, sample, 0, 1.0) for sample in range(50))
    assert all(is_flipped(1, sample, 1, 1.0) for sample in range(50))
    assert not any(is_flipped(1, sample, 1, 0.0) for sample in range(50))
    rate = np.mean([is_flipped(1, sample, 2, 0.3) for sample in range(1500)])
    assert rate == pytest.approx(0.3, abs=4 * (0.21 / 1500) ** 0.5)
    with pytest.raises(ValueError, match=r"flip_p 1\.5"):
        is_flipped(1, 1, 1, 1.5)
