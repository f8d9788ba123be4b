"""How sharp and how well exposed a photograph is, measured on its pixels and compared within a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Literal

import numpy as np
from PIL import Image, ImageChops

from safelight.data.photo import Photo, Quality

# the longest side that photographs are measured at: blur shows or hides at the size of training
SIDE_PX = 512
# channels up to here, or from here on, hold no detail any more
BLACK, WHITE = 2, 253
# a photograph has little detail if its sharpness is less than this fraction of the dataset's median
LITTLE_DETAIL = 1 / 20
# among fewer there is no telling what is usual
MIN_COMPARED = 10
# and is badly exposed if more than this fraction of it is black or white
MUCH_CLIPPED = 0.5


def measure(image: Image.Image) -> Quality:
    """Return the quality of an RGB image.

    Sharpness is the variance of the Laplacian of luma (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield
    microscopy", doi:10.1109/ICPR.2000.903548), at SIDE_PX along the longest side; smaller images are not enlarged.
    """
    scale = SIDE_PX / max(image.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)
    luma = np.asarray(image.convert("L"), np.float32)
    red, green, blue = image.split()
    brightest = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue).histogram()
    padded = np.pad(luma, 1, "edge")
    laplacian = padded[1:-1, :-2] + padded[1:-1, 2:] + padded[:-2, 1:-1] + padded[2:, 1:-1] - 4 * luma
    # rounded, so that a manifest stays readable; the last digits say nothing
    return Quality(
        round(float(laplacian.var()), 1),
        round(float(luma.mean()) / 255, 3),
        round(sum(brightest[: BLACK + 1]) / luma.size, 3),
        round(sum(darkest[WHITE:]) / luma.size, 3),
    )


def doubtful(photos: Iterable[Photo]) -> list[tuple[Photo, Literal["detail", "exposure"], str]]:
    """Return (photo, kind, what is unusual about it) of the photos to look at, the least sharp first."""
    measured = [(photo, photo.quality) for photo in photos if photo.quality is not None]
    is_enough = len(measured) >= MIN_COMPARED
    usual = median(quality.sharpness for _, quality in measured) if is_enough else 0.0
    found: list[tuple[Photo, Literal["detail", "exposure"], str]] = []
    for photo, quality in sorted(measured, key=lambda pair: pair[1].sharpness):
        if quality.sharpness < LITTLE_DETAIL * usual:
            what = f"little fine detail (sharpness {quality.sharpness:g}, the median is {usual:g}): blurred, or plain"
            found.append((photo, "detail", what))
        for part, name in ((quality.dark, "black"), (quality.light, "white")):
            if part > MUCH_CLIPPED:
                found.append((photo, "exposure", f"{part:.0%} of it is {name}"))
    return found
