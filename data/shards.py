"""The cache's files: arrays ("rows") by key, in append-only shards read through memory maps, with an SQLite index.

    PATH/index.sqlite                              key -> shard, row, crc32
    PATH/shards/latent-4x64x64-float16-0000.bin    rows of 4 x 64 x 64 float16, one after another, nothing else

Only rows in the index exist. A batch is written behind the last indexed row, synced, and only then committed to the
index, so a kill at any moment loses at most that batch: the next append overwrites its bytes. Each process verifies a
row's checksum when it first reads it. `drop_damaged` does so before training, in one pass over the rows a run needs,
and removes damaged rows from the index so that they are encoded again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safelight.data.atomic import naming, sync_folder
from safelight.data.lock import FolderLock
from safelight.errors import UserError

INDEX_NAME = "index.sqlite"
SHARDS_FOLDER = "shards"
MAX_SHARD_BYTES = 256 * 2**20
DTYPES = ("float16", "float32")
KINDS = ("posterior", "latent", "text")
FORMAT = 1
# older SQLite versions allow 999 variables in one statement
_KEYS_PER_QUERY = 500
_LOCK_TIMEOUT_S = 60.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, shape TEXT NOT NULL, dtype TEXT NOT NULL,
    num_rows INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rows (
    key TEXT PRIMARY KEY, shard INTEGER NOT NULL REFERENCES shards (id), row INTEGER NOT NULL, crc32 INTEGER NOT NULL,
    UNIQUE (shard, row)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS photos (
    file TEXT PRIMARY KEY, sha256 TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL) WITHOUT ROWID;
"""


class CorruptRow(UserError):
    """A stored row that is damaged. shard: the name of its file. key: the row's key."""

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(
            f"cache row {key[:16]} in {SHARDS_FOLDER}/{shard} {reason}; "
            "`safelight cache` or `safelight train --resume` encodes it again"
        )
        self.shard, self.key = shard, key


@dataclass(frozen=True)
class _Address:
    """Where a row is stored."""

    key: str
    shard: int
    file: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    row: int
    crc32: int


_ADDRESS_QUERY = (
    "SELECT rows.key, shards.id, shards.file, shards.kind, shards.shape, shards.dtype, rows.row, rows.crc32 "
    "FROM rows JOIN shards ON shards.id = rows.shard "
)


def _address(index_row: tuple) -> _Address:
    key, shard, file, kind, shape, dtype, row, crc32 = index_row
    return _Address(key, shard, file, kind, tuple(map(int, shape.split("x"))), dtype, row, crc32)


class Cache:
    """A folder of rows by key, created if it does not exist. Several threads and processes may read it at once.

    dtype: of appended rows as stored, float16 or float32. Raises ValueError for another dtype, and for an index that is
    damaged or of another version.
    """

    def __init__(self, path: Path, dtype: str = "float16"):
        if dtype not in DTYPES:
            raise ValueError(f"cache dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
        self.path, self.dtype = Path(path), dtype
        self._shards_path = self.path / SHARDS_FOLDER
        self._lock = threading.RLock()
        self._maps: dict[int, np.ndarray] = {}
        self._checked: set[tuple[int, int]] = set()
        self._folder_lock: FolderLock | None = None
        self.num_dropped = 0
        self._shards_path.mkdir(parents=True, exist_ok=True)
        # autocommit: transactions are opened explicitly, to span the write of the shard
        self._index = sqlite3.connect(
            self.path / INDEX_NAME, timeout=_LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            self._open_index()
        except BaseException:
            self._index.close()
            raise

    def _open_index(self) -> None:
        path = self.path / INDEX_NAME
        try:
            # a rollback journal, not WAL, which needs shared memory; network folders (Google Drive on Colab) lack it
            self._index.execute("PRAGMA journal_mode = DELETE")
            self._index.execute("PRAGMA synchronous = FULL")
            version = self._index.execute("PRAGMA user_version").fetchone()[0]
            if version in (0, FORMAT):
                self._index.executescript(_SCHEMA + f"PRAGMA user_version = {FORMAT};" * (version == 0))
            self._index.execute("SELECT key FROM rows LIMIT 1").fetchone()
        except sqlite3.OperationalError as error:
            raise UserError(f"cache index {path} cannot be opened ({error}); is another run writing to it?") from error
        except sqlite3.DatabaseError as error:
            raise UserError(f"cache index {path} is damaged ({error}); delete the cache folder") from error
        if version not in (0, FORMAT):
            raise UserError(f"cache {self.path} has format {version}, not {FORMAT}; delete the cache folder")

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Release the index, the memory maps and the claim."""
        self.release()
        with self._lock:
            self._maps.clear()
            self._index.close()

    def claim(self) -> None:
        """Lock the folder for adding rows, until `release`. Does nothing if this cache has claimed it already.

        The lock keeps two processes from encoding the same rows. Without it, on a file system that has no locks, rows
        are never corrupted either. Raises UserError naming the process that holds the lock.
        """
        if self._folder_lock is None:
            self._folder_lock = FolderLock(
                self.path,
                "make it writable, or copy the dataset elsewhere",
                "wait until it has filled the cache, then run this again",
            )

    def release(self) -> None:
        """Release the lock of `claim`, if held."""
        if self._folder_lock is not None:
            self._folder_lock.release()
            self._folder_lock = None

    def __len__(self) -> int:
        with self._lock:
            return self._index.execute("SELECT count(*) FROM rows").fetchone()[0]

    def _find(self, keys: Sequence[str]) -> dict[str, _Address]:
        """Return the addresses of the keys that are in the index."""
        addresses = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            query = f"{_ADDRESS_QUERY} WHERE rows.key IN ({','.join('?' * len(part))})"
            with self._lock:
                index_rows = self._index.execute(query, part).fetchall()
            addresses.update((index_row[0], _address(index_row)) for index_row in index_rows)
        return addresses

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys that have no row yet, in order, each once."""
        unique = list(dict.fromkeys(keys))
        present = self._find(unique)
        return [key for key in unique if key not in present]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the index's write lock, which also guards the ends of the shards; commit on exit, roll back on error."""
        with self._lock:
            self._index.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._index.execute("COMMIT")
            except BaseException:
                if self._index.in_transaction:
                    self._index.execute("ROLLBACK")
                raise

    def _open_shard(self, kind: str, shape: tuple[int, ...], row_bytes: int) -> tuple[int, str, int]:
        """Return (id, file name, number of rows) of a shard with room for another row, creating one if needed."""
        shape_text = "x".join(map(str, shape))
        shards = self._index.execute(
            "SELECT id, file, num_rows FROM shards WHERE kind = ? AND shape = ? AND dtype = ? ORDER BY id",
            (kind, shape_text, self.dtype),
        ).fetchall()
        if shards and (shards[-1][2] + 1) * row_bytes <= MAX_SHARD_BYTES:
            return shards[-1]
        file = f"{kind}-{shape_text}-{self.dtype}-{len(shards):04d}.bin"
        cursor = self._index.execute(
            "INSERT INTO shards (file, kind, shape, dtype, num_rows) VALUES (?, ?, ?, ?, 0)",
            (file, kind, shape_text, self.dtype),
        )
        return cursor.lastrowid, file, 0

    def _write_rows(self, file: str, offset: int, rows: np.ndarray) -> None:
        """Write rows at a byte offset of a shard and sync it, dropping what follows: an append never committed."""
        path = self._shards_path / file
        is_new = not path.exists()
        with naming(path), open(path, "wb" if is_new else "r+b") as stream:
            stream.seek(offset)
            stream.write(rows.data)
            stream.truncate()
            stream.flush()
            os.fsync(stream.fileno())
        if is_new:
            sync_folder(self._shards_path)

    def append(self, kind: str, keys: Sequence[str], array: np.ndarray) -> int:
        """Store array[i] under keys[i], leaving existing rows unchanged, and return how many rows were added.

        kind: "posterior" (mean and logvar stacked), "latent" (mean alone) or "text". array: (N, ...) floats, converted
        to the cache's dtype. If the process is killed meanwhile, either all rows are added or none.
        Raises ValueError for an unknown kind, different lengths, an empty row shape, and values that are not finite in
        the stored dtype.
        """
        if kind not in KINDS:
            raise ValueError(f"cache kind {kind!r} is not known; use one of {', '.join(KINDS)}")
        if len(keys) != len(array) or array.ndim < 2 or 0 in array.shape[1:]:
            raise ValueError(f"{len(keys)} keys do not match an array of shape {array.shape}; pass one key per row")
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, dtype=np.dtype(self.dtype).newbyteorder("<"))
        if not np.isfinite(array).all():
            raise UserError(
                f"{kind} rows contain values that are not finite in {self.dtype}; "
                "encode in fp32, or use a float32 cache"
            )
        num_added = 0
        with self._transaction():
            # looked up under the lock: another process may have added some meanwhile
            missing = set(self.missing(keys))
            order = [i for i, key in enumerate(keys) if key in missing and not missing.discard(key)]
            while num_added < len(order):
                row_bytes = array[0].nbytes
                shard, file, start = self._open_shard(kind, array.shape[1:], row_bytes)
                room = max(1, MAX_SHARD_BYTES // row_bytes - start)
                part = order[num_added : num_added + room]
                rows = array[part]
                self._write_rows(file, start * row_bytes, rows)
                self._index.executemany(
                    "INSERT INTO rows (key, shard, row, crc32) VALUES (?, ?, ?, ?)",
                    [(keys[i], shard, start + j, zlib.crc32(rows[j].data)) for j, i in enumerate(part)],
                )
                self._index.execute("UPDATE shards SET num_rows = ? WHERE id = ?", (start + len(part), shard))
                num_added += len(part)
        return num_added

    def _row(self, address: _Address) -> np.ndarray:
        """Return a row as a view of its shard's memory map. Raises CorruptRow if its file is cut or its CRC differs."""
        with self._lock:
            rows = self._maps.get(address.shard)
            # an address past the end of the map: the shard has grown since it was mapped
            if rows is None or address.row >= len(rows):
                rows = self._map(address)
        row = rows[address.row]
        if (address.shard, address.row) not in self._checked:
            if zlib.crc32(row.data) != address.crc32:
                raise CorruptRow(address.file, address.key, "does not match its checksum")
            self._checked.add((address.shard, address.row))
        return row

    def _map(self, address: _Address) -> np.ndarray:
        dtype = np.dtype(address.dtype).newbyteorder("<")
        row_bytes = int(np.prod(address.shape)) * dtype.itemsize
        path = self._shards_path / address.file
        num_rows = path.stat().st_size // row_bytes if path.is_file() else 0
        if address.row >= num_rows:
            raise CorruptRow(address.file, address.key, "is past the end of its file")
        rows = np.memmap(path, dtype, mode="r", shape=(num_rows, *address.shape)).view(np.ndarray)
        self._maps[address.shard] = rows
        return rows

    def _require(self, keys: Sequence[str]) -> list[_Address]:
        """Return the address of each key. Raises UserError if one is missing."""
        addresses = self._find(list(dict.fromkeys(keys)))
        for key in keys:
            if key not in addresses:
                raise UserError(f"cache {self.path} has no row {key[:16]}; run `safelight cache` first")
        return [addresses[key] for key in keys]

    def kind_of(self, key: str) -> str:
        """Return the kind of a row. Raises UserError if it is missing."""
        return self._require([key])[0].kind

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """Return a copy of the rows stacked, (len(keys), ...), in their stored dtype.

        Verifies a row's checksum the first time it is read. Raises CorruptRow for a damaged row, and ValueError for a
        missing one, for no keys, and for rows of different shapes.
        """
        addresses = self._require(keys)
        shapes = {address.shape for address in addresses}
        if len(shapes) != 1:
            raise ValueError(
                f"rows read together must have one shape, not {sorted(shapes)}; read each bucket separately"
            )
        return np.stack([self._row(address) for address in addresses])

    def drop_damaged(self, keys: Sequence[str]) -> list[CorruptRow]:
        """Remove the damaged ones among these rows from the index and return an error for each.

        Reads every row that this process has not read yet, in the order of the shards. `num_dropped` adds up the
        removed rows of all calls.
        """
        # map anew: a shard may have been truncated since it was mapped, and reading past its end kills the process
        with self._lock:
            self._maps.clear()
        bad = []
        for address in sorted(self._find(list(dict.fromkeys(keys))).values(), key=lambda a: (a.shard, a.row)):
            try:
                self._row(address)
            except CorruptRow as error:
                bad.append(error)
        if bad:
            self.claim()
            with self._transaction():
                self._index.executemany("DELETE FROM rows WHERE key = ?", [(error.key,) for error in bad])
        self.num_dropped += len(bad)
        return bad

    def seen_photos(self) -> dict[str, tuple[str, int, int]]:
        """Return each photo file's (SHA-256, size in bytes, mtime in ns) at the time its content was last read."""
        with self._lock:
            photos = self._index.execute("SELECT file, sha256, size, mtime_ns FROM photos").fetchall()
        return {file: (sha256, size, mtime_ns) for file, sha256, size, mtime_ns in photos}

    def note_photos(self, photos: dict[str, tuple[str, int, int]]) -> None:
        """Store what `seen_photos` returns. Does nothing if the cache is read-only."""
        rows = [(file, *seen) for file, seen in photos.items()]
        try:
            with self._transaction():
                self._index.executemany(
                    "INSERT OR REPLACE INTO photos (file, sha256, size, mtime_ns) VALUES (?, ?, ?, ?)", rows
                )
        except sqlite3.OperationalError:
            # training from a complete cache on a read-only disk is fine; its photos are read again at each start
            pass
