"""Reads a generated scene by rule: which colour, which shape, and is it framed like an instant-film print?

No network judges here, so the demo's score cannot be flattered by one. Colour is hue: the saturated pixels are the
shape, since every background is neutral. Shape is the contour's distance from its centroid over the angle, whose
Fourier magnitudes do not depend on size or rotation; the nearest of the drawn prototypes wins, crisp and soft ones,
with and without the look. The look, a print's white frame, is the share of white along the image's border.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage

from safelight.trainer.tiny.scenes import COLOURS, SHAPES, SIZES, Scene, draw

ZOOM = 3
MIN_CHROMA = 60  # of 255, max - min over RGB: backgrounds and outlines stay below
MIN_AREA = 0.02  # of the image: anything smaller is not read as a shape
NUM_ANGLES = 96
NUM_HARMONICS = 8
# above the lightest background, silver, and below the frame
WHITE_LUMA = 205
WHITE_CHROMA = 48
LOOK_SHARE = 0.5
# of the shorter side: the border that must be white, inside the frame's width, and where the picture's middle begins
BORDER, MIDDLE = 0.05, 0.25


@dataclass(frozen=True)
class Reading:
    """colour and shape are None where nothing saturated was found; white_share in 0 .. 1."""

    colour: str | None
    shape: str | None
    white_share: float

    @property
    def has_look(self) -> bool:
        return self.white_share >= LOOK_SHARE


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
    """Return harmonics 1 .. 8 of the outer contour's radius over its mean, and the hole's share: shape (9,)."""
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
    """Return shape names and their descriptors, (N, 9), of drawn scenes: sizes x sharpness x look."""
    names, descriptors = [], []
    for shape, size, is_soft, in_look in product(SHAPES, SIZES, (False, True), (False, True)):
        image = draw(Scene("red", shape, size, "in the centre", "plain", "grey", "plain", in_look=in_look))
        if is_soft:
            # generated images are as sharp as an image enlarged twice
            half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
            image = half.resize(image.size, Image.Resampling.BICUBIC)
        names.append(shape)
        descriptors.append(_descriptor(_shape_mask(np.asarray(image))[0]))
    return tuple(names), np.stack(descriptors)


def _shape_mask(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the (H*3, W*3) mask of the largest saturated region, and the enlarged pixels as float32."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels).resize((width * ZOOM, height * ZOOM), Image.Resampling.BICUBIC)
    large = np.asarray(image, np.float32)
    chroma = large.max(axis=2) - large.min(axis=2)
    mask = _largest_component(ndimage.binary_opening(chroma > MIN_CHROMA))
    if mask.any():
        # the edge of a soft contour is where half of the colour is left, wherever the fixed threshold falls
        edge = max(MIN_CHROMA, 0.5 * float(np.median(chroma[mask])))
        mask = _largest_component(ndimage.binary_opening(chroma > edge))
    return mask, large


def read(image: Image.Image) -> Reading:
    """Return what a scene shows. image: RGB, any size."""
    mask, pixels = _shape_mask(np.asarray(image.convert("RGB")))
    white_share = _white_share(pixels)
    if mask.mean() < MIN_AREA:
        return Reading(None, None, white_share)
    colour = _nearest_colour(np.median(pixels[mask], axis=0))
    names, prototypes = _prototypes()
    shape = names[int(np.linalg.norm(prototypes - _descriptor(mask), axis=1).argmin())]
    return Reading(colour, shape, white_share)


def _white_share(pixels: np.ndarray) -> float:
    """Return how much more of the border than of the middle is white, 0 .. 1: a white picture has no frame."""
    side = min(pixels.shape[:2])
    width, middle = max(1, round(BORDER * side)), round(MIDDLE * side)
    luma = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    is_white = (luma > WHITE_LUMA) & (pixels.max(axis=2) - pixels.min(axis=2) < WHITE_CHROMA)
    is_border = np.ones(is_white.shape, bool)
    is_border[width:-width, width:-width] = False
    return max(0.0, float(is_white[is_border].mean() - is_white[middle:-middle, middle:-middle].mean()))
