"""Verify a cache: every row against its checksum, and some rows by encoding them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from safelight.data.index import TOKENS, row_dtype, shape_text
from safelight.data.shards import Cache, CorruptRow
from safelight.errors import UserError

# of a row's largest value, times 2^-10: what float16 rounds off, and TF32, in which GPUs may convolve
MAX_ROUNDINGS = 4
ROUNDING = 2.0**-10
# of latents that an autoencoder encodes in bfloat16, which has three bits less
MAX_BFLOAT16_ROUNDINGS = 8 * MAX_ROUNDINGS
_ROWS_PER_REPORT = 256

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class NeededRow:
    """A row that a run needs. name: the photograph, or other text, that it belongs to. variant: of a latent or mask.

    again: encodes it, float32 or token ids. max_roundings: by how much that may differ from the cache, as in Verified.
    """

    kind: str
    shape: tuple[int, ...]
    name: str
    again: Callable[[], np.ndarray]
    variant: int = 0
    max_roundings: float = MAX_ROUNDINGS


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with which row: key. name: as NeededRow's, empty for a row that the run does not need."""

    name: str
    kind: str
    key: str
    what: str


@dataclass
class Verified:
    """What verifying a cache found.

    num_rows, num_bytes: checked, of which num_unneeded rows are of other runs or of nothing any more. missing: names of
    the rows that are not cached yet. num_encoded: rows that were encoded again; max_roundings: their largest difference
    from the cache, in float16's rounding of the row's largest value.
    """

    num_rows: int = 0
    num_bytes: int = 0
    num_unneeded: int = 0
    num_encoded: int = 0
    max_roundings: float = 0.0
    missing: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return not self.problems and not self.missing


def sample_keys(keys: Mapping[str, object] | list[str], num: int, seed: int) -> list[str]:
    """Return `num` of the keys: a draw that depends on the seed and on each key alone."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())[:num]


def verify(
    cache: Cache, needed: Mapping[str, NeededRow], num_again: int, seed: int, progress: Progress | None = None
) -> Verified:
    """Check every row of the cache, and encode num_again of the sound ones that are needed again. Changes nothing.

    progress: called with (what is checked, rows done, total).
    """
    found, total = Verified(), len(cache)
    sound = []
    for address in cache.addresses():
        row = needed.get(address.key)
        name, kind = (row.name, row.kind) if row else ("", address.shard.kind)
        dtype = row_dtype(kind, cache.dtype)
        try:
            values = cache.read_at(address)
            if row is None:
                pass
            elif (kind, row.shape, dtype) != (address.shard.kind, address.shard.shape, address.shard.dtype):
                expected = f"{kind} {shape_text(row.shape)} {dtype}"
                raise CorruptRow(address.shard.file, address.key, f"is not {expected}")
            elif not np.isfinite(values).all():
                raise CorruptRow(address.shard.file, address.key, "has values that are not finite")
            else:
                sound.append(address.key)
        except CorruptRow as error:
            found.problems.append(Problem(name, kind, address.key, f"{error.shard} {error.reason}"))
        found.num_rows += 1
        found.num_bytes += address.shard.row_bytes
        found.num_unneeded += row is None
        if progress is not None and (found.num_rows % _ROWS_PER_REPORT == 0 or found.num_rows == total):
            progress("rows checked", found.num_rows, total)
    present = {*sound, *(problem.key for problem in found.problems)}
    found.missing = [row.name for key, row in needed.items() if key not in present]
    again = sample_keys(sound, num_again, seed)
    for key in again:
        _compare(cache, key, needed[key], found)
        if progress is not None:
            progress("rows encoded again", found.num_encoded, len(again))
    return found


def _compare(cache: Cache, key: str, row: NeededRow, found: Verified) -> None:
    found.num_encoded += 1
    try:
        again = row.again()
    except UserError as error:
        found.problems.append(Problem(row.name, row.kind, key, str(error)))
        return
    stored = cache.read([key])[0].astype(np.float64)
    if row.kind == TOKENS:
        if not np.array_equal(stored, again):
            found.problems.append(Problem(row.name, row.kind, key, "differs from what is encoded now"))
        return
    unit = ROUNDING * max(float(np.abs(again).max()), float(np.finfo(np.float16).tiny))
    roundings = float(np.abs(stored - again).max()) / unit
    if not roundings <= row.max_roundings:
        what = f"differs from what is encoded now by {roundings:.3g} roundings of float16 (limit {row.max_roundings})"
        found.problems.append(Problem(row.name, row.kind, key, what))
    else:
        found.max_roundings = max(found.max_roundings, roundings)
