"""The similarity to the nearest training photograph, and the limit that photographs themselves set."""

import numpy as np
import pytest

from safelight.trainer.metrics.exceedance import exceedance_p
from safelight.trainer.metrics.memorisation import fit_photographs

WIDTH = 24


def features(num: int, key: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=key)).normal(size=(num, WIDTH)).astype(np.float32) + 3


def flagged(photographs, pictures) -> int:
    return int((photographs.nearest(pictures).similarity > photographs.limit.value).sum())


def test_copies_are_flagged_with_their_photograph_and_new_pictures_are_not():
    training = features(60, 1)
    photographs = fit_photographs(training, features(20, 2))
    copies = training[[5, 17, 40, 9]] + 0.2 * features(4, 3)
    nearest = photographs.nearest(copies)
    assert nearest.place.tolist() == [5, 17, 40, 9]
    assert not nearest.is_mirrored.any()
    assert flagged(photographs, copies) == 4
    assert exceedance_p(4, 4, photographs.limit) < 1e-5
    new = features(200, 4)
    assert flagged(photographs, new) <= 8
    assert exceedance_p(flagged(photographs, new), 200, photographs.limit) > 0.05


def test_the_limit_is_the_largest_similarity_of_held_out_and_of_other_training_photographs():
    training, held_out = features(30, 1), features(10, 2)
    photographs = fit_photographs(training, held_out)
    centre = np.concatenate([training, held_out]).astype(float).mean(0)
    units = [(rows - centre) / np.linalg.norm(rows - centre, axis=1, keepdims=True) for rows in (training, held_out)]
    among = units[0] @ units[0].T
    np.fill_diagonal(among, -1)
    expected = max(among.max(), (units[1] @ units[0].T).max())
    assert photographs.limit.value == pytest.approx(expected)
    assert (photographs.limit.num, photographs.limit.num_above, photographs.limit.chance) == (40, 0, 1 / 41)


def test_enough_photographs_give_the_percentile():
    photographs = fit_photographs(features(1500, 1), features(700, 2))
    assert (photographs.limit.num, photographs.limit.num_above) == (2200, 1)
    assert photographs.limit.chance == pytest.approx(2 / 2201)


def test_near_copies_among_the_training_photographs_do_not_raise_the_limit():
    training = features(40, 1)
    training[1] = training[0] + 0.01
    naive = fit_photographs(training, features(10, 2))
    grouped = fit_photographs(training, features(10, 2), groups=["x", "x", *[""] * 38])
    assert naive.limit.value > 0.999
    assert grouped.limit.value < 0.9
    assert grouped.limit.num == 50


def test_a_mirrored_copy_is_a_copy_where_training_mirrors():
    training, mirrored = features(40, 1), features(40, 5)
    copy = mirrored[7:8] + 0.1 * features(1, 6)
    assert flagged(fit_photographs(training, features(10, 2)), copy) == 0
    photographs = fit_photographs(training, features(10, 2), mirrored)
    nearest = photographs.nearest(copy)
    assert (nearest.place.tolist(), nearest.is_mirrored.tolist(), flagged(photographs, copy)) == ([7], [True], 1)
    # held-out photographs have as many chances to resemble one
    assert photographs.limit.value > fit_photographs(training, features(10, 2)).limit.value - 0.2
    assert photographs.similarities(copy)[0, 1, 7] == pytest.approx(nearest.similarity[0])


def test_few_photographs_give_a_limit_that_says_how_little_it_is_worth():
    photographs = fit_photographs(features(2, 1), features(1, 2))
    assert photographs.limit.num == 3
    assert photographs.limit.chance == 0.25
    assert exceedance_p(1, 1, photographs.limit) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("num_training", "num_held_out", "groups", "message"),
    [
        (0, 5, [], "takes a training photograph"),
        (1, 0, [], "takes a training photograph"),
        (3, 0, ["x", "x", "x"], "near-copies of each other"),
    ],
)
def test_nothing_to_compare_is_refused(num_training, num_held_out, groups, message):
    with pytest.raises(ValueError, match=message):
        fit_photographs(features(num_training, 1), features(num_held_out, 2), groups=groups)
