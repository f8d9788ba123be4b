"""Photographs burnt or smoothed on purpose: the committed figures, and the tool that makes them."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from safelight.bench.core.results import RESULTS
from safelight.trainer.metrics.picture_measures import VERSION
from tests.trainer.metrics.synthetic_photos import synthetic_photos
from tools.burn_check import DAMAGES, STYLES, check, load

PHOTOS = Path(os.environ.get("SAFELIGHT_SHARED", "")) / "photos"


def keeps_its_promises(figures: dict, size_px: int = 128) -> None:
    """Check what is claimed of one size: real photographs pass, clear damage is found, and more damage scores more."""
    for name in DAMAGES:
        assert figures["real"][name]["false_alarm_share"][0] <= 0.05
    assert figures["contrast and colour"]["x 2"]["auc"] >= 0.95
    assert figures["contrast and colour"]["x 3"]["auc"] >= 0.95
    assert figures["blur"]["radius 1"]["auc"] >= 0.95
    # five pixels are less of a larger picture
    assert figures["median"]["5 px" if size_px <= 256 else "7 px"]["auc"] >= 0.95
    for name, damages in DAMAGES.items():
        for damage, grades in damages.items():
            medians = [figures["real"][name]["median_score"], *(figures[damage][g]["median_score"] for g in grades)]
            aucs = [0.5, *(figures[damage][grade]["auc"] for grade in grades)]
            assert medians == sorted(medians), damage
            assert aucs == sorted(aucs), damage
    for style in STYLES:
        for name in DAMAGES:
            assert figures[style][name]["false_alarm_share"][0] <= 0.05, style


def test_the_committed_figures_keep_what_is_claimed_at_every_size():
    lines = [json.loads(line) for line in (RESULTS / "burn.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["config"]["version"] == VERSION]
    assert {line["config"]["size_px"] for line in lines} == {128, 256, 512}, "measure again: the measures have changed"
    for line in lines:
        assert line["config"]["half"] == "odd judged"
        keeps_its_promises(line["figures"], line["config"]["size_px"])


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the shared photographs: set SAFELIGHT_SHARED")
def test_damage_is_found_on_photographs():
    images = load(PHOTOS, 128)
    even, odd = ([image for number, image in images.items() if number % 2 == rest] for rest in (0, 1))
    keeps_its_promises(check(even, odd))


def test_photographs_are_numbered_before_small_ones_are_left_out(tmp_path):
    for number, pixels in enumerate(synthetic_photos(3)):
        image = Image.fromarray(pixels)
        (image.resize((32, 32)) if number == 1 else image).save(tmp_path / f"{number}.png")
    images = load(tmp_path, 48)
    assert list(images) == [0, 2]
    assert images[0].size == (48, 48)
