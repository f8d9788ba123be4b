"""Whether a picture copies a training photograph: its similarity to the nearest one, against what is usual.

Similarity is the cosine of features from which the mean of all photographs was subtracted, so that 0 is what two
photographs have in common by being of this collection. What counts as too similar depends on the features and on how
alike the photographs are, so the limit comes from photographs that nothing can have copied: the nearest training
photograph of each held-out one, and of each training photograph among the others, near-copies left out.

The limit is the 99.9th percentile of these similarities where there are 999 or more of them. Fewer cannot say where it
lies: a fitted tail would be a guess, and an interpolated percentile lies below the largest, which then is an alarm in
itself. So the limit is then the largest, which a new photograph exceeds with probability 1 / (n + 1): `Limit.chance`.
`exceedance_p` turns flagged pictures into a probability that allows for it exactly.

If photographs are mirrored in training, a mirrored copy is a copy: each similarity is the larger of those to a
photograph and to its mirror image, also in the reference.

Somepalli et al. 2023 (CVPR, arXiv:2212.03860) use the same scheme with a fixed limit for one extractor. No similarity
separates copies reliably: show the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safelight.trainer.metrics.exceedance import Limit, upper_limit

# the probability that a picture which copies nothing is flagged, where there are photographs enough
CHANCE = 0.001


@dataclass(frozen=True)
class Nearest:
    """The training photograph most like each picture: its place, the cosine, whether it is its mirror image. (N,)."""

    place: np.ndarray
    similarity: np.ndarray
    is_mirrored: np.ndarray


@dataclass(frozen=True)
class TrainingPhotographs:
    """Training photographs in feature space. directions: (orientations, T, D), of length 1: as they are, mirrored.

    centre: (D,), subtracted from features. limit: of the similarity to the nearest one. reference: the similarities
    that it was taken from.
    """

    directions: np.ndarray
    centre: np.ndarray
    limit: Limit
    reference: np.ndarray

    def similarities(self, features: np.ndarray) -> np.ndarray:
        """Return the cosines of pictures to each training photograph: (N, orientations, T). features: (N, D)."""
        return np.einsum("nd,otd->not", _directions(features, self.centre), self.directions)

    def nearest(self, features: np.ndarray) -> Nearest:
        """Return the training photograph most like each picture. features: (N, D)."""
        similarities = self.similarities(features)
        num, _, num_photos = similarities.shape
        best = similarities.reshape(num, -1).argmax(1)
        return Nearest(best % num_photos, similarities.reshape(num, -1)[np.arange(num), best], best >= num_photos)


def fit_photographs(
    training: np.ndarray, held_out: np.ndarray, mirrored: np.ndarray | None = None, groups: Sequence[str] = ()
) -> TrainingPhotographs:
    """Return the training photographs and their limit.

    training: (T, D). held_out: (H, D), H may be 0. mirrored: features of the mirrored training photographs, (T, D),
    where training mirrors. groups: of each training photograph, equal for near-copies, '' for a photograph without.
    Raises ValueError if there are not two photographs to compare.
    """
    if len(training) == 0 or len(training) + len(held_out) < 2:
        raise ValueError("a limit takes a training photograph and one more")
    centre = np.concatenate([training, held_out]).astype(np.float64).mean(0)
    orientations = [training] if mirrored is None else [training, mirrored]
    directions = np.stack([_directions(features, centre) for features in orientations])
    names = np.array([group or f"alone {place}" for place, group in enumerate(groups or [""] * len(training))])
    among = np.einsum("nd,otd->not", directions[0], directions)
    among[np.broadcast_to((names[:, None] == names)[:, None], among.shape)] = -np.inf
    to_held_out = np.einsum("nd,otd->not", _directions(held_out, centre), directions)
    reference = np.concatenate([to_held_out.max((1, 2)), among.max((1, 2))])
    # a photograph whose near-copies are all that there is has no other
    reference = reference[np.isfinite(reference)]
    if not len(reference):
        raise ValueError("all training photographs are near-copies of each other, and none is held out")
    return TrainingPhotographs(directions, centre, upper_limit(reference, CHANCE), reference)


def _directions(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    offsets = features.astype(np.float64) - centre
    return offsets / np.maximum(np.linalg.norm(offsets, axis=-1, keepdims=True), 1e-12)
