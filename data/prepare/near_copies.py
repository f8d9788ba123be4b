"""Find near-copies among photos: one picture resized, re-saved, slightly cropped, brightened, made grey or mirrored.

If one copy is held out and another is trained on, the held-out loss is of pictures trained on. A photo's fingerprint,
stored in the manifest, holds the low frequencies of its grey values. Photos with similar fingerprints are candidates; a
pair counts if the two pictures, aligned with each other, are equal up to brightness and contrast.
Bursts, rotated copies, and copies with a frame or more than a tenth cropped off are different pictures here.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from safelight.data.photo import FINGERPRINT_BYTES

# pictures are compared as squares of this many px a side
SIDE = 32
# the fingerprint is the discrete cosine transform's coefficients of the 6 lowest frequencies along each axis
NUM_FREQUENCIES = 6
# below this standard deviation of grey levels (0 to 255) a picture shows nothing to compare
MIN_DETAIL = 2.0
# of fingerprints; among 67,000 pairs of unrelated photographs three reach it
MIN_COSINE = 0.85
# of aligned pixels, and the factor between their contrasts
MIN_CORRELATION, MIN_CONTRAST, MAX_CONTRAST = 0.99, 0.75, 1.35
# how far alignment may stretch and shift a picture, as fractions of its side
MAX_STRETCH, MAX_SHIFT = 0.15, 0.05
NUM_ALIGNMENT_STEPS = 6
# two pictures' ratios of width to height may differ by this factor: what cropping a tenth off one axis changes
MAX_ASPECT_FACTOR = 1.18
# a picture whose channels differ by less than this (mean over its pixels) has no colour
MIN_COLOUR = 2.0
# blocks that are compared at once: 4 MiB of cosines, 6 MiB of an alignment's derivatives. More cosines are not faster
ROWS, COLUMNS, PAIRS = 1024, 1024, 256
# pairs of which those to look at next are chosen
PENDING = 2**18

_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_PX = np.arange(SIDE, dtype=np.float32)
_FROM_CENTRE = (_PX - (SIDE - 1) / 2) / SIDE
_COSINES = np.cos(np.pi / SIDE * np.outer(np.arange(NUM_FREQUENCIES), _PX + 0.5))
# higher frequencies are weaker, but tell pictures apart
_WEIGHTS = np.hypot(*np.mgrid[:NUM_FREQUENCIES, :NUM_FREQUENCIES])
# mirroring a picture changes the sign of its odd horizontal frequencies
_MIRROR = np.tile((-1.0) ** np.arange(NUM_FREQUENCIES), NUM_FREQUENCIES).astype(np.float32)[1:]
_BLUR = np.exp(-0.5 * (_PX[:, None] - _PX) ** 2)
_BLUR = (_BLUR / _BLUR.sum(1, keepdims=True)).astype(np.float32)


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return an RGB image as (SIDE, SIDE, 3) float32 in 0 to 255, slightly blurred: alignment needs smooth pixels."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.einsum("yi,ijc,xj->yxc", _BLUR, np.asarray(small, np.float32), _BLUR, optimize=True)


def fingerprint(image: Image.Image) -> str:
    """Return the fingerprint of an RGB image: signed bytes in hex, all 0 if the picture has no detail."""
    grey = thumbnail(image) @ _GREY
    if grey.std() < MIN_DETAIL:
        return bytes(FINGERPRINT_BYTES).hex()
    # all but the first, which is the mean
    values = (_COSINES @ grey @ _COSINES.T * _WEIGHTS).ravel()[1:]
    return np.rint(values * (127 / np.abs(values).max())).astype(np.int8).tobytes().hex()


def _vectors(fingerprints: Sequence[str]) -> np.ndarray:
    """Return fingerprints as (n, FINGERPRINT_BYTES) float32 of length 1; 0 without detail or fingerprint."""
    content = b"".join(bytes.fromhex(text).ljust(FINGERPRINT_BYTES, b"\0") for text in fingerprints)
    values = np.frombuffer(content, np.int8).reshape(-1, FINGERPRINT_BYTES).astype(np.float32)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)
    return values


def _candidates(
    vectors: np.ndarray, log_aspects: np.ndarray, is_new: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield (i, j, mirrored): arrays of pairs with similar fingerprints, each pair once, at least one of them new."""
    new = np.flatnonzero(is_new)
    for top in range(0, len(new), ROWS):
        rows = new[top : top + ROWS]
        for left in range(0, len(vectors), COLUMNS):
            columns = np.arange(left, min(left + COLUMNS, len(vectors)))
            # of two new photos the later one is the row
            columns = columns[~is_new[columns] | (columns < rows[-1])]
            if not len(columns):
                continue
            for mirrored in (False, True):
                block = vectors[rows] * _MIRROR if mirrored else vectors[rows]
                # of a flat index: with two, numpy takes as long as for the cosines
                found = np.flatnonzero(block @ vectors[columns].T > MIN_COSINE)
                i, j = rows[found // len(columns)], columns[found % len(columns)]
                keep = (~is_new[j] | (j < i)) & (
                    np.abs(log_aspects[i] - log_aspects[j]) < np.log(np.float32(MAX_ASPECT_FACTOR))
                )
                yield i[keep], j[keep], mirrored


def _sampling(stretch: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ((n, SIDE, SIDE) linear interpolation along an axis, (n, SIDE) whether the sample lies in the picture)."""
    at = ((_FROM_CENTRE * stretch[:, None] + shift[:, None] + 0.5) * SIDE - 0.5).astype(np.float32)
    is_inside = (at >= -0.5) & (at <= SIDE - 0.5)
    return np.maximum(1 - np.abs(np.clip(at, 0, SIDE - 1)[..., None] - _PX), 0), is_inside


def same_picture(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (n,) bool: whether thumbnails a[i] and b[i], both (n, SIDE, SIDE, 3), show the same picture.

    Each a[i] is stretched and shifted along both axes to fit b[i], by Gauss-Newton steps that also fit brightness and
    contrast. They are the same if what is left differs little, and no large stretch, shift or contrast was needed.
    """
    num = len(a)
    has_colour = np.minimum(*((x.max(-1) - x.min(-1)).mean((1, 2)) for x in (a, b))) >= MIN_COLOUR
    grey_a, grey_b = a @ _GREY, b @ _GREY
    # rows: vertical, horizontal
    stretch, shift = np.ones((2, num)), np.zeros((2, num))
    for _ in range(NUM_ALIGNMENT_STEPS):
        (vertical, in_y), (horizontal, in_x) = map(_sampling, stretch, shift)
        warped = vertical @ grey_a @ horizontal.transpose(0, 2, 1)
        slope_y, slope_x = (SIDE * slope for slope in np.gradient(warped, axis=(1, 2)))
        by = _FROM_CENTRE[:, None]
        columns = (slope_y * by, slope_x * by.T, slope_y, slope_x, -grey_b, -np.ones_like(warped))
        weights = (in_y[:, :, None] & in_x[:, None]).reshape(num, 1, -1)
        jacobian = np.stack(columns, 1).reshape(num, len(columns), -1) * weights
        normal = (jacobian @ jacobian.transpose(0, 2, 1)).astype(np.float64)
        # keeps it solvable where a picture has no detail along an axis
        normal += np.eye(len(columns)) * (1e-6 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-9)
        target = -(jacobian @ warped.reshape(num, -1, 1)).astype(np.float64)
        step = np.linalg.solve(normal, target)[..., 0].T
        stretch = np.clip(stretch + step[:2], 1 - 2 * MAX_STRETCH, 1 + 2 * MAX_STRETCH)
        shift = np.clip(shift + step[2:4], -2 * MAX_SHIFT, 2 * MAX_SHIFT)
    (vertical, in_y), (horizontal, in_x) = map(_sampling, stretch, shift)
    warped = np.einsum("nyi,nijc,nxj->nyxc", vertical, a, horizontal, optimize=True)
    weights = np.repeat((in_y[:, :, None] & in_x[:, None])[..., None], 3, axis=-1)
    # without colour in one of the two, their grey values are compared
    warped, target = (np.where(has_colour[:, None, None, None], x, (x @ _GREY)[..., None]) for x in (warped, b))

    def centred(x: np.ndarray) -> np.ndarray:
        x, w = x.reshape(num, -1), weights.reshape(num, -1)
        return (x - (x * w).sum(1, keepdims=True) / w.sum(1, keepdims=True)) * w

    warped, target = centred(warped), centred(target)
    covariance, energy = (warped * target).sum(1), (target**2).sum(1) + 1e-9
    correlation = covariance / np.sqrt(energy * (warped**2).sum(1) + 1e-9)
    contrast = covariance / energy
    return (
        (correlation > MIN_CORRELATION)
        & (contrast > MIN_CONTRAST)
        & (contrast < MAX_CONTRAST)
        & (np.abs(stretch - 1) < MAX_STRETCH).all(0)
        & (np.abs(shift) < MAX_SHIFT).all(0)
    )


class _Thumbnails:
    """Thumbnails by photo, each loaded once and kept in a file: those of a million photos are 12 GB."""

    def __init__(self, load: Callable[[int], np.ndarray | None], file: BinaryIO):
        self._load, self._file = load, file
        # of each photo, the place in the file; None if it cannot be read
        self._places: dict[int, int | None] = {}

    def has(self, index: int) -> bool:
        """Return whether a photo can be read."""
        if index not in self._places:
            loaded = self._load(index)
            self._places[index] = None if loaded is None else self._file.seek(0, os.SEEK_END)
            if loaded is not None:
                self._file.write(loaded.astype(np.float32).tobytes())
        return self._places[index] is not None

    def stacked(self, indices: Sequence[int]) -> np.ndarray:
        """Return the thumbnails of photos that can be read, (n, SIDE, SIDE, 3) float32."""
        thumbnails = np.empty((len(indices), SIDE, SIDE, 3), np.float32)
        for thumbnail, index in zip(thumbnails, indices, strict=True):
            self._file.seek(self._places[index])
            self._file.readinto(thumbnail.data)
        return thumbnails


def find_near_copies(
    fingerprints: Sequence[str],
    aspects: Sequence[float],
    is_new: Sequence[bool],
    load: Callable[[int], np.ndarray | None],
    folder: Path,
) -> list[tuple[int, int]]:
    """Return pairs (i, j) of near-copies among n photos, of which at least one is new: enough to join all near-copies.

    aspects: width / height. load(i): returns photo i's thumbnail, None if it cannot be read; called for candidates
    alone, once each. folder: where their thumbnails lie meanwhile, in a file without a name. If all photos are new,
    n^2 / 2 pairs of fingerprints are compared, and as many with one picture mirrored: for 100,000 photos about a minute
    of one core.
    """
    pairs: list[tuple[int, int]] = []
    # of each photo, the number of the photos that are joined with it so far
    group = np.arange(len(fingerprints))
    log_aspects = np.log(np.asarray(aspects, np.float32))
    candidates = _candidates(_vectors(fingerprints), log_aspects, np.asarray(is_new, bool))
    with tempfile.TemporaryFile(dir=folder) as file:
        thumbnails = _Thumbnails(load, file)
        for rows, columns, mirrored in candidates:
            for start in range(0, len(rows), PENDING):
                i, j = rows[start : start + PENDING], columns[start : start + PENDING]
                # n photos of one scene have n^2 / 2 pairs, of which n - 1 join them all
                while (is_open := group[i] != group[j]).any():
                    i, j = i[is_open], j[is_open]
                    is_next = _some_of_each(i)
                    block = list(zip(i[is_next].tolist(), j[is_next].tolist(), strict=True))
                    i, j = i[~is_next], j[~is_next]
                    block = [pair for pair in block if all(map(thumbnails.has, pair))]
                    if not block:
                        continue
                    a, b = map(thumbnails.stacked, zip(*block, strict=True))
                    is_same = same_picture(a[:, :, ::-1] if mirrored else a, b)
                    for pair in itertools.compress(block, is_same):
                        pairs.append(pair)
                        group[group == group[pair[0]]] = group[pair[1]]
    return pairs


def _some_of_each(rows: np.ndarray) -> np.ndarray:
    """Return (n,) bool: which of n pairs to look at next, at most PAIRS, of as many rows as possible. rows: sorted."""
    _, first, num_of_row = np.unique(rows, return_index=True, return_counts=True)
    place = np.arange(len(rows)) - np.repeat(first, num_of_row)
    is_next = place < max(1, PAIRS // len(first))
    return is_next & (np.cumsum(is_next) <= PAIRS)


def merge_groups(groups: Sequence[str], names: Sequence[str], pairs: Iterable[tuple[int, int]]) -> list[str]:
    """Return each photo's group after joining those of every pair.

    groups: the group of each photo so far, "" for none. names: what a new group is called after: its first photo's. A
    joined group keeps the name of its first photo's group, so that the validation split changes as little as possible.
    """
    first = list(range(len(groups)))

    def find(index: int) -> int:
        while first[index] != index:
            first[index] = first[first[index]]
            index = first[index]
        return index

    first_of_group: dict[str, int] = {}
    together = [(first_of_group.setdefault(group, i), i) for i, group in enumerate(groups) if group]
    for i, j in (*together, *pairs):
        low, high = sorted((find(i), find(j)))
        first[high] = low
    members: dict[int, list[int]] = {}
    for index in range(len(groups)):
        # the first of its group, alone in it or not, is found to be itself
        if (start := find(index)) != index:
            members.setdefault(start, [start]).append(index)
    merged = list(groups)
    for start, indices in members.items():
        name = next((groups[index] for index in indices if groups[index]), names[start])
        for index in indices:
            merged[index] = name
    return merged
