"""Bootstrap, jackknife and sign flips over units: what a second set of pictures would have given.

A unit is what was drawn independently: a prompt with all its pictures, or a photograph. Pictures of one prompt resemble
each other, so that counting each by itself would make intervals too narrow.

Random draws are those of numpy's Philox generator, whose key is the name of the metric in ASCII: the same pictures give
the same figures again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.special import ndtr, stdtrit

from safelight.trainer.metrics.interval import Interval

NUM_DRAWS = 10_000
# with fewer, limits at 95 % are not to be had: a bootstrap of 4 units has 35 different draws
MIN_UNITS = 5
# left out one after another by a jackknife: single units, or equal parts of them if there are more
NUM_BLOCKS = 50
# draws at a time, so that the counts of thousands of units fit memory
_CHUNK = 500


class TooFewPictures(ValueError):
    """There are too few units for a figure with an interval. The text says how many there are and how many it needs."""


def keyed(name: str) -> np.random.Generator:
    """Return the generator of a metric's draws. name: of the metric, at most 16 ASCII characters."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(name.encode("ascii").rjust(16, b"\0"), "big")))


def units_of(groups: Sequence[Hashable] | None, num: int, least: int = MIN_UNITS) -> tuple[np.ndarray, int]:
    """Return (the number of each row's unit, (num,) int64; how many units there are).

    groups: what the rows of a unit share, such as the prompt; None if each row is one. Raises TooFewPictures if there
    are fewer units than `least`.
    """
    numbers: dict[Hashable, int] = {}
    rows = range(num) if groups is None else groups
    unit = np.array([numbers.setdefault(group, len(numbers)) for group in rows], dtype=np.int64)
    if len(unit) != num:
        raise ValueError(f"{len(unit)} groups for {num} rows")
    if len(numbers) < least:
        raise TooFewPictures(f"{len(numbers)} of the {least} prompts or photographs that it needs")
    return unit, len(numbers)


def unit_means(values: np.ndarray, groups: Sequence[Hashable] | None = None) -> np.ndarray:
    """Return the mean of each unit's values, (num_units,), in the order in which units first occur."""
    values = np.asarray(values, dtype=np.float64)
    unit, num_units = units_of(groups, len(values))
    return np.bincount(unit, values, num_units) / np.bincount(unit, minlength=num_units)


def bootstrap(generator: np.random.Generator, statistic: Callable[..., np.ndarray], *num_units: int) -> np.ndarray:
    """Return a statistic over NUM_DRAWS bootstrap draws, without those in which it is not defined.

    statistic: takes how often each unit was drawn, a (draws, units) array for each of num_units; returns (draws,).
    """
    found = []
    for _ in range(0, NUM_DRAWS, _CHUNK):
        counts = [generator.multinomial(num, np.full(num, 1 / num), _CHUNK).astype(np.float64) for num in num_units]
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(statistic(*counts))
    values = np.concatenate(found)
    return values[np.isfinite(values)]


def percentile_interval(value: float, draws: np.ndarray, num_units: int) -> Interval:
    """Return a value with the 95 % limits of bootstrap draws over num_units units, widened as few units need it.

    Percentiles of a mean's draws are too narrow by what Student's t and n - 1 add.
    Source: Hesterberg 2015, "What teachers should know about the bootstrap", arXiv:1411.5279, expanded percentiles.
    """
    tail = float(ndtr(np.sqrt(num_units / (num_units - 1)) * stdtrit(num_units - 1, 0.025)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def mean_interval(values: np.ndarray, groups: Sequence[Hashable] | None = None, name: str = "mean") -> Interval:
    """Return the mean over units of their mean values, with its bootstrap interval.

    values: (N,), one for each picture. groups: of the pictures, see `units_of`. name: of the metric. Raises
    TooFewPictures.
    """
    means = unit_means(values, groups)
    draws = bootstrap(keyed(name), lambda counts: counts @ means / len(means), len(means))
    return percentile_interval(means.mean(), draws, len(means))


def blocks(unit: np.ndarray, num_units: int) -> list[np.ndarray]:
    """Return which rows stay when a block of units is left out, a (N,) bool for each of at most NUM_BLOCKS blocks.

    unit: of each row. Units that follow each other come into different blocks.
    """
    num_blocks = min(num_units, NUM_BLOCKS)
    return [unit % num_blocks != number for number in range(num_blocks)]


def jackknife_interval(value: float, *left_out: np.ndarray) -> Interval:
    """Return a value with 95 % limits of the jackknife, for statistics that a bootstrap's repeated pictures would bias.

    left_out: for each set of units, the value without each of its `blocks`. The jackknife's variance over single units
    is too large on average, never too small (Efron and Stein 1981, doi:10.1214/aos/1176345462): the limits are careful.
    """
    variance = sum((len(values) - 1) * float(np.var(values)) for values in left_out)
    half = -float(stdtrit(min(map(len, left_out)) - 1, 0.025)) * variance**0.5
    return Interval(float(value), float(value) - half, float(value) + half)


def sign_flips(generator: np.random.Generator, num_units: int) -> tuple[np.ndarray, bool]:
    """Return (signs of 1 and -1, (flips, num_units); whether they are all that there are, each once)."""
    if 2**num_units <= NUM_DRAWS:
        bits = np.arange(2**num_units)[:, None] >> np.arange(num_units) & 1
        return 1.0 - 2.0 * bits, True
    return 1.0 - 2.0 * generator.integers(0, 2, (NUM_DRAWS, num_units)), False


def two_sided_p(value: float, flipped: np.ndarray, is_complete: bool) -> float:
    """Return how often values under sign flips are at least as far from 0 as the real one, which counts as a flip."""
    # sums in another order differ in their last digits
    num_as_far = int(np.sum(np.abs(flipped) >= abs(value) * (1 - 1e-9) - 1e-12))
    return num_as_far / len(flipped) if is_complete else (num_as_far + 1) / (len(flipped) + 1)


def halves(num: int, groups: Sequence[Hashable] | None = None, name: str = "halves") -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of two halves of `num` photographs, drawn by key; each unit is in one of them."""
    unit, num_units = units_of(groups, num, 2)
    order = keyed(name).permutation(num_units)
    is_first = np.isin(unit, order[: num_units // 2])
    return np.flatnonzero(is_first), np.flatnonzero(~is_first)
