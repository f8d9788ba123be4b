"""Read a generated scene by fixed rules: which colour, which shape, and does it have the tones of a faded print?

No neural network judges, so the demo's score does not depend on one. The saturated pixels are the shape, since every
background is neutral; their hue gives the colour. The shape is classified by the contour's distance from its centroid
as a function of angle: the Fourier magnitudes of this function do not depend on size or rotation, and the nearest of
the drawn prototypes (sharp and soft) wins. The picture has the look if its background is nearer to the tones that
greys have on a faded print than to grey; the fading is then undone before colour and shape are read, so that one rule
reads both looks.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage

from safelight.trainer.tiny.scenes import COLOURS, SHAPES, SIZES, Scene, draw, fade, unfade

ZOOM = 3
# max - min over RGB, of 255: backgrounds and outlines stay below
MIN_CHROMA = 60
# fraction of the image; smaller regions are not read as a shape
MIN_AREA = 0.02
NUM_ANGLES = 96
NUM_HARMONICS = 8
# fraction of the image; with less background the look cannot be judged
MIN_BACKGROUND = 0.2
# Euclidean distance in RGB, of 255
MAX_TONE_DISTANCE = 20


@dataclass(frozen=True)
class Reading:
    """What was read from an image. colour and shape are None if it has no saturated region."""

    colour: str | None
    shape: str | None
    has_look: bool


def _hue(rgb: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*(np.asarray(rgb, float) / 255))[0]


def _nearest_colour(rgb: np.ndarray) -> str:
    hue = _hue(rgb)
    distances = {name: abs((hue - _hue(value) + 0.5) % 1 - 0.5) for name, value in COLOURS.items()}
    return min(distances, key=distances.get)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    labels, num = ndimage.label(mask)
    if num == 0:
        return mask
    sizes = np.bincount(labels.ravel())[1:]
    return labels == 1 + int(sizes.argmax())


def _descriptor(mask: np.ndarray) -> np.ndarray:
    """Return the descriptor of a shape, (9,).

    Elements 0 to 7: harmonics 1 to 8 of the outer contour's radius relative to its mean. Element 8: half the fraction
    of the filled shape that is a hole.
    """
    filled = ndimage.binary_fill_holes(mask)
    hole = 1 - mask.sum() / filled.sum()
    cy, cx = ndimage.center_of_mass(filled)
    reach = np.arange(0, np.hypot(*mask.shape), 0.5)
    angles = 2 * np.pi * np.arange(NUM_ANGLES) / NUM_ANGLES
    ys, xs = cy + np.outer(np.sin(angles), reach), cx + np.outer(np.cos(angles), reach)
    inside = ndimage.map_coordinates(filled.astype(np.float32), [ys, xs], order=1, mode="constant") > 0.5
    radius = (inside * reach).max(axis=1)
    harmonics = np.abs(np.fft.rfft(radius / max(radius.mean(), 1e-6)))[1 : NUM_HARMONICS + 1] / NUM_ANGLES
    return np.append(harmonics, 0.5 * hole)


@lru_cache(maxsize=1)
def _prototypes() -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names, (N,), and descriptors, (N, 9), of drawn shapes in all sizes, sharp and soft."""
    names, descriptors = [], []
    for shape, size, is_soft in product(SHAPES, SIZES, (False, True)):
        image = draw(Scene("red", shape, size, "in the centre", "plain", "grey", "plain"))
        if is_soft:
            # generated images are about as sharp as an image enlarged twofold
            half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
            image = half.resize(image.size, Image.Resampling.BICUBIC)
        names.append(shape)
        descriptors.append(_descriptor(_shape_mask(_enlarged(image))))
    return tuple(names), np.stack(descriptors)


def _enlarged(image: Image.Image) -> np.ndarray:
    """Return the image enlarged ZOOM times, (H, W, 3) float32."""
    size = (image.width * ZOOM, image.height * ZOOM)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)


def _chroma(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(axis=2) - pixels.min(axis=2)


def _shape_mask(pixels: np.ndarray) -> np.ndarray:
    """Return the (H, W) mask of the largest saturated region."""
    chroma = _chroma(pixels)
    mask = _largest_component(ndimage.binary_opening(chroma > MIN_CHROMA))
    if mask.any():
        # a soft contour's edge is where the chroma has dropped to half, so refine the fixed threshold
        edge = max(MIN_CHROMA, 0.5 * float(np.median(chroma[mask])))
        mask = _largest_component(ndimage.binary_opening(chroma > edge))
    return mask


def read(image: Image.Image) -> Reading:
    """Return what an image of a scene shows. image: RGB, any size."""
    pixels, has_look = _unfaded(image)
    shape, mask = _find_shape(pixels)
    if shape is None:
        return Reading(None, None, has_look)
    return Reading(_nearest_colour(np.median(pixels[mask], axis=0)), shape, has_look)


def find_shape(image: Image.Image) -> tuple[str | None, np.ndarray]:
    """Return the name of an image's shape and its mask, (H, W) bool of the enlarged image; None if there is none."""
    return _find_shape(_unfaded(image)[0])


def _unfaded(image: Image.Image) -> tuple[np.ndarray, bool]:
    """Return the enlarged image, (H, W, 3), with its fading undone, and whether it had the look."""
    pixels = _enlarged(image)
    has_look = _has_look(pixels)
    return unfade(pixels) if has_look else pixels, has_look


def _find_shape(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    mask = _shape_mask(pixels)
    if mask.mean() < MIN_AREA:
        return None, mask
    names, prototypes = _prototypes()
    return names[int(np.linalg.norm(prototypes - _descriptor(mask), axis=1).argmin())], mask


def _has_look(pixels: np.ndarray) -> bool:
    """Return whether the median of the unsaturated pixels is a faded grey rather than a grey."""
    background = pixels[_chroma(pixels) <= MIN_CHROMA]
    if len(background) < MIN_BACKGROUND * pixels[..., 0].size:
        return False
    tone = np.median(background, axis=0)
    greys = np.repeat(np.arange(256, dtype=np.float32)[:, None], 3, axis=1)
    to_grey, to_faded = (np.linalg.norm(tones - tone, axis=1).min() for tones in (greys, fade(greys)))
    return bool(to_faded < min(to_grey, MAX_TONE_DISTANCE))
