"""Many keyed draws in one call. One at a time they take half a minute for fifty thousand photos of four variants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safelight.kernels.philox import Key, philox_numpy


def draw_words(keys: Sequence[Key]) -> np.ndarray:
    """Return (len(keys), 4) random words as uint64; row i equals philox.words(keys[i], 4).

    Raises ValueError unless all keys have one seed.
    """
    if not keys:
        return np.zeros((0, 4), np.uint64)
    if any(key.seed != keys[0].seed for key in keys):
        raise ValueError(f"keys of one seed can be drawn together, not of {len({key.seed for key in keys})}")
    k0, k1 = keys[0].words()[:2]
    c1, c2, c3 = np.array([key.words()[2:] for key in keys], dtype=np.uint64).T
    return np.stack(philox_numpy((0, c1, c2, c3), (k0, k1)), axis=-1).astype(np.uint64)


def to_uniforms(words: np.ndarray) -> np.ndarray:
    """Return the words as uniform float64 in (0, 1), as philox.uniforms does."""
    return (words.astype(np.float64) + 0.5) / 2.0**32


def to_integers(words: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """Return for each word an int64 in 0 .. bound-1, as philox.integers does. bounds: one a word."""
    return ((words * np.array(bounds, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)
