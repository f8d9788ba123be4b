"""Burn or smooth photographs on purpose, and see whether their scores tell.

    python -m tools.burn_check PHOTOS [--sizes 128 256 512] [--tuning] [--append FILE]

PHOTOS: a folder. Each is cropped to a square about its centre and shrunk to each size; what is smaller is left out. The
scale is fitted on the even-numbered photographs and judges the odd ones, numbered in the order of their names. --tuning
uses none of the odd ones: it fits on every fourth and judges the even ones between, to try changes on.

Figures of each size, of each damage: auc, the probability that a damaged photograph scores higher than a real one, both
drawn from those judged; over_share, of the damaged ones above the limit; rising_share, of the photographs whose score
rises with each grade of a damage; false_alarm_share, of the real ones above the limit, and its interval. Of each style:
the same, for a scale fitted on photographs that all look so: faded, without colour, hard.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from safelight.bench.core.results import append, make_record
from safelight.data.images import open_image
from safelight.trainer.metrics.burn import BurnScale, fit_scale
from safelight.trainer.metrics.exceedance import share_interval
from safelight.trainer.metrics.picture_measures import MEASURES, VERSION, measure

Change = Callable[[Image.Image], Image.Image]


def contrast(factor: float) -> Change:
    return lambda image: ImageEnhance.Contrast(image).enhance(factor)


def colour(factor: float) -> Change:
    return lambda image: ImageEnhance.Color(image).enhance(factor)


def both(factor: float) -> Change:
    return lambda image: colour(factor)(contrast(factor)(image))


def unsharp(percent: int) -> Change:
    return lambda image: image.filter(ImageFilter.UnsharpMask(2, percent, 0))


def blur(radius: float) -> Change:
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


def median(size: int) -> Change:
    return lambda image: image.filter(ImageFilter.MedianFilter(size))


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def faded(image: Image.Image) -> Image.Image:
    """Return a faded print: half the contrast, lifted blacks, little colour."""
    return colour(0.6)(contrast(0.5)(image)).point(lambda value: 40 + 0.8 * value)


# score -> damage -> its grades, from weak to strong
DAMAGES: dict[str, dict[str, dict[str, Change]]] = {
    "burnt": {
        "contrast and colour": {f"x {k}": both(k) for k in (1.25, 1.5, 2, 3)},
        "contrast alone": {f"x {k}": contrast(k) for k in (1.25, 1.5, 2, 3)},
        "colour alone": {f"x {k}": colour(k) for k in (1.25, 1.5, 2, 3)},
        "unsharp halos": {f"{percent} percent": unsharp(percent) for percent in (50, 100, 200, 400)},
    },
    "smoothed": {
        "blur": {f"radius {radius}": blur(radius) for radius in (0.5, 1, 2)},
        "median": {f"{size} px": median(size) for size in (3, 5, 7)},
    },
}
STYLES: dict[str, Change] = {"faded": faded, "without colour": grey, "hard": both(1.5)}


def auc(real: np.ndarray, damaged: np.ndarray) -> float:
    """Return the probability that a damaged one scores higher than a real one; half of ties."""
    difference = damaged[:, None] - real
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def measures_of(images: list[Image.Image], change: Change = lambda image: image) -> np.ndarray:
    return np.array([measure(np.asarray(change(image))) for image in images])


def _real(scale: BurnScale, real: np.ndarray) -> dict:
    figures = {}
    for name in scale.limits:
        num_over = int(scale.is_over(name, real).sum())
        interval = share_interval(num_over, len(real))
        figures[name] = {
            "limit": round(scale.limits[name].value, 3),
            "false_alarms": num_over,
            "false_alarm_share": [round(float(value), 4) for value in interval],
            "median_score": round(float(np.median(scale.score(name, real))), 3),
        }
    return figures


def check(fitted: list[Image.Image], judged: list[Image.Image]) -> dict:
    """Return the figures of one size: of the real photographs, each damage and each style."""
    scale, real = fit_scale(measures_of(fitted)), measures_of(judged)
    figures: dict = {"real": _real(scale, real)}
    for name, damages in DAMAGES.items():
        for damage, grades in damages.items():
            values = {grade: measures_of(judged, change) for grade, change in grades.items()}
            scores = np.array([scale.score(name, real), *(scale.score(name, value) for value in values.values())])
            figures[damage] = {
                grade: {
                    "auc": round(auc(scores[0], scores[number]), 4),
                    "over_share": round(float(scale.is_over(name, value).mean()), 4),
                    "median_score": round(float(np.median(scores[number])), 3),
                }
                for number, (grade, value) in enumerate(values.items(), start=1)
            }
            figures[damage]["rising_share"] = round(float((np.diff(scores, axis=0) > 0).all(0).mean()), 4)
    for style, change in STYLES.items():
        scale, real = fit_scale(measures_of(fitted, change)), measures_of(judged, change)
        figures[style] = _real(scale, real)
        burnt = measures_of(judged, lambda image, change=change: both(2)(change(image)))
        smooth = measures_of(judged, lambda image, change=change: blur(1)(change(image)))
        for name, value in (("burnt", burnt), ("smoothed", smooth)):
            figures[style][name]["auc"] = round(auc(scale.score(name, real), scale.score(name, value)), 4)
    return figures


def load(folder: Path, size: int) -> dict[int, Image.Image]:
    """Return the photographs of a folder by number, as squares of a size in px."""
    images = {}
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))):
        image = open_image(path).convert("RGB")
        if min(image.size) >= size:
            images[number] = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512], help="in px")
    parser.add_argument("--tuning", action="store_true", help="use only the even-numbered photographs")
    parser.add_argument("--append", type=Path, help="append the figures to this file of result lines")
    parser.add_argument("--note", default="", help="stands in the result line")
    options = parser.parse_args()
    for size in options.sizes:
        images = load(options.photos, size)
        step = 4 if options.tuning else 2
        fitted = [image for number, image in images.items() if number % step == 0]
        judged = [image for number, image in images.items() if number % step == step // 2]
        figures = check(fitted, judged)
        print(f"{size} px, fitted on {len(fitted)}, judged {len(judged)}")
        for name, values in figures.items():
            print(f"  {name}: {values}")
        config = {
            "photographs": options.photos.resolve().name,
            "size_px": size,
            "fitted": len(fitted),
            "judged": len(judged),
            "half": "even only" if options.tuning else "odd judged",
            "measures": list(MEASURES),
            "version": VERSION,
        }
        if options.append:
            append(options.append, make_record("burn_check", config, figures, torch.device("cpu"), options.note))


if __name__ == "__main__":
    main()
