"""Measure what KID, FID, density and others say of real photographs against each other and against damaged ones.

    python -m tools.feature_metrics PHOTOS FEATURES [--lpips FILE] [--append FILE]

PHOTOS: a folder of photographs. FEATURES: as for `safelight evaluate --features`. Halves: two halves of the same
photographs, of 25, 50 and 100 each, drawn 20 times; their means and standard deviations are what a perfect model would
get. Damages: 100 photographs against 100 others that were burnt (contrast and colour), blurred, or became fewer
different ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from safelight.bench.core.results import append, make_record
from safelight.trainer.features.lpips import Lpips
from safelight.trainer.features.open_extractor import open_extractor
from safelight.trainer.metrics.diversity import diversity
from safelight.trainer.metrics.frechet import frechet
from safelight.trainer.metrics.interval import Interval
from safelight.trainer.metrics.kid import kid
from safelight.trainer.metrics.mmd import cmmd
from safelight.trainer.metrics.neighbours import neighbours
from safelight.trainer.metrics.resampling import halves

NUM, NUM_DRAWS = 100, 20
HALVES = (25, 50, 100)
# the longest side of what is compared
SIDE_PX = 512
BURNT, BLURRED = (1.25, 1.5, 2.0, 3.0), (1, 2, 4, 8)
# how many different photographs 100 pictures show, and how many LPIPS compares: 256 px cost about 0.05 s each
DIFFERENT, NUM_LPIPS = (100, 50, 20, 10), 60


def burnt(image: Image.Image, factor: float) -> Image.Image:
    """Return a picture with contrast and colour times a factor."""
    return ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(factor)).enhance(factor)


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def all_metrics(real: np.ndarray, drawn: np.ndarray) -> dict[str, Interval]:
    """Return every metric of sets by its name. CMMD's kernel is taken on whatever features there are."""
    near = neighbours(real, drawn)
    figures = {"kid": kid(real, drawn), "frechet": frechet(real, drawn), "cmmd": cmmd(real, drawn)}
    return {**figures, "density": near.density, "coverage": near.coverage}


def of_halves(features: np.ndarray, num: int) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of each metric, and its intervals' mean half width, of `num` against `num`."""
    found = []
    for draw in range(NUM_DRAWS):
        first, second = halves(len(features), name=f"half {draw}")
        found.append(all_metrics(features[first[:num]], features[second[:num]]))
    summary = {}
    for name in found[0]:
        values = np.array([one[name] for one in found])
        widths = (values[:, 2] - values[:, 1]) / 2
        summary[name] = {
            "mean": _rounded(values[:, 0].mean()),
            "sd": _rounded(values[:, 0].std(ddof=1)),
            "half_width": _rounded(widths.mean()),
        }
    return summary


def measure(
    photos: list[Image.Image], features: Callable[[list[Image.Image]], np.ndarray], lpips: Lpips | None
) -> dict[str, dict]:
    """Return all figures of a folder of photographs."""
    whole = features(photos)
    figures: dict[str, dict] = {f"halves_{num}": of_halves(whole, num) for num in HALVES if 2 * num <= len(photos)}
    first, second = halves(len(photos), name="damages")
    real, places = whole[first[:NUM]], second[:NUM]

    def against(drawn: np.ndarray) -> dict[str, list[float]]:
        return {name: list(map(_rounded, value)) for name, value in all_metrics(real, drawn).items()}

    figures["same"] = against(whole[places])
    for factor in BURNT:
        figures[f"burnt_{factor:g}"] = against(features([burnt(photos[place], factor) for place in places]))
    for radius in BLURRED:
        figures[f"blurred_{radius:g}"] = against(features([blurred(photos[place], radius) for place in places]))
    for num in DIFFERENT[1:]:
        # near copies: the same photographs, mirrored and not
        copies = np.resize(places[:num], NUM)
        figures[f"different_{num}"] = against(whole[copies])
    if lpips is not None:
        for num in DIFFERENT:
            shown = np.resize(places[: max(2, NUM_LPIPS * num // NUM)], NUM_LPIPS)
            distances = lpips.distances(NUM_LPIPS, lambda place, shown=shown: photos[shown[place]])
            figures[f"lpips_different_{num}"] = list(map(_rounded, diversity(distances)))
    return figures


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def shrunk(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("features")
    parser.add_argument("--lpips", type=Path, help="a .safetensors file with LPIPS's AlexNet")
    parser.add_argument("--append", type=Path, help="append the figures to this file of result lines")
    parser.add_argument("--note", default="", help="stands in the result line")
    options = parser.parse_args()
    device = torch.device("cpu")
    extractor = open_extractor(options.features, device)
    photos = [shrunk(path) for path in sorted(options.photos.iterdir()) if path.suffix.lower() in (".jpg", ".png")]
    lpips = Lpips(options.lpips, device) if options.lpips else None
    figures = measure(photos, extractor.features, lpips)
    for name, values in figures.items():
        print(f"{name}: {values}")
    config = {"features": extractor.name, "photographs": len(photos), "compared": NUM, "draws": NUM_DRAWS}
    if options.append:
        append(options.append, make_record("feature_metrics", config, figures, device, options.note))


if __name__ == "__main__":
    main()
