"""Many keyed random draws in one call. One at a time, 50,000 photos with four variants each take half a minute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safelight.kernels.philox import MASK_32, Key, Purpose, philox_numpy


def draw_words(keys: Sequence[Key]) -> np.ndarray:
    """Return (len(keys), 4) random words as uint64; row i equals philox.words(keys[i], 4).

    Raises ValueError unless all keys have the same seed.
    """
    if not keys:
        return np.zeros((0, 4), np.uint64)
    if any(key.seed != keys[0].seed for key in keys):
        raise ValueError(f"all keys must have the same seed, but these have {len({key.seed for key in keys})} seeds")
    k0, k1 = keys[0].words()[:2]
    c1, c2, c3 = np.array([key.words()[2:] for key in keys], dtype=np.uint64).T
    return np.stack(philox_numpy((0, c1, c2, c3), (k0, k1)), axis=-1).astype(np.uint64)


def draw_words_at(
    seed: int,
    purpose: Purpose,
    sample_ids: np.ndarray,
    epoch: np.ndarray | int,
    occurrence: np.ndarray | int = 0,
    block: np.ndarray | int = 0,
) -> np.ndarray:
    """Return (..., 4) random words as uint64 of many keys of one seed and purpose: an element block of each.

    sample_ids, epoch, occurrence, block: unsigned integers that broadcast with each other. Raises ValueError, as Key
    does, if one has too many bits.
    """
    columns = [np.asarray(column, dtype=np.uint64) for column in (sample_ids, epoch, occurrence)]
    # of the largest values, to check the bits of all
    largest = Key(seed, purpose, *(int(column.max(initial=0)) for column in columns))
    k0, k1 = largest.words()[:2]
    ids, epochs, occurrences = columns
    c2 = (ids >> np.uint64(32)) << np.uint64(8) | np.uint64(purpose)
    c3 = epochs << np.uint64(16) | occurrences
    return np.stack(philox_numpy((block, ids & np.uint64(MASK_32), c2, c3), (k0, k1)), axis=-1).astype(np.uint64)


def to_uniforms(words: np.ndarray) -> np.ndarray:
    """Return the words as uniform float64 values in (0, 1), equal to those of philox.uniforms."""
    return (words.astype(np.float64) + 0.5) / 2.0**32


def to_integers(words: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """Return an int64 in 0 .. bound-1 for each word, equal to those of philox.integers. bounds: one per word."""
    return ((words * np.array(bounds, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)
