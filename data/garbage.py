"""Delete the rows of a cache that no run needs any more."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from safelight.data.shards import Cache


@dataclass
class Freed:
    """What deleting rows frees. rows, bytes: deleted, by kind. num_bytes: given back to the disk, index included."""

    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    num_kept: int = 0
    num_bytes: int = 0


def collect_garbage(cache: Cache, needed: Collection[str], photos: Collection[str], is_dry_run: bool) -> Freed:
    """Delete every row whose key is not needed, and give the space of it and of earlier deleted rows back to the disk.

    photos: files of the dataset whose size and time stay noted. is_dry_run: delete nothing, and return an estimate of
    num_bytes that leaves the index out. Otherwise the cache must have been opened exclusively.
    """
    freed, unneeded, live_bytes = Freed(), [], 0
    for address in cache.addresses():
        kind, num_bytes = address.shard.kind, address.shard.row_bytes
        if address.key in needed:
            freed.num_kept += 1
            live_bytes += num_bytes
            continue
        freed.rows[kind] = freed.rows.get(kind, 0) + 1
        freed.bytes[kind] = freed.bytes.get(kind, 0) + num_bytes
        unneeded.append(address)
    if is_dry_run:
        freed.num_bytes = max(0, cache.num_bytes() - cache.index_bytes() - live_bytes)
        return freed
    before = cache.num_bytes()
    cache.delete(unneeded, photos)
    freed.num_bytes = before - cache.num_bytes()
    return freed
