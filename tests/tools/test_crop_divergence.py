"""The tool that measures the crop divergence of photographs which were changed on purpose."""

from pathlib import Path

import numpy as np

from safelight.trainer.metrics.crop_divergence import Crops
from tools.crop_divergence import CHANGES, DEFINITIONS, as_one_kind, figures_of, pictures_of


def crops(seed: int, spread: float) -> Crops:
    """Return two kinds of crops of each of 120 photographs."""
    features = spread * np.random.default_rng(seed).normal(size=(240, 4))
    return Crops(features, ["cat", "dog"] * 120, [f"{row // 2}" for row in range(240)], [1.0, 2.0] * 120)


def test_as_one_kind_a_photograph_gives_its_largest_crop():
    given = crops(0, 1.0)
    found = as_one_kind(given)
    assert list(found.groups) == [f"{group}" for group in range(120)]
    assert set(found.names) == {"thing"}
    assert (found.features == given.features[1::2]).all()


def test_boxes_are_those_of_the_unchanged_photographs_if_they_shall_be():
    for same_boxes in (True, False):
        names = {pictures_of([Path("a.jpg")], change, same_boxes)[0].sha256 for change in CHANGES}
        assert len(names) == (1 if same_boxes else len(CHANGES))


def test_the_definitions_differ_and_the_reversed_one_sees_more_of_what_is_spread_out():
    unchanged, changed = crops(1, 1.0), crops(2, 2.0)
    groups = [f"{group}" for group in range(120)]
    each, as_one, reverse = (figures_of(unchanged, changed, groups, definition) for definition in DEFINITIONS)
    assert (each["classes"], as_one["classes"]) == (2, 1)
    assert each["crops_first"] == 2 * as_one["crops_first"] == 120
    assert reverse["kl"] > 1.3 * as_one["kl"] > 0
