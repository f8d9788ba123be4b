"""Crop divergence: what permutations keep, that chance stays chance, that what differs is found, and faults."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from safelight.trainer.metrics.crop_divergence import (
    OTHER,
    Crops,
    beyond,
    common_classes,
    compare,
    divisions,
    gain,
    group_keys,
    largest_of_each,
    merge_rare,
    project,
)


def made(features, names, groups) -> Crops:
    """Return crops of equal sizes."""
    return Crops(features, names, groups, [1.0] * len(names))


def crops(rng, num, tag="a", shift=0.0, scale=1.0, names=("person",), width=20, content=None, share=1.0) -> Crops:
    """Return crops of `num` groups, half of whose variance is their group's. share: of groups that have a class."""
    content = rng.normal(size=(num, width)) if content is None else content
    features, classes, groups = [], [], []
    for group in range(num):
        for place, name in enumerate(names):
            if rng.random() < share:
                features.append((content[group] + rng.normal(size=width)) * scale + shift + 5 * place)
                classes.append(name)
                groups.append(f"{tag}{group}")
    return made(np.array(features, dtype=np.float32), classes, groups)


def result(first, second, num_permutations=200):
    first, second = project([first, second])
    return compare(first, second, common_classes((first, second)), num_permutations)


def test_permutations_keep_the_number_of_crops_and_move_groups_as_one():
    """Ten pairs, five groups of the first set alone and three of the second."""
    first = made(np.zeros((15, 1)), ["x"] * 15, [f"pair {n}" for n in range(10)] + list("abcde"))
    second = made(np.zeros((13, 1)), ["x"] * 13, [f"pair {n}" for n in range(10)] + list("fgh"))
    dealt = divisions(first, second, group_keys((first, second), 500))
    assert dealt[0].tolist() == [True] * 15 + [False] * 13
    assert (dealt.sum(axis=1) == 15).all()
    # of a pair exactly one is in each set, and either is as often
    assert (dealt[:, :10] != dealt[:, 15:25]).all()
    assert dealt[1:, :10].mean(axis=0) == pytest.approx(np.full(10, 0.5), abs=0.1)
    # the others are dealt anew: five of eight
    single = [*range(10, 15), *range(25, 28)]
    assert (dealt[:, single].sum(axis=1) == 5).all()
    assert dealt[1:, single].mean(axis=0) == pytest.approx(np.full(8, 5 / 8), abs=0.1)


def test_what_one_picture_shows_moves_together_in_all_classes():
    rng = np.random.default_rng(0)
    for tag in ("a", "b"):
        first, second = crops(rng, 40, "a", names=("cat", "dog")), crops(rng, 40, tag, names=("cat", "dog"))
        keys = group_keys((first, second), 50)
        cats = divisions(first.of_class("cat"), second.of_class("cat"), keys)
        assert (cats == divisions(first.of_class("dog"), second.of_class("dog"), keys)).all()


def test_one_photographs_set_against_itself_is_chance():
    """Sets from one distribution, as pairs and not: z near 0, and p below 0.05 as rarely as it says."""
    rng = np.random.default_rng(1)
    for is_paired in (False, True):
        found = []
        for _ in range(15):
            content = rng.normal(size=(60, 20))
            second = crops(rng, 60, "a" if is_paired else "b", content=content if is_paired else None)
            found.append(result(crops(rng, 60, content=content), second, 100)[0])
        assert abs(np.mean([each.kl.z for each in found])) < 0.8
        assert 0.5 < np.std([each.kl.z for each in found]) < 1.6
        assert sum(each.kl.p <= 0.05 for each in found) <= 3


def test_several_crops_of_a_picture_taken_as_independent_would_cry_wolf():
    """Ten pictures of ten like crops each: by crop the same distribution differs, by picture it does not."""
    rng = np.random.default_rng(2)

    def pictures(tag):
        content = np.repeat(3 * rng.normal(size=(25, 6)), 10, axis=0)
        return [f"{tag}{n}" for n in range(25) for _ in range(10)], content + rng.normal(size=(250, 6))

    (groups, first), (others, second) = pictures("a"), pictures("b")
    by_crop = result(
        made(first, ["x"] * 250, [str(n) for n in range(250)]),
        made(second, ["x"] * 250, [str(n) for n in range(250, 500)]),
    )[0]
    assert by_crop.kl.z > 8
    one_of_each = largest_of_each(["x"] * 250, groups, rng.random(250).tolist())
    assert len(one_of_each) == 25
    by_picture = result(
        made(first[one_of_each], ["x"] * 25, [groups[n] for n in one_of_each]),
        made(second[one_of_each], ["x"] * 25, [others[n] for n in one_of_each]),
    )[0]
    assert abs(by_picture.kl.z) < 2.5
    with pytest.raises(ValueError, match="several crops of a class"):
        made(first, ["x"] * 250, groups)


def test_what_differs_is_found_and_more_so_the_more_it_differs():
    rng = np.random.default_rng(3)
    first = crops(rng, 100)
    values = []
    for shift, scale in ((0, 1.2), (0, 1.5), (0.5, 2)):
        found = result(first, crops(rng, 100, "b", shift, scale))[0]
        assert found.kl.z > 3
        assert found.kl.p == pytest.approx(1 / 201)
        values.append(found.kl.value)
    assert values == sorted(values)
    # a shift alone is what MMD sees well
    assert result(first, crops(rng, 100, "b", 0.4))[0].mmd.z > 3


def test_pairs_show_what_sets_of_unlike_prompts_hide():
    """What the prompts ask for varies more than the models differ: it cancels within pairs."""
    rng = np.random.default_rng(4)
    content = 3 * rng.normal(size=(80, 6))
    first = crops(rng, 80, width=6, content=content)
    paired = crops(rng, 80, "a", shift=0.6, width=6, content=content)
    unpaired = made(paired.features, paired.names, [f"b{n}" for n in range(80)])
    assert result(first, paired)[0].mmd.z > 2 * result(first, unpaired)[0].mmd.z


def test_classes_with_few_crops_are_grey_or_left_out():
    rng = np.random.default_rng(5)
    parts = [crops(rng, num, f"{name} ", names=(name,)) for name, num in (("cat", 60), ("dog", 30), ("cup", 19))]
    first = made(
        *(
            np.concatenate([part.features for part in parts]),
            [name for part in parts for name in part.names],
            [group for part in parts for group in part.groups],
        )
    )
    second = made(rng.normal(size=first.features.shape), first.names, [f"other {group}" for group in first.groups])
    pooled, classes = result(first, second)
    assert [(each.name, each.num_first, each.is_grey) for each in classes] == [("cat", 60, False), ("dog", 30, True)]
    assert (pooled.name, pooled.num_first, pooled.num_second, pooled.is_grey) == ("all", 90, 90, False)
    # two classes of the same thirty groups are thirty groups
    few = crops(rng, 30, names=("cat", "dog"))
    pooled, classes = result(few, crops(rng, 30, "b", names=("cat", "dog")))
    assert len(classes) == 2
    assert pooled.num_first == 60
    assert pooled.is_grey


def test_rare_classes_become_one_with_the_largest_crop_of_a_picture():
    """A class that one set has too little of is rare in all, and one rare crop of a picture stays."""
    first = Crops(np.arange(5.0)[:, None], ["cat", "cup", "dog", "cat", "cat"], list("aaabc"), [1, 2, 3, 1, 1])
    second = Crops(np.arange(4.0)[:, None], ["cat", "cat", "cat", "dog"], list("defd"), [1, 1, 1, 1])
    first, second = merge_rare([first, second], least=2)
    assert (list(first.names), list(first.groups)) == (["cat", OTHER, "cat", "cat"], list("aabc"))
    assert first.features[:, 0].tolist() == [0, 2, 3, 4]
    assert list(second.names) == ["cat", "cat", "cat", OTHER]


def test_the_headline_weighs_classes_by_their_crops():
    rng = np.random.default_rng(6)
    first, second = project(
        [crops(rng, 80, names=("cat", "dog"), share=0.8), crops(rng, 80, "b", 0.5, names=("cat", "dog"))]
    )
    weights = common_classes((first, second))
    pooled, classes = compare(first, second, weights, 100)
    by_name = {each.name: each for each in classes}
    expected = sum(weights[name] * by_name[name].kl.value for name in weights) / sum(weights.values())
    assert pooled.kl.value == pytest.approx(expected)
    assert weights["dog"] == sum(names.count("dog") for names in (list(first.names), list(second.names)))


def test_gain_says_which_model_is_nearer_to_photographs():
    rng = np.random.default_rng(7)
    content = rng.normal(size=(80, 20))
    real, far = crops(rng, 100, "real"), crops(rng, 80, "a", 1.0, 1.5, content=content)
    near = crops(rng, 80, "a", 0.2, 1.1, content=content)
    sets = project([real, far, near])
    better = gain(*sets, common_classes(sets), 200)
    assert better.value < -0.3
    assert better.z < -3
    assert better.p < 0.01
    worse = gain(sets[0], sets[2], sets[1], common_classes(sets), 200)
    assert worse.value == pytest.approx(-better.value, abs=0.05)
    assert worse.z > 3
    also_far = crops(rng, 80, "a", 1.0, 1.5, content=content)
    sets = project([real, far, also_far])
    assert abs(gain(*sets, common_classes(sets), 200).z) < 2.5


def test_the_same_crops_give_the_same_figures():
    rng = np.random.default_rng(8)
    first, second = crops(rng, 30), crops(rng, 30, "b")
    assert result(first, second) == result(first, second)


def test_a_thousand_permutations_of_five_hundred_crops_take_seconds():
    rng = np.random.default_rng(9)
    first, second = crops(rng, 250), crops(rng, 250, "b")
    began = time.process_time()
    result(first, second, 1000)
    assert time.process_time() - began < 10


def test_no_class_in_common_and_no_crops_at_all():
    rng = np.random.default_rng(10)
    pooled, classes = result(crops(rng, 30, names=("cat",)), crops(rng, 30, "b", names=("dog",)))
    assert pooled is None
    assert classes == ()
    nothing = made(np.zeros((0, 20)), [], [])
    pooled, classes = result(crops(rng, 30), nothing)
    assert pooled is None
    assert classes == ()
    with pytest.raises(ValueError, match="there are no crops"):
        project([nothing, nothing])
    equal = made(np.ones((30, 4)), ["x"] * 30, [str(n) for n in range(30)])
    with pytest.raises(ValueError, match="features of all crops are equal"):
        project([equal, equal])
    with pytest.raises(ValueError, match="not finite"):
        made(np.array([[math.nan]]), ["x"], ["a"])


def test_fewer_pictures_than_dimensions_and_features_that_hardly_vary():
    rng = np.random.default_rng(11)
    first, second = project([crops(rng, 20, width=500), crops(rng, 20, "b", width=500)])
    assert first.features.shape == (20, 8)
    assert abs(compare(first, second, {}, 100)[1][0].kl.z) < 3
    # one direction, and features far from zero
    line = [
        made(np.full((40, 6), 1e4) + rng.normal(size=(40, 1)), ["x"] * 40, [f"{tag}{n}" for n in range(40)])
        for tag in "ab"
    ]
    assert project(line)[0].features.shape == (40, 1)
    pooled, _ = result(*line)
    assert abs(pooled.kl.z) < 3
    # a class of equal crops in both sets
    sets = [crops(rng, 30, tag, names=("cat", "dog")) for tag in "ab"]
    for each in sets:
        each.features[[name == "dog" for name in each.names]] = 7
    dog = next(each for each in result(*sets)[1] if each.name == "dog")
    assert (dog.kl.value, dog.kl.z, dog.kl.p) == pytest.approx((0, 0, 1), abs=1e-6)


def test_beyond_counts_the_observed_division_as_one():
    assert beyond(np.array([9.0, 1, 2, 3])).p == 0.25
    assert beyond(np.array([0.0, 1, 2, 3])).p == 1
    assert beyond(np.array([-9.0, 1, -1, 0]), is_two_sided=True).p == 0.25
    assert beyond(np.array([3.0, 1, 2, 3])).value == 1


@pytest.mark.slow
def test_p_is_calibrated_and_power_grows_with_the_difference():
    """Of 200 comparisons of one distribution, about 5 % have p below 0.05; of slightly different ones, many more."""
    rng = np.random.default_rng(12)
    share = {}
    for scale in (1.0, 1.1, 1.25):
        found = []
        for _ in range(200):
            first = crops(rng, 60, names=("cat", "dog"), share=0.8)
            second = crops(rng, 80, "b", 0, scale, names=("cat", "dog"), share=0.7)
            found.append(result(first, second)[0])
        share[scale] = [np.mean([getattr(each, kind).p <= 0.05 for each in found]) for kind in ("kl", "mmd")]
    assert all(0.01 <= alarms <= 0.10 for alarms in share[1.0])
    assert share[1.25][0] > 0.95
    assert share[1.0][0] < share[1.1][0] < share[1.25][0]
