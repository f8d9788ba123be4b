"""Gives the places of deleted rows back to the disk: rows at the end of the last shard move into them.

A row is copied to its new place and synced before the index names that place, and a shard is cut only after the index
has given up its end. Whenever the process is killed, the index names sound rows, and the next call does the rest.
No copy of a shard is made, so that it also works on a full disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from safelight.data.atomic import naming, sync_folder
from safelight.data.index import DTYPES, KINDS, Address, Index, Shard
from safelight.untrusted import open_regular, open_to_write

# rows moved in one transaction
_BYTES_AT_ONCE = 2**26
_SHARD_NAME = re.compile(rf"({'|'.join(KINDS)})-[0-9x]+-({'|'.join(DTYPES)})-[0-9]{{4,}}\.bin")


def compact(index: Index, folder: Path) -> None:
    """Move rows within the shards of each form until no shard has a free place, and give the rest back.

    folder: that of the shards. The caller alone uses the cache.
    """
    forms: dict[tuple, list[Shard]] = {}
    for shard in index.shards():
        forms.setdefault((shard.kind, shard.shape, shard.dtype), []).append(shard)
    for shards in forms.values():
        _compact_form(index, folder, shards)
    # left by a call that was killed, or by an append that was never committed
    named = {shard.file for shard in index.shards()}
    for path in folder.iterdir():
        if path.name not in named and _SHARD_NAME.fullmatch(path.name):
            path.unlink()
    sync_folder(folder)


def _compact_form(index: Index, folder: Path, shards: list[Shard]) -> None:
    """Compact the shards of one form, in their order. A place is counted through all of them."""
    max_rows = shards[0].max_rows
    places = np.concatenate(
        [np.fromiter((a.row for a in index.rows_of(s)), np.int64) + i * max_rows for i, s in enumerate(shards)]
    )
    num_live = len(places)
    free = np.setdiff1d(np.arange(num_live), places, assume_unique=True)
    moves: list[tuple[Address, Shard, int]] = []
    for address, place in zip(_rows_from(index, shards, num_live), free.tolist(), strict=True):
        moves.append((address, shards[place // max_rows], place % max_rows))
        if len(moves) * shards[0].row_bytes >= _BYTES_AT_ONCE:
            _move(index, folder, moves)
            moves = []
    _move(index, folder, moves)
    # from the last one, as the number of a shard is the number of those before it
    for i, shard in reversed(list(enumerate(shards))):
        num_rows = min(max(num_live - i * max_rows, 0), max_rows)
        if num_rows < shard.num_rows or num_rows == 0:
            index.shorten(shard, num_rows)
        path = folder / shard.file
        if num_rows == 0:
            path.unlink(missing_ok=True)
        elif path.exists() and path.stat().st_size > num_rows * shard.row_bytes:
            with naming(path), open_to_write(path) as file:
                file.truncate(num_rows * shard.row_bytes)


def _rows_from(index: Index, shards: list[Shard], place: int) -> Iterator[Address]:
    """Yield the rows from a place on, as they are now."""
    max_rows = shards[0].max_rows
    addresses = [
        address
        for i, shard in enumerate(shards)
        if (i + 1) * max_rows > place
        for address in index.rows_of(shard)
        if i * max_rows + address.row >= place
    ]
    yield from addresses


def _move(index: Index, folder: Path, moves: list[tuple[Address, Shard, int]]) -> None:
    """Copy rows to free places, then name these in the index. A damaged row stays damaged, by its checksum."""
    targets: dict[Shard, list[tuple[Address, int]]] = {}
    for address, shard, row in moves:
        targets.setdefault(shard, []).append((address, row))
    for shard, arriving in targets.items():
        path = folder / shard.file
        with naming(path), open_to_write(path) as file:
            for address, row in arriving:
                file.seek(row * shard.row_bytes)
                file.write(_bytes_of(folder, address))
            file.flush()
            os.fsync(file.fileno())
    with index.transaction():
        index.move(moves)


def _bytes_of(folder: Path, address: Address) -> bytes:
    shard = address.shard
    try:
        with open_regular(folder / shard.file, follow_links=False) as file:
            file.seek(address.row * shard.row_bytes)
            return file.read(shard.row_bytes).ljust(shard.row_bytes, b"\0")
    except FileNotFoundError:
        return bytes(shard.row_bytes)
