"""Six figures of a picture that show whether it is burnt or smoothed out.

clipped      log(share of channel values within 1 of 0 or 255, plus 0.1 %)
colour       log(chroma that 5 % of the pixels exceed, plus 5 %); chroma: largest minus smallest channel
contrast     log of local contrast: root mean square of the standard deviations in windows of 7 x 7 px
halo         how far a step between two plateaus overshoots them, over its height; a quarter of the steps exceed it
detail       log of the mean absolute Laplacian over the picture's standard deviation
slope        of log power against log frequency, from 1/18 cycles per px to 1/2, radially averaged

The last three do not change when contrast does, except by clipping: a pale picture is not a smooth one. Pictures are
compared at one size in px only: shrinking sharpens, enlarging smooths.

The power spectrum of photographs falls about as 1/f^2 (Field 1987, "Relations between the statistics of natural images
and the response properties of cortical cells"), blur makes it fall faster, sharpening more slowly.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.ndimage import laplace, uniform_filter

MEASURES = ("clipped", "colour", "contrast", "halo", "detail", "slope")
# changed whenever the figures do, so that stored ones are not mixed with new ones
VERSION = 1
MIN_SIDE_PX = 32

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_WINDOW_PX = 7
# below these, clipping and colour cannot be seen, and their logarithms would mean nothing
_MIN_CLIPPED, _MIN_CHROMA = 1e-3, 0.05
# a step is a change of luma between neighbours of at least this share of the picture's standard deviation
_MIN_STEP = 0.25
# a picture with fewer steps has no typical one
_MIN_STEPS = 20
_FREQUENCIES = np.geomspace(1 / 18, 1 / 2, 9)
# luma is rounded to 8 bits, so nothing smaller is seen
_ROUNDING = 1 / 255


def measure(pixels: np.ndarray) -> np.ndarray:
    """Return the figures of a picture in the order of MEASURES: (6,) float64, NaN for what it does not show.

    pixels: (height, width, 3) uint8, RGB, each side at least 32 px. Raises ValueError for other arrays.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < MIN_SIDE_PX:
        raise ValueError(f"expected (height, width, 3) uint8 of at least {MIN_SIDE_PX} px, got {pixels.shape}")
    clipped = np.count_nonzero((pixels <= 1) | (pixels >= 254)) / pixels.size
    chroma = (pixels.max(-1) - pixels.min(-1)).astype(np.float32) / 255
    luma = (pixels @ _LUMA) / 255
    deviation = float(luma.std())
    return np.array(
        (
            np.log(clipped + _MIN_CLIPPED),
            np.log(np.quantile(chroma, 0.95) + _MIN_CHROMA),
            np.log(_local_contrast(luma) + _ROUNDING),
            _halo(luma, deviation),
            np.log(np.abs(laplace(luma)).mean() / deviation) if deviation > _ROUNDING else np.nan,
            _slope(luma) if deviation > _ROUNDING else np.nan,
        )
    )


def _local_contrast(luma: np.ndarray) -> float:
    mean = uniform_filter(luma, _WINDOW_PX)
    variance = uniform_filter(luma * luma, _WINDOW_PX) - mean * mean
    return float(np.sqrt(np.maximum(variance, 0).mean()))


def _halo(luma: np.ndarray, deviation: float) -> float:
    """Return the overshoot that a quarter of the steps exceed, NaN for a picture with too few steps."""
    overshoots = np.concatenate([_overshoots(lines, deviation) for lines in (luma, luma.T)])
    return float(np.quantile(overshoots, 0.75)) if len(overshoots) >= _MIN_STEPS else np.nan


def _overshoots(lines: np.ndarray, deviation: float) -> np.ndarray:
    """Return the overshoot of each step along the rows, in units of the step's height: (number of steps,).

    The two pixels on each side of a step against the plateau there, the mean of the third to fifth pixel; negative for
    a soft edge. A line is no step: its plateaus are alike.
    """
    change = np.abs(np.diff(lines, axis=1))
    inner = change[:, 4:-4]
    is_step = (inner >= change[:, 3:-5]) & (inner >= change[:, 5:-3])
    is_step &= inner >= max(_MIN_STEP * deviation, 2 * _ROUNDING)
    row, column = np.nonzero(is_step)
    column = column + 4
    # turned so that the step, between at(0) and at(1), rises
    sign = np.sign(lines[row, column + 1] - lines[row, column])

    def at(place: int) -> np.ndarray:
        return sign * lines[row, column + place]

    above, below = np.maximum(at(1), at(2)), np.minimum(at(0), at(-1))
    plateau_above, plateau_below = (at(3) + at(4) + at(5)) / 3, (at(-2) + at(-3) + at(-4)) / 3
    height = plateau_above - plateau_below
    is_step = height >= (above - below) / 2
    return ((above - plateau_above + plateau_below - below)[is_step]) / height[is_step]


@functools.lru_cache(maxsize=8)
def _rings(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (Hann window, ring of each frequency, number of frequencies in each ring)."""
    window = np.outer(np.hanning(height), np.hanning(width)).astype(np.float32)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    # 0 and the last are below the lowest and above the highest
    ring = np.digitize(frequency, _FREQUENCIES).ravel()
    return window, ring, np.bincount(ring, minlength=len(_FREQUENCIES) + 1)


def _slope(luma: np.ndarray) -> float:
    window, ring, counts = _rings(*luma.shape)
    mean = (luma * window).sum() / window.sum()
    power = np.abs(np.fft.rfft2((luma - mean) * window)) ** 2
    sums = np.bincount(ring, weights=power.ravel(), minlength=len(counts))
    inner = slice(1, len(_FREQUENCIES))
    # the power of rounding to 8 bits keeps the logarithm of an empty ring finite
    rounding = (window**2).sum() * _ROUNDING**2 / 12
    x = np.log(_FREQUENCIES[:-1] * _FREQUENCIES[1:]) / 2
    return float(np.polyfit(x, np.log(sums[inner] / counts[inner] + rounding), 1)[0])
