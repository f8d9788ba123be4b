"""What a cache holds: rows and bytes by kind, the latents' distribution, and photographs far from all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from safelight.data.shards import Cache, CorruptRow
from safelight.data.verify import NeededRow

# robust z-scores beyond which a row is far from the others
MAX_Z = 6.0
# a median absolute deviation times this is the standard deviation of normal values
_MAD_TO_STD = 1.4826
_ROWS_PER_REPORT = 256
# of fewer rows nothing is usual
_MIN_ROWS = 8


@dataclass(frozen=True)
class Outlier:
    """A photograph with a latent row far from the others: the largest robust z-score, of a channel's mean or std.

    variant: of that row. num_crops: how many of its rows are far. value: of this row; usual: the median of all rows.
    """

    name: str
    variant: int
    num_crops: int
    z: float
    statistic: str
    channel: int
    value: float
    usual: float


@dataclass
class Stats:
    """rows, bytes: by kind. unneeded_rows, unneeded_bytes: those among them that the run does not need, by kind.

    num_latents: latent rows of the run, whose pixels' mean and std over all rows are channel_means and channel_stds, of
    the unscaled posterior mean. num_damaged: rows of the run left out because they are damaged.
    outliers: one of each photograph, the farthest first.
    """

    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    unneeded_rows: dict[str, int] = field(default_factory=dict)
    unneeded_bytes: dict[str, int] = field(default_factory=dict)
    num_latents: int = 0
    num_damaged: int = 0
    channel_means: list[float] = field(default_factory=list)
    channel_stds: list[float] = field(default_factory=list)
    outliers: list[Outlier] = field(default_factory=list)


def cache_stats(
    cache: Cache, needed: Mapping[str, NeededRow], progress: Callable[[int, int], None] | None = None
) -> Stats:
    """Return the statistics of a cache. Reads every latent row that is needed; progress(rows done, total)."""
    stats, total = Stats(), len(cache)
    names: list[NeededRow] = []
    means, squares, sizes = [], [], []
    for num_done, address in enumerate(cache.addresses(), 1):
        kind, num_bytes, row = address.shard.kind, address.shard.row_bytes, needed.get(address.key)
        tables = [(stats.rows, stats.bytes)] + [(stats.unneeded_rows, stats.unneeded_bytes)] * (row is None)
        for num_rows_of, num_bytes_of in tables:
            num_rows_of[kind] = num_rows_of.get(kind, 0) + 1
            num_bytes_of[kind] = num_bytes_of.get(kind, 0) + num_bytes
        if row is not None and kind in ("posterior", "latent"):
            try:
                latent = cache.read_at(address).astype(np.float64)
            except CorruptRow:
                stats.num_damaged += 1
            else:
                mean = np.split(latent, 2)[0] if kind == "posterior" else latent
                names.append(row)
                means.append(mean.mean(axis=(1, 2)))
                squares.append((mean**2).mean(axis=(1, 2)))
                sizes.append(mean[0].size)
        if progress is not None and (num_done % _ROWS_PER_REPORT == 0 or num_done == total):
            progress(num_done, total)
    stats.num_latents = len(names)
    if names:
        means_NC, squares_NC, weights = np.array(means), np.array(squares), np.array(sizes) / sum(sizes)
        mean_C = weights @ means_NC
        stats.channel_means = mean_C.tolist()
        stats.channel_stds = np.sqrt((weights @ squares_NC - mean_C**2).clip(0)).tolist()
        stats.outliers = _outliers(names, means_NC, np.sqrt((squares_NC - means_NC**2).clip(0)))
    return stats


def _outliers(rows: list[NeededRow], means_NC: np.ndarray, stds_NC: np.ndarray) -> list[Outlier]:
    if len(rows) < _MIN_ROWS:
        return []
    # a std is compared by its logarithm: a half and a double of the usual are equally far
    compared = np.concatenate([means_NC, np.log(stds_NC.clip(1e-6))], axis=1)
    median = np.median(compared, axis=0)
    deviation = _MAD_TO_STD * np.median(np.abs(compared - median), axis=0)
    # where half of all rows are equal, any other is infinitely far
    z = np.abs(compared - median) / deviation.clip(1e-6)
    worst, num_channels = z.argmax(axis=1), means_NC.shape[1]
    far: dict[str, list[int]] = {}
    for n in np.flatnonzero(z.max(axis=1) > MAX_Z):
        far.setdefault(rows[n].name, []).append(int(n))
    outliers = []
    for name, numbers in far.items():
        n = max(numbers, key=lambda n: z[n].max())
        statistic, channel = ("mean", worst[n]) if worst[n] < num_channels else ("std", worst[n] - num_channels)
        values = means_NC[:, channel] if statistic == "mean" else stds_NC[:, channel]
        outliers.append(
            Outlier(
                name,
                rows[n].variant,
                len(numbers),
                float(z[n].max()),
                statistic,
                int(channel),
                float(values[n]),
                float(np.median(values)),
            )
        )
    return sorted(outliers, key=lambda outlier: (-outlier.z, outlier.name))
