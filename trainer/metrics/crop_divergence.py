"""How far crops of things lie apart between two sets of pictures, class by class, and whether that is more than chance.

Crops of one picture are alike: taken as independent, they make any two halves of the same photographs "different". So
each group of pictures (a prompt with all that was drawn for it, or a photograph) gives one crop of a class, and
permutations move whole groups. Their mean is what chance alone gives. It is subtracted from the divergence; z and p say
how far beyond the permutations it lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from safelight.trainer.metrics.gaussian import gaussian_kl, median_mmd
from safelight.trainer.metrics.resampling import keyed

# crops of a class in each set: fewer than LEAST are not compared, fewer than ENOUGH are shown in grey
LEAST, ENOUGH = 20, 50
MAX_DIMENSIONS = 8
NUM_PERMUTATIONS = 1000
# the class of what is too rare for one of its own
OTHER = "other things"
# lengths below this share of the largest component, or of the features themselves, are rounding
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Crops:
    """Crops of one set of pictures, at most one of a class and group.

    features: (N, D). names: the class of each. groups: what each belongs to, such as its prompt or photograph; sets
    that share a group are paired by it. sizes: of the crops, in any unit. Raises ValueError if a group has two crops of
    a class, or a feature is not finite.
    """

    features: np.ndarray
    names: Sequence[str]
    groups: Sequence[str]
    sizes: Sequence[float]

    def __post_init__(self):
        of_each = set(zip(self.names, self.groups, strict=True))
        if not len(self.features) == len(self.names) == len(self.sizes):
            raise ValueError(f"{len(self.features)} features and {len(self.sizes)} sizes of {len(self.names)} crops")
        if len(of_each) < len(self.names):
            raise ValueError("a group has several crops of a class; choose one with largest_of_each")
        if not np.isfinite(self.features).all():
            raise ValueError("features are not finite")

    def take(self, rows: Sequence[int]) -> Crops:
        """Return some of the crops."""
        return Crops(
            self.features[list(rows)], *([of[row] for row in rows] for of in (self.names, self.groups, self.sizes))
        )

    def of_class(self, name: str) -> Crops:
        """Return the crops of a class."""
        return self.take([row for row, other in enumerate(self.names) if other == name])


@dataclass(frozen=True)
class Beyond:
    """A statistic beyond what permutations give. value: minus their mean. z: value in their standard deviations.

    p: the share of permutations that reach it, where the observed division counts as one of them.
    """

    value: float
    z: float
    p: float


@dataclass(frozen=True)
class Divergence:
    """How far crops of a class lie apart between two sets. name: "all" for all classes, weighted by their crops.

    num_first, num_second: crops. kl: Gaussian KL(first || second) in nats. mmd: squared maximum mean discrepancy.
    is_grey: there are too few crops for the figure to be relied on.
    """

    name: str
    num_first: int
    num_second: int
    kl: Beyond
    mmd: Beyond
    is_grey: bool


class NothingVaries(ValueError):
    """Crops have no principal components: there are none, or their features are all equal."""


def largest_of_each(names: Sequence[str], groups: Sequence[str], sizes: Sequence[float]) -> list[int]:
    """Return the index of the largest crop of each class and group, in order; of equal ones the first."""
    best: dict[tuple[str, str], int] = {}
    for index, of in enumerate(zip(names, groups, strict=True)):
        if of not in best or sizes[index] > sizes[best[of]]:
            best[of] = index
    return sorted(best.values())


def project(sets: Sequence[Crops], max_dimensions: int = MAX_DIMENSIONS) -> list[Crops]:
    """Return the crops with the principal components of all sets together as their features.

    Components are scaled by one number, so that the first has variance 1; its sign is that of its largest loading.
    Raises NothingVaries if there are no crops, or all features are equal.
    """
    features = np.concatenate([np.asarray(crops.features, dtype=np.float64) for crops in sets])
    if not len(features):
        raise NothingVaries("there are no crops")
    centred = features - features.mean(axis=0)
    _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    is_real = lengths > _ROUNDING * max(lengths.max(initial=0), np.linalg.norm(features))
    lengths, directions = lengths[is_real][:max_dimensions], directions[is_real][:max_dimensions]
    if not len(lengths):
        raise NothingVaries("the features of all crops are equal")
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])
    projected = centred @ (directions * signs[:, None]).T / (lengths[0] / np.sqrt(len(features)))
    ends = np.cumsum([len(crops.features) for crops in sets])[:-1]
    parts = np.split(projected, ends)
    return [replace(crops, features=part) for part, crops in zip(parts, sets, strict=True)]


def merge_rare(sets: Sequence[Crops], least: int = LEAST) -> list[Crops]:
    """Return the crops with all classes that a set has fewer than `least` crops of as one class, OTHER."""
    common = common_classes(sets, least)
    merged = []
    for crops in sets:
        names = [name if name in common else OTHER for name in crops.names]
        rows = largest_of_each(names, crops.groups, crops.sizes)
        merged.append(replace(crops.take(rows), names=[names[row] for row in rows]))
    return merged


def common_classes(sets: Sequence[Crops], least: int = LEAST) -> dict[str, int]:
    """Return the classes with at least `least` crops in every set, with their crops in all sets, commonest first."""
    counts = [Counter(crops.names) for crops in sets]
    totals = sum(counts, Counter())
    return {name: num for name, num in totals.most_common() if all(count[name] >= least for count in counts)}


def divisions(first: Crops, second: Crops, keys: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which crops of a class, those of `first` before those of `second`, form the first set: (1 + P, N), bool.

    Row 0 is the division as it is, the others are permutations: the crops of a group in both sets change places or
    stay, and the others are dealt anew. All rows have the same number of crops in the first set.

    keys: P uniform numbers for each group. One group has the same keys in every class, and so what belongs to one
    picture moves together, and yet every class keeps its numbers.
    """
    num_first = len(first.groups)
    groups = [*first.groups, *second.groups]
    is_first = np.arange(len(groups)) < num_first
    # high: in the first set. Of a pair one is above a half and the other below
    score = np.stack([keys[group] for group in groups], axis=1)
    score = np.where(is_first, score, 1 - score)
    paired = set(first.groups) & set(second.groups)
    single = np.array([index for index, group in enumerate(groups) if group not in paired], dtype=int)
    dealt = score > 0.5
    places = score[:, single].argsort(axis=1).argsort(axis=1)
    dealt[:, single] = places >= len(single) - is_first[single].sum()
    return np.concatenate([is_first[None], dealt])


def group_keys(sets: Sequence[Crops], num_permutations: int = NUM_PERMUTATIONS) -> dict[str, np.ndarray]:
    """Return the numbers that decide how each group is permuted: the same in every call for the same groups."""
    groups = dict.fromkeys(group for crops in sets for group in crops.groups)
    return dict(zip(groups, keyed("crops").random((len(groups), num_permutations)), strict=True))


def beyond(statistic: np.ndarray, is_two_sided: bool = False) -> Beyond:
    """Return what the first of some statistics, the observed one, is beyond the others, those of permutations."""
    permuted = statistic[1:]
    centred = statistic - permuted.mean()
    deviation = float(permuted.std())
    is_constant = deviation <= _ROUNDING * max(1, float(np.abs(permuted).max()))
    extreme = np.abs(centred) if is_two_sided else centred
    reached = 1 + np.count_nonzero(extreme[1:] >= extreme[0] - 1e-12)
    return Beyond(
        float(centred[0]), 0.0 if is_constant else float(centred[0] / deviation), float(reached / len(statistic))
    )


def compare(
    first: Crops, second: Crops, weights: Mapping[str, float], num_permutations: int = NUM_PERMUTATIONS
) -> tuple[Divergence | None, tuple[Divergence, ...]]:
    """Return (the divergence pooled over some classes, that of every class with enough crops) of two projected sets.

    weights: of the classes to pool, each with at least LEAST crops in both sets. The pooled one is grey if these
    classes are in fewer than ENOUGH groups of a set, and None if there are none.
    """
    keys = group_keys((first, second), num_permutations)
    classes, pooled_kl, pooled_mmd = [], 0.0, 0.0
    for name in common_classes((first, second)):
        ones, others = first.of_class(name), second.of_class(name)
        features = np.concatenate([ones.features, others.features])
        is_first = divisions(ones, others, keys)
        kl, mmd = gaussian_kl(features, is_first, ~is_first), median_mmd(features, is_first, ~is_first)
        num_first, num_second = len(ones.groups), len(others.groups)
        is_grey = min(num_first, num_second) < ENOUGH
        classes.append(Divergence(name, num_first, num_second, beyond(kl), beyond(mmd), is_grey))
        if name in weights:
            share = weights[name] / sum(weights.values())
            pooled_kl, pooled_mmd = pooled_kl + share * kl, pooled_mmd + share * mmd
    if not weights:
        return None, tuple(classes)
    nums = [sum(name in weights for name in crops.names) for crops in (first, second)]
    is_grey = _num_groups((first, second), weights) < ENOUGH
    return Divergence("all", *nums, beyond(pooled_kl), beyond(pooled_mmd), is_grey), tuple(classes)


def gain(
    real: Crops, base: Crops, trained: Crops, weights: Mapping[str, float], num_permutations: int = NUM_PERMUTATIONS
) -> Beyond:
    """Return KL(real || trained) - KL(real || base), pooled: below 0 if the trained model's crops are nearer.

    The permutations exchange base and trained model and leave photographs alone; p is two-sided.
    weights: as for `compare`, of classes that all three sets have; there must be one.
    """
    keys = group_keys((base, trained), num_permutations)
    difference = 0.0
    for name, weight in weights.items():
        ones, twos, reals = base.of_class(name), trained.of_class(name), real.of_class(name)
        features = np.concatenate([ones.features, twos.features, reals.features])
        of_base = divisions(ones, twos, keys)
        rest = np.zeros((len(of_base), len(reals.groups)), dtype=bool)
        is_real, is_base = np.concatenate([of_base & False, ~rest], axis=1), np.concatenate([of_base, rest], axis=1)
        is_trained = np.concatenate([~of_base, rest], axis=1)
        nearer = gaussian_kl(features, is_real, is_trained) - gaussian_kl(features, is_real, is_base)
        difference = difference + weight / sum(weights.values()) * nearer
    return beyond(difference, is_two_sided=True)


def _num_groups(sets: Sequence[Crops], classes: Mapping[str, float]) -> int:
    """Return the number of groups with a crop of some classes, in the set that has the fewest."""
    return min(
        len({group for name, group in zip(crops.names, crops.groups, strict=True) if name in classes}) for crops in sets
    )
