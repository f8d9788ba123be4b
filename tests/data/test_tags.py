"""The order of a photo's tags: drawn by weight, kept in front, limited, the same for the same key."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.data.buckets import Bucket
from safelight.data.photo import Photo, PhotoSettings, Tag
from safelight.data.placement import Placement
from safelight.data.samples import plan_samples
from safelight.data.tag_settings import TagSettings
from safelight.data.tags import order_tags
from safelight.kernels.philox import Key, Purpose, exponentials, words

few = settings(deadline=None, max_examples=100, derandomize=True)


def photo(number: int = 0, tags: dict[str, float] | None = None, captions=("a dog",), **own) -> Photo:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    listed = tuple(Tag(name, weight) for name, weight in (tags or {}).items())
    return Photo(f"{number}.png", digest, 64, 64, captions, "s", "c", tags=listed, settings=PhotoSettings(**own))


def orders(one: Photo, seed: int = 1, **chosen) -> list[tuple[str, ...]]:
    return order_tags([one], TagSettings(**{"variants": 8, **chosen}), seed)[0]


WEIGHTS = {"animal": 3.0, "dog": 2.0, "park": 1.0}


def test_tags_are_drawn_by_weight_without_replacement():
    """Each order's frequency against its exact probability: of 4,000 photos, within four standard deviations."""
    num = 4000
    photos = [photo(number, WEIGHTS) for number in range(num)]
    drawn = Counter(variants[1] for variants in order_tags(photos, TagSettings(2), 7))
    assert set(drawn) == set(itertools.permutations(WEIGHTS))
    for order, count in drawn.items():
        probability, rest = 1.0, sum(WEIGHTS.values())
        for name in order:
            probability *= WEIGHTS[name] / rest
            rest -= WEIGHTS[name]
        assert abs(count - num * probability) < 4 * (num * probability * (1 - probability)) ** 0.5


def test_the_first_variant_has_the_heaviest_tags_first_and_equal_ones_as_written():
    tags = {"park": 1.0, "sky": 1.0, "dog": 2.0, "never": 0.0, "animal": 3.0}
    assert orders(photo(0, tags))[0] == ("animal", "dog", "park", "sky")
    assert orders(photo(0, tags), keep=1)[0] == ("park", "animal", "dog", "sky")
    assert orders(photo(0, tags), limit=2)[0] == ("animal", "dog")
    assert orders(photo(0, tags), limit=2, shuffles=False)[0] == ("dog", "animal")


def test_the_draws_are_those_of_the_key_one_at_a_time():
    one = photo(5, {f"tag {number}": 1.0 + number % 3 for number in range(11)})
    found = order_tags([photo(1, WEIGHTS), one, photo(2), one], TagSettings(3), 9)
    assert found[1] == found[3] == orders(one, 9, variants=3)
    for variant in (1, 2):
        draws = exponentials(words(Key(9, Purpose.TAG_ORDER, one.sample_id, 0, variant), len(one.tags)))
        places = draws / np.array([tag.weight for tag in one.tags])
        assert found[1][variant] == tuple(one.tags[i].name for i in np.argsort(places))


def test_exponential_draws_have_these_bits_everywhere():
    drawn = exponentials(words(Key(1, Purpose.TAG_ORDER), 1000))
    assert drawn.dtype == np.float32
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "4f59dedcc9cbfb76"
    exact = -np.log((words(Key(1, Purpose.TAG_ORDER), 1000) | 1) / 2.0**32)
    np.testing.assert_allclose(drawn, exact, rtol=1e-6, atol=1e-7)


def test_a_photos_own_settings_come_first():
    tags = dict.fromkeys("abcdef", 1.0)
    assert {order[0] for order in orders(photo(0, tags, keep_tags=1))} == {"a"}
    assert len({order[0] for order in orders(photo(0, tags, keep_tags=0), keep=1)}) > 1
    assert orders(photo(0, tags, shuffle_tags=False)) == [tuple("abcdef")]
    assert len(orders(photo(0, tags, shuffle_tags=True), shuffles=False)) == 8


tag_lists = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.sampled_from([0.0, 0.5, 1.0, 1.2, 1000.0]), max_size=12
)


@few
@given(tags=tag_lists, keep=st.integers(0, 4), limit=st.integers(0, 6), shuffles=st.booleans(), seed=st.integers(0, 99))
def test_every_variant_is_a_draw_without_replacement(tags, keep, limit, shuffles, seed):
    one = photo(seed, tags)
    found = orders(one, seed, keep=keep, limit=limit, shuffles=shuffles)
    names, most = list(tags), limit or len(tags)
    front = names[: min(keep, most)]
    possible = [name for name in names[len(front) :] if tags[name] > 0]
    for order in found:
        assert list(order[: len(front)]) == front
        rest = list(order[len(front) :])
        assert len(rest) == len(set(rest)) == min(len(possible), most - len(front))
        assert set(rest) <= set(possible)
        if not shuffles:
            assert rest == [name for name in names[len(front) :] if name in rest]
    assert order_tags([photo(99), one], TagSettings(8, keep, limit, shuffles), seed)[1] == found


def captions(one: Photo, **chosen) -> tuple[str, ...]:
    prints = {"vae_fingerprint": "v", "text_fingerprint": "t", "dtype": "float16"}
    crops = {"variants": 1, "crop_jitter": 0.0, "flip_p": 0.0, "seed": 1}
    (sample,) = plan_samples([Placement(one, Bucket(64, 64))], tags=TagSettings(**chosen), **prints, **crops)
    assert len(sample.text_keys) == len(sample.captions)
    return sample.captions


def test_tags_follow_every_caption():
    one = photo(0, WEIGHTS, captions=("a dog", ""))
    first, *others = captions(one, variants=4)
    assert first == "a dog, animal, dog, park"
    assert len(others) == 7
    assert others[3] == "animal, dog, park"
    assert all(sorted(text.split(", ")) == sorted(["a dog", *WEIGHTS]) for text in others[:3])


@pytest.mark.parametrize("tags", [{}, {"dog": 2.0}, {"dog": 2.0, "never": 0.0}])
def test_tags_with_one_order_have_one_variant(tags):
    assert len(captions(photo(0, tags), variants=4)) == 1
