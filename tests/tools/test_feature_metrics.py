"""Every metric grows, or falls, with the strength of a damage; halves of the same photographs are at chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safelight.trainer.features.lpips import Lpips
from safelight.trainer.features.open_extractor import open_extractor
from safelight.trainer.metrics.diversity import diversity
from tests.trainer.features.conftest import shared  # noqa: F401
from tools.feature_metrics import all_metrics, blurred, burnt, of_halves, shrunk

NUM = 50


@pytest.mark.slow
def test_metrics_are_monotone_under_graded_damage(shared):  # noqa: F811
    device = torch.device("cpu")
    extractor = open_extractor(str(shared / "weights" / "efficientnet_lite0" / "efficientnet_lite0.onnx"), device)
    photos = [shrunk(path) for path in sorted((shared / "photos").glob("*.jpg"))[::3][: 2 * NUM]]
    features = extractor.features(photos)
    real, others = features[::2], photos[1::2]
    damages = {
        "burnt": [features[1::2], *(extractor.features([burnt(one, by) for one in others]) for by in (1.5, 2, 3))],
        "blurred": [features[1::2], *(extractor.features([blurred(one, by) for one in others]) for by in (1, 2, 4, 8))],
        "fewer": [np.resize(features[1::2][:num], features[1::2].shape) for num in (50, 25, 12, 6)],
    }
    for name, sets in damages.items():
        found = [all_metrics(real, drawn) for drawn in sets]
        for metric in ("kid", "cmmd"):
            values = [one[metric].value for one in found]
            assert values == sorted(values), (name, metric)
        # a blur of radius 1 is lost in its bias
        values = [one["frechet"].value for one in found]
        assert values[0] < values[2]
        assert values[1:] == sorted(values[1:]), name
        for metric in ("kid", "cmmd"):
            assert found[0][metric].low < 0 < found[-1][metric].low, (name, metric)
        assert found[-1]["density"].value < found[0]["density"].value, name
        assert found[-1]["coverage"].value <= found[0]["coverage"].value, name
    # of the last damage, few different pictures
    assert found[-1]["coverage"].high < found[0]["coverage"].low
    halves = of_halves(features, 30)
    for metric in ("kid", "cmmd"):
        assert abs(halves[metric]["mean"]) < halves[metric]["sd"] < halves[metric]["half_width"]
    assert halves["density"]["mean"] == pytest.approx(1, abs=0.25)


@pytest.mark.slow
def test_fewer_different_photographs_are_less_diverse(shared):  # noqa: F811
    measure = Lpips(shared / "weights" / "lpips_alex_fp16.safetensors", torch.device("cpu"))
    photos = [shrunk(path) for path in sorted((shared / "photos").glob("*.jpg"))[::12][:24]]
    found = [
        diversity(measure.distances(24, lambda place, num=num: photos[place % num])).value for num in (24, 12, 6, 2)
    ]
    assert found == sorted(found, reverse=True)
    soft = diversity(measure.distances(24, lambda place: blurred(photos[place], 8))).value
    assert soft < found[0]
