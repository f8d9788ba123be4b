"""The cache's index, an SQLite file: which rows exist, in which shard, at which place, with which checksum.

A dataset may come from somebody else, and its cache with it, so nothing in the file is believed. SQLite opens it only
if no file beside it makes SQLite touch others; its tables must be exactly ours, because views, triggers and generated
columns run what their author wrote; every value is checked when it is read, because a column of SQLite holds any type.
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
import stat
import struct
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from safelight.data.atomic import sync_file, sync_folder
from safelight.errors import UserError
from safelight.untrusted import UnsafeFile, open_regular

INDEX_NAME = "index.sqlite"
FORMAT = 1
TOKENS = "tokens"
KINDS = ("posterior", "latent", "text", "mask", TOKENS)
# of rows of token ids, and of all others, as data.cache_dtype chooses
TOKEN_DTYPE = "int32"
FLOAT_DTYPES = ("float16", "float32")
DTYPES = (*FLOAT_DTYPES, TOKEN_DTYPE)
MAX_SHARD_BYTES = 256 * 2**20
# 25 TB of rows
MAX_SHARDS = 100_000
# a row takes about 175 bytes: 12 million rows
MAX_INDEX_BYTES = 2**31
# longest text or row: a photo's path, a table's definition
MAX_VALUE_BYTES = 2**16
_SHAPE = re.compile(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8}){0,3}")
# older SQLite versions allow 999 variables in one statement
_VALUES_PER_QUERY = 500
_ROWS_PER_QUERY = 4096
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
# the first bytes of a journal, and the last ones of one that names another journal, which SQLite then deletes too
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
# the magic; records; a random number; the index's pages before the transaction; bytes of a disk's sector and of a page
_JOURNAL_HEADER = struct.Struct(">8s5I")
# failures of the disk, or of another process that holds the lock, not of the index
_NO_DAMAGE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
}


@dataclass(frozen=True)
class Shard:
    """A file of rows. number: counts the shards of its kind, shape and dtype. num_rows: rows written so far."""

    id: int
    kind: str
    shape: tuple[int, ...]
    dtype: str
    number: int
    num_rows: int

    @property
    def file(self) -> str:
        return f"{self.kind}-{shape_text(self.shape)}-{self.dtype}-{self.number:04d}.bin"

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def max_rows(self) -> int:
        return MAX_SHARD_BYTES // self.row_bytes


@dataclass(frozen=True)
class Address:
    """Where a row is stored, and the CRC-32 of its bytes."""

    key: str
    shard: Shard
    row: int
    crc32: int


def row_dtype(kind: str, cache_dtype: str) -> str:
    """Return the dtype in which a cache stores rows of a kind. cache_dtype: that of its rows of floats."""
    return TOKEN_DTYPE if kind == TOKENS else cache_dtype


def shape_text(shape: Sequence[int]) -> str:
    """Return a row's shape as the index and the names of shards have it: 4x64x64."""
    return "x".join(map(str, shape))


def _is_below(value: object, limit: int) -> bool:
    return isinstance(value, int) and 0 <= value < limit


def _is_power_of_2(value: int, smallest: int) -> bool:
    return smallest <= value <= 65536 and value.bit_count() == 1


def _schema_of(connection: sqlite3.Connection) -> set[tuple]:
    """Return (type, name, table, definition) of everything in a database; definitions without optional white space."""
    entries = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    return {(*entry[:3], _without_spaces(entry[3])) for entry in entries}


def _without_spaces(definition: object) -> object:
    if not isinstance(definition, str):
        return definition
    return re.sub(r" ?([(),]) ?", r"\1", " ".join(definition.split()))


class Index:
    """The index of a cache folder, created if there is none. Threads share it, and other processes its file.

    Raises UserError for an index that is damaged, now or when a damaged place is read; of another version; or in use.
    """

    def __init__(self, folder: Path):
        self.path = folder / INDEX_NAME
        self._lock = threading.RLock()
        self._check_files()
        self._connect()

    def _connect(self) -> None:
        with self._naming_damage(is_opening=True):
            # autocommit: transactions are opened explicitly, to span the write of the shard
            self._connection = sqlite3.connect(
                self.path, timeout=_LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        try:
            with self._naming_damage(is_opening=True):
                self._open()
            self._shards = self._read_shards()
        except BaseException:
            self._connection.close()
            raise

    def _check_files(self) -> None:
        """Refuse an index, and files beside it that SQLite would read, through which it could touch other files."""
        for name in (f"{INDEX_NAME}-wal", f"{INDEX_NAME}-shm"):
            if os.path.lexists(self.path.with_name(name)):
                raise self.damaged(f"there is a file {name}, which Safelight never writes")
        try:
            # not opened: closing it would drop the locks that another connection of this process holds
            status = os.lstat(self.path)
        except FileNotFoundError:
            pass
        else:
            if not stat.S_ISREG(status.st_mode):
                raise self.damaged("it is not a regular file")
            if status.st_size > MAX_INDEX_BYTES:
                raise self.damaged(f"it has {status.st_size:,} bytes, over the limit of {MAX_INDEX_BYTES:,}")
        self._check_journal()

    def _check_journal(self) -> None:
        """Refuse a journal that would make SQLite delete another file, or change the index's size, when rolled back."""
        try:
            path = self.path.with_name(f"{INDEX_NAME}-journal")
            with open_regular(path, 2 * MAX_INDEX_BYTES, follow_links=False) as journal:
                num_bytes = os.fstat(journal.fileno()).st_size
                header = journal.read(_JOURNAL_HEADER.size).ljust(_JOURNAL_HEADER.size, b"\0")
                journal.seek(max(0, num_bytes - len(_JOURNAL_MAGIC)))
                if journal.read() == _JOURNAL_MAGIC:
                    raise self.damaged("its journal names another file to delete")
        except FileNotFoundError:
            return
        except UnsafeFile as error:
            raise self.damaged(error) from None
        magic, num_records, _, num_pages, sector, page = _JOURNAL_HEADER.unpack(header)
        if not header[0]:
            # until the records are on the disk, the header starts with zeros, and SQLite does not read it
            return
        if magic != _JOURNAL_MAGIC or not (_is_power_of_2(sector, 32) and _is_power_of_2(page, 512)):
            raise self.damaged("its journal is none of SQLite's")
        # each record is a page, its number and a checksum; all bits set: as many as there are
        if num_records != 0xFFFFFFFF and sector + num_records * (page + 8) > num_bytes:
            raise self.damaged(f"its journal is too short for {num_records:,} pages")
        # a transaction of ours never shortens the index; it may be killed in the middle of a page. Looked up only now:
        # another process may have made the index longer since, before it wrote this journal
        if num_pages and num_pages * page >= self._num_bytes() + page:
            raise self.damaged(f"its journal is of an index of {num_pages * page:,} bytes")

    def _num_bytes(self) -> int:
        # not opened: closing it would drop the locks that another connection of this process holds
        return os.lstat(self.path).st_size if os.path.lexists(self.path) else 0

    def _open(self) -> None:
        connection = self._connection
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        if sys.version_info >= (3, 12):
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE)
        # a rollback journal, not WAL, which needs shared memory; network folders (Google Drive on Colab) lack it.
        # No memory map: reading one past the end of a file that was cut kills the process
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "temp_store = MEMORY"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        # a journal has been rolled back by now
        if self._num_bytes() > MAX_INDEX_BYTES:
            raise self.damaged(f"it has {self._num_bytes():,} bytes, over the limit of {MAX_INDEX_BYTES:,}")
        if version not in (0, FORMAT):
            raise UserError(f"cache {self.path.parent} has format {version}, not {FORMAT}; delete the cache folder")
        with closing(sqlite3.connect(":memory:")) as empty:
            empty.executescript(_SCHEMA)
            ours = _schema_of(empty)
        found = _schema_of(connection)
        # a table may be missing, of an older version or a process that was killed while it made them
        tables = {table for _, _, table, _ in found}
        if found != {entry for entry in ours if entry[2] in tables}:
            raise self.damaged("its tables are not those of a cache")
        # reads the whole file; see also `check_places`
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()
        if problem != ("ok",):
            raise self.damaged(problem[0])
        connection.executescript(_SCHEMA + f"PRAGMA user_version = {FORMAT};" * (version == 0))

    def check_places(self) -> None:
        """Raise UserError if a row cannot be found by its place, or two share one, which opening does not notice.

        Takes ten times as long as opening; whoever only reads rows by key finds such damage by their checksums.
        """
        (problem,) = self._query("PRAGMA integrity_check(1)")
        if problem != ("ok",):
            raise self.damaged(problem[0])

    def damaged(self, reason: object) -> UserError:
        """Return the error for an index that is damaged."""
        return UserError(f"the cache's index {self.path} is damaged ({reason}); delete the cache folder")

    @contextmanager
    def _naming_damage(self, is_opening: bool = False) -> Iterator[None]:
        """Turn errors of SQLite that are due to the index's content into UserError."""
        try:
            yield
        except sqlite3.ProgrammingError:
            # a bug of ours
            raise
        except UnicodeDecodeError as error:
            # of an error's message, which quotes the file
            raise self.damaged(error) from error
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _NO_DAMAGE:
                raise self.damaged(error) from error
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise UserError(
                    f"the disk of the cache's index {self.path} is full; free some space and run it again: the rows "
                    "that were cached are kept"
                ) from error
            if is_opening:
                raise UserError(
                    f"cache index {self.path} cannot be opened ({error}); wait until no other run writes to it, and "
                    "check that you may write there"
                ) from error
            raise

    def _query(self, statement: str, values: Sequence = ()) -> list[tuple]:
        with self._lock, self._naming_damage():
            return self._connection.execute(statement, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __len__(self) -> int:
        return self._query("SELECT count(*) FROM rows")[0][0]

    def _read_shards(self) -> dict[int, Shard]:
        """Return the shards by id. Their names are derived, not taken from the file: a name there may lead anywhere."""
        shards, numbers = {}, Counter()
        rows = self._query(
            f"SELECT id, file, kind, shape, dtype, num_rows FROM shards ORDER BY id LIMIT {MAX_SHARDS + 1}"
        )
        for shard_id, file, kind, shape, dtype, num_rows in rows:
            if kind not in KINDS:
                raise self.damaged(f"kind {kind!r:.40} is none of {', '.join(KINDS)}")
            if dtype not in DTYPES:
                raise self.damaged(f"dtype {dtype!r:.40} is none of {', '.join(DTYPES)}")
            if (kind == TOKENS) != (dtype == TOKEN_DTYPE):
                raise self.damaged(f"rows of kind {kind} are never {dtype}")
            if not isinstance(shape, str) or not _SHAPE.fullmatch(shape):
                raise self.damaged(f"{shape!r:.40} is not the shape of a row")
            shard = Shard(
                shard_id, kind, tuple(map(int, shape.split("x"))), dtype, numbers[kind, shape, dtype], num_rows
            )
            numbers[kind, shape, dtype] += 1
            if shard.row_bytes > MAX_SHARD_BYTES:
                raise self.damaged(f"rows of shape {shape} are larger than a shard")
            if file != shard.file:
                raise self.damaged(f"it names the file {file!r:.60} in place of {shard.file}")
            if not _is_below(num_rows, shard.max_rows + 1):
                raise self.damaged(f"{file} cannot hold {num_rows!r:.40} rows")
            shards[shard_id] = shard
        if len(shards) > MAX_SHARDS:
            raise self.damaged(f"it has more than {MAX_SHARDS:,} shards")
        return shards

    def _address(self, key: str, shard_id: object, row: object, crc32: object) -> Address:
        if shard_id not in self._shards:
            # another process may have added it
            self._shards = self._read_shards()
        shard = self._shards.get(shard_id)
        if shard is None or not _is_below(row, shard.max_rows) or not _is_below(crc32, 2**32):
            raise self.damaged(f"row {key[:16]} is at {row!r:.40} of shard {shard_id!r:.40}, checksum {crc32!r:.40}")
        return Address(key, shard, row, crc32)

    def shards(self) -> list[Shard]:
        """Return all shards, in the order in which they were added."""
        with self._lock:
            self._shards = self._read_shards()
            return list(self._shards.values())

    def rows_of(self, shard: Shard) -> Iterator[Address]:
        """Yield the rows of a shard, no two at one place, in their order. Others may change the index meanwhile."""
        start = 0
        while True:
            rows = self._query(
                "SELECT key, shard, row, crc32 FROM rows WHERE shard = ? AND row >= ? ORDER BY row LIMIT ?",
                (shard.id, start, _ROWS_PER_QUERY),
            )
            with self._lock:
                addresses = [self._address(*row) for row in rows]
            for address in addresses:
                if address.shard.id != shard.id or address.row < start:
                    raise self.damaged(f"its rows of {shard.file} are not in order")
                start = address.row + 1
                yield address
            if len(rows) < _ROWS_PER_QUERY:
                return

    def find(self, keys: Sequence[str]) -> dict[str, Address]:
        """Return the addresses of the keys that have a row."""
        with self._lock:
            rows = self._lookup("SELECT key, shard, row, crc32 FROM rows WHERE key", keys)
            return {row[0]: self._address(*row) for row in rows}

    def _lookup(self, statement: str, values: Sequence[str]) -> Iterator[tuple]:
        """Yield the rows of a statement that ends in the column whose value is one of `values`."""
        for start in range(0, len(values), _VALUES_PER_QUERY):
            part = values[start : start + _VALUES_PER_QUERY]
            yield from self._query(f"{statement} IN ({','.join('?' * len(part))})", part)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the index's write lock, which also guards the ends of the shards; commit on exit, roll back on error."""
        with self._lock:
            self._query("BEGIN IMMEDIATE")
            try:
                yield
                self._query("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def open_shard(self, kind: str, shape: tuple[int, ...], dtype: str) -> Shard:
        """Return a shard with room for another row, adding one if needed. Call it in a transaction."""
        shards = [s for s in self._read_shards().values() if (s.kind, s.shape, s.dtype) == (kind, shape, dtype)]
        if shards and shards[-1].num_rows < shards[-1].max_rows:
            return shards[-1]
        shard = Shard(0, kind, shape, dtype, len(shards), 0)
        self._query(
            "INSERT INTO shards (file, kind, shape, dtype, num_rows) VALUES (?, ?, ?, ?, 0)",
            (shard.file, kind, shape_text(shape), dtype),
        )
        (shard_id,) = self._query("SELECT id FROM shards WHERE file = ?", (shard.file,))[0]
        return Shard(shard_id, kind, shape, dtype, len(shards), 0)

    def add_rows(self, shard: Shard, keys: Sequence[str], crc32s: Sequence[int]) -> None:
        """Add rows that were written behind the last one of a shard. Call it in the transaction that wrote them."""
        start = shard.num_rows
        rows = [(key, shard.id, start + i, crc32) for i, (key, crc32) in enumerate(zip(keys, crc32s, strict=True))]
        with self._lock, self._naming_damage():
            self._connection.executemany("INSERT INTO rows (key, shard, row, crc32) VALUES (?, ?, ?, ?)", rows)
        self._query("UPDATE shards SET num_rows = ? WHERE id = ?", (start + len(rows), shard.id))

    def remove(self, addresses: Iterable[Address]) -> None:
        """Remove rows, except those that were stored anew at another place since they were looked up."""
        with self.transaction(), self._naming_damage():
            self._connection.executemany(
                "DELETE FROM rows WHERE key = ? AND shard = ? AND row = ?",
                ((address.key, address.shard.id, address.row) for address in addresses),
            )

    def move(self, moves: Sequence[tuple[Address, Shard, int]]) -> None:
        """Name a new place, (shard, row), of rows that were copied there. Call it in a transaction."""
        with self._lock, self._naming_damage():
            self._connection.executemany(
                "UPDATE rows SET shard = ?, row = ? WHERE key = ?",
                [(shard.id, row, address.key) for address, shard, row in moves],
            )

    def shorten(self, shard: Shard, num_rows: int) -> None:
        """Give up the places of a shard from num_rows on, and the shard if that is 0; it is the last of its form."""
        with self.transaction():
            if num_rows:
                self._query("UPDATE shards SET num_rows = ? WHERE id = ?", (num_rows, shard.id))
            else:
                self._query("DELETE FROM shards WHERE id = ?", (shard.id,))
        with self._lock:
            self._shards = self._read_shards()

    def forget_photos(self, files: Collection[str]) -> None:
        """Drop what `note_photos` stored of all files but these."""
        with self.transaction(), self._naming_damage():
            noted = [file for (file,) in self._connection.execute("SELECT file FROM photos")]
            self._connection.executemany("DELETE FROM photos WHERE file = ?", [(f,) for f in noted if f not in files])

    def give_back(self) -> None:
        """Write the index anew without its free pages, if they are a quarter of it. The caller alone uses the index.

        The new file replaces the old one in one step: SQLite's own way shortens the file within a transaction, and
        `_check_journal` refuses the journal of one that was killed meanwhile.
        """
        temporary = self.path.with_name(f".{INDEX_NAME}.tmp")
        temporary.unlink(missing_ok=True)
        (num_free,), (num_pages,) = self._query("PRAGMA freelist_count")[0], self._query("PRAGMA page_count")[0]
        if 4 * num_free < num_pages:
            return
        with self._lock, self._naming_damage():
            self._connection.execute("VACUUM INTO ?", (str(temporary),))
            self._connection.close()
            sync_file(temporary)
            os.replace(temporary, self.path)
            sync_folder(self.path.parent)
            self._connect()

    def seen_photos(self, files: Sequence[str]) -> dict[str, tuple[str, int, int]]:
        """Return what `note_photos` stored of these files. The values may be of any type: they are only compared."""
        photos = self._lookup("SELECT file, sha256, size, mtime_ns FROM photos WHERE file", files)
        return {file: (sha256, size, mtime_ns) for file, sha256, size, mtime_ns in photos}

    def note_photos(self, photos: dict[str, tuple[str, int, int]]) -> None:
        """Store each photo file's (SHA-256, size in bytes, mtime in ns). Does nothing if the index is read-only."""
        # a file that claims to be of a year after 2262 is read anew at each start
        rows = [(file, *seen) for file, seen in photos.items() if abs(seen[2]) < 2**63]
        try:
            with self.transaction(), self._naming_damage():
                self._connection.executemany(
                    "INSERT OR REPLACE INTO photos (file, sha256, size, mtime_ns) VALUES (?, ?, ?, ?)", rows
                )
        except sqlite3.OperationalError:
            # training from a complete cache on a read-only disk is fine; its photos are read again at each start
            pass
