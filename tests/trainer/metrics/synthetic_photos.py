"""Pictures with the statistics of photographs: shapes that cover one another, in colour, with texture and some blur."""

import functools

import numpy as np
from scipy.ndimage import gaussian_filter

SIDE_PX = 64


@functools.cache
def synthetic_photos(num: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return num pictures of (64, 64, 3) uint8."""
    return tuple(_photo(np.random.Generator(np.random.Philox(key=[seed, number]))) for number in range(num))


def _photo(random: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    contrast = random.uniform(0.5, 0.9)
    pixels = np.full((SIDE_PX, SIDE_PX, 3), random.uniform(0.3, 0.7))
    for _ in range(40):
        radius = 3 * random.pareto(1.5) + 2
        inside = np.hypot(y - random.uniform(0, SIDE_PX), x - random.uniform(0, SIDE_PX)) < radius
        colour = 0.5 + contrast * (random.uniform(-0.5, 0.5) + 0.25 * random.uniform(-1, 1, 3))
        pixels[inside] = colour
    pixels += 0.02 * random.normal(size=(SIDE_PX, SIDE_PX, 1))
    pixels = gaussian_filter(pixels, (random.uniform(0.3, 0.5),) * 2 + (0,))
    return (255 * np.clip(pixels, 0, 1)).round().astype(np.uint8)


def harder(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Return a picture with this many times the contrast and colour."""
    return np.clip((pixels - 127.5) * factor + 127.5, 0, 255).round().astype(np.uint8)


def blurred(pixels: np.ndarray, radius_px: float) -> np.ndarray:
    return gaussian_filter(pixels.astype(float), (radius_px, radius_px, 0)).round().astype(np.uint8)


def sharpened(pixels: np.ndarray, amount: float) -> np.ndarray:
    values = pixels.astype(float)
    return np.clip(values + amount * (values - gaussian_filter(values, (2, 2, 0))), 0, 255).round().astype(np.uint8)
