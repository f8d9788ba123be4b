"""Which rows of a cache are damaged, by its own reading of every row that its index names."""

from __future__ import annotations

import contextlib
import sqlite3

from safelight.data.index import INDEX_NAME
from safelight.data.shards import Cache, CorruptRow


def damaged_rows(cache: Cache) -> list[CorruptRow]:
    """Return an error for every row of the cache's folder that cannot be read back; empty if all are intact."""
    with contextlib.closing(sqlite3.connect(cache.path / INDEX_NAME)) as index:
        keys = [key for (key,) in index.execute("SELECT key FROM rows ORDER BY shard, row")]
    damaged = []
    # opened anew, as the rows that a cache has read once are not checked again
    with Cache(cache.path) as fresh:
        for key in keys:
            try:
                fresh.read([key])
            except CorruptRow as error:
                damaged.append(error)
    return damaged
