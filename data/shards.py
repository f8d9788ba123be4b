"""The cache's files: arrays ("rows") by key, in append-only shards, with an SQLite index (index.py).

    PATH/index.sqlite                              key -> shard, row, crc32
    PATH/shards/latent-4x64x64-float16-0000.bin    rows of 4 x 64 x 64 float16, one after another, nothing else

Only rows in the index exist. A batch is written behind the last indexed row, synced, and only then committed to the
index, so a kill at any moment loses at most that batch: the next append overwrites its bytes. Each process verifies a
row's checksum when it first reads it. `drop_damaged` does so before training, in one pass over the rows a run needs,
and removes damaged rows from the index so that they are encoded again.

Rows are read by system calls, not through a memory map: reading a map past the end of a file that was cut meanwhile
kills the process with SIGBUS, while a read just returns fewer bytes.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from safelight.data.atomic import naming, sync_folder
from safelight.data.compaction import compact
from safelight.data.index import (
    FLOAT_DTYPES,
    INDEX_NAME,
    KINDS,
    MAX_SHARD_BYTES,
    TOKENS,
    Address,
    Index,
    Shard,
    row_dtype,
    shape_text,
)
from safelight.data.lock import FolderLock
from safelight.errors import UserError
from safelight.untrusted import UnsafeFile, check_links, open_regular, open_to_write

SHARDS_FOLDER = "shards"
# systems allow 256 open files and more in a process
MAX_OPEN_SHARDS = 128
# how many neighbouring rows one of several processes checks before the next one's turn
ROWS_OF_CHECKER = 16


class CorruptRow(UserError):
    """A stored row that is damaged. shard: the name of its file. key: the row's key. reason: what follows the name."""

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(
            f"cache row {key[:16]} in {SHARDS_FOLDER}/{shard} {reason}; "
            "`safelight cache` or `safelight train --resume` encodes it again"
        )
        self.shard, self.key, self.reason = shard, key, reason


class Cache:
    """A folder of rows by key, created if it does not exist. Several threads and processes may read it at once.

    dtype: of appended rows of floats as stored, float16 or float32. exclusive: nobody else may have the cache open, nor
    open it until it is closed. Raises ValueError for another dtype, and UserError for a link in the folder that leads
    out of it, for an index that is damaged or of another version, and if another process excludes this one.
    """

    def __init__(self, path: Path, dtype: str = "float16", exclusive: bool = False):
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"cache dtype {dtype!r} is not known; use one of {', '.join(FLOAT_DTYPES)}")
        self.path, self.dtype = Path(path), dtype
        self._shards_path = self.path / SHARDS_FOLDER
        # guards what follows
        self._lock = threading.RLock()
        self._files: dict[str, FileIO] = {}
        # id of a shard -> a byte for each of its rows: whether its checksum was verified. A million rows are a megabyte
        self._checked: dict[int, bytearray] = {}
        self.num_dropped = 0
        # number of this process among those that share the work of `drop_damaged` in this folder, and how many they are
        self.checker, self.num_checkers = 0, 1
        check_links(self.path)
        try:
            self._shards_path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self._shards_path} is not a folder; delete the cache folder {self.path}") from None
        self._use = FolderLock(
            self.path,
            "make it writable, or copy the dataset elsewhere",
            "wait until it has finished, then run this again",
            shared=not exclusive,
        )
        try:
            if exclusive and self._use.note:
                raise UserError(f"{self._use.note}; rows are deleted only where locks show that nobody reads them")
            self._index = Index(self.path)
        except BaseException:
            self._use.release()
            raise

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Release the index, the open files and the folder."""
        self._close_files()
        self._index.close()
        self._use.release()

    def __len__(self) -> int:
        return len(self._index)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys that have no row yet, in order, each once."""
        unique = list(dict.fromkeys(keys))
        present = self._index.find(unique)
        return [key for key in unique if key not in present]

    def _write_rows(self, file: str, offset: int, rows: np.ndarray) -> None:
        """Write rows at a byte offset of a shard and sync it, dropping what follows: an append never committed."""
        path = self._shards_path / file
        is_new = not path.exists()
        with naming(path), open_to_write(path) as stream:
            stream.seek(offset)
            stream.write(rows.data)
            stream.truncate()
            stream.flush()
            os.fsync(stream.fileno())
        if is_new:
            sync_folder(self._shards_path)
            # of a file that was deleted meanwhile
            self._close_files()

    def append(self, kind: str, keys: Sequence[str], array: np.ndarray) -> int:
        """Store array[i] under keys[i], leaving existing rows unchanged, and return how many rows were added.

        kind: "posterior" (mean and logvar stacked), "latent" (mean alone), "text", "mask" or "tokens". array: (N, ...)
        of up to 4 dimensions beside N; floats, converted to the cache's dtype, or token ids. If the process is killed
        meanwhile, either all rows are added or none. Raises ValueError for an unknown kind, different lengths, an empty
        row shape, rows larger than a shard, and values that are not finite in the stored dtype.
        """
        if kind not in KINDS:
            raise ValueError(f"cache kind {kind!r} is not known; use one of {', '.join(KINDS)}")
        if len(keys) != len(array) or not 2 <= array.ndim <= 5 or 0 in array.shape[1:]:
            raise ValueError(f"{len(keys)} keys do not match an array of shape {array.shape}; pass one key per row")
        dtype = row_dtype(kind, self.dtype)
        if kind == TOKENS and array.dtype.kind != "i":
            raise ValueError(f"token ids are never {array.dtype}")
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<"))
        if not np.isfinite(array).all():
            fix = "get another" if self.dtype == "float32" else "set data.cache_dtype to float32, or get another"
            model = "text encoder" if kind == "text" else "autoencoder"
            raise UserError(f"the {model} returned values that are not finite in {self.dtype}; {fix} {model}")
        if array[:1].nbytes > MAX_SHARD_BYTES:
            raise ValueError(f"a row of shape {array.shape[1:]} is larger than a shard, {MAX_SHARD_BYTES:,} bytes")
        num_added = 0
        with self._index.transaction():
            # looked up under the lock: another process may have added some meanwhile
            missing = set(self.missing(keys))
            order = [i for i, key in enumerate(keys) if key in missing and not missing.discard(key)]
            while num_added < len(order):
                shard = self._index.open_shard(kind, array.shape[1:], dtype)
                part = order[num_added : num_added + shard.max_rows - shard.num_rows]
                rows = array[part]
                self._write_rows(shard.file, shard.num_rows * shard.row_bytes, rows)
                self._index.add_rows(shard, [keys[i] for i in part], [zlib.crc32(row.data) for row in rows])
                num_added += len(part)
        return num_added

    def _file(self, shard: Shard) -> FileIO:
        """Return a shard's file, opened for reading. Call it under the lock, which other threads' reads hold too."""
        file = self._files.get(shard.file)
        if file is None:
            path = self._shards_path / shard.file
            try:
                file = open_regular(path, follow_links=False).detach()
            except UnsafeFile as error:
                raise UserError(f"the cache is damaged: {error}; delete the cache folder {self.path}") from None
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard.file] = file
        return file

    def _close_files(self) -> None:
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _read_into(self, buffers: np.ndarray, addresses: Sequence[Address], is_new_check: bool = False) -> None:
        """Fill each buffer, (num, bytes of a row) uint8, with a row.

        is_new_check: verify the checksums even of rows that were verified before. Raises CorruptRow if its file is cut
        or missing, its checksum differs, or a value is not finite.
        """
        with self._lock, naming(self._shards_path):
            for buffer, address in zip(buffers, addresses, strict=True):
                shard = address.shard
                try:
                    file = self._file(shard)
                except FileNotFoundError:
                    raise CorruptRow(shard.file, address.key, "has lost its file") from None
                file.seek(address.row * shard.row_bytes)
                num_read = 0
                while num_read < len(buffer):
                    part = file.readinto(buffer[num_read:])
                    if not part:
                        raise CorruptRow(shard.file, address.key, "is past the end of its file")
                    num_read += part
                checked = self._checked_rows(address)
                if is_new_check or not checked[address.row]:
                    checked[address.row] = False
                    if zlib.crc32(buffer) != address.crc32:
                        raise CorruptRow(shard.file, address.key, "does not match its checksum")
                    # whose checksum anybody can compute
                    if not np.isfinite(buffer.view(np.dtype(shard.dtype).newbyteorder("<"))).all():
                        raise CorruptRow(shard.file, address.key, "has values that are not finite")
                    checked[address.row] = True

    def _checked_rows(self, address: Address) -> bytearray:
        """Return which rows of an address's shard were verified, with a byte for the address's."""
        checked = self._checked.setdefault(address.shard.id, bytearray())
        if len(checked) <= address.row:
            checked.extend(bytes(address.row + 1 - len(checked)))
        return checked

    def _require(self, keys: Sequence[str]) -> list[Address]:
        """Return the address of each key. Raises UserError if one is missing."""
        addresses = self._index.find(list(dict.fromkeys(keys)))
        for key in keys:
            if key not in addresses:
                raise UserError(f"cache {self.path} has no row {key[:16]}; run `safelight cache` first")
        return [addresses[key] for key in keys]

    def kind_of(self, key: str) -> str:
        """Return the kind of a row. Raises UserError if it is missing."""
        return self._require([key])[0].shard.kind

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """Return the rows stacked, (len(keys), ...), in their stored dtype.

        Verifies a row's checksum the first time it is read. Raises CorruptRow for a damaged row, and ValueError for a
        missing one, for no keys, and for rows of different shapes or dtypes.
        """
        addresses = self._require(keys)
        forms = {(address.shard.shape, address.shard.dtype) for address in addresses}
        if len(forms) != 1:
            raise ValueError(
                f"rows read together must have one shape and dtype, not {sorted(forms)}; read each bucket separately"
            )
        shard = addresses[0].shard
        buffers = np.empty((len(addresses), shard.row_bytes), np.uint8)
        self._read_into(buffers, addresses)
        return buffers.view(np.dtype(shard.dtype).newbyteorder("<")).reshape(-1, *shard.shape)

    def drop_damaged(self, keys: Sequence[str], kind: str, shape: Sequence[int]) -> list[CorruptRow]:
        """Remove the damaged ones among these rows from the index and return an error for each.

        Reads every row, in the order of the shards; one of several checkers reads its share of them. kind, shape: what
        the rows must be, in the dtype of their kind; any other row counts as damaged. `num_dropped` adds up the removed
        rows of all calls.
        """
        # opened anew: a file may have been replaced since
        self._close_files()
        bad: dict[Address, CorruptRow] = {}
        dtype = row_dtype(kind, self.dtype)
        buffer = np.empty((1, math.prod(shape) * np.dtype(dtype).itemsize), np.uint8)
        for address in sorted(self._index.find(list(dict.fromkeys(keys))).values(), key=lambda a: (a.shard.id, a.row)):
            shard = address.shard
            # shared out by the place in the shard: dropping rows, which others do meanwhile, does not change it
            if (address.row // ROWS_OF_CHECKER + shard.id) % self.num_checkers != self.checker:
                continue
            try:
                if (shard.kind, shard.shape, shard.dtype) != (kind, tuple(shape), dtype):
                    expected = f"{kind} {shape_text(shape)} {dtype}"
                    raise CorruptRow(shard.file, address.key, f"is not {expected}")
                self._read_into(buffer, [address], is_new_check=True)
            except CorruptRow as error:
                bad[address] = error
        if bad:
            self._index.remove(bad)
        self.num_dropped += len(bad)
        return list(bad.values())

    def addresses(self) -> Iterator[Address]:
        """Yield where every row is stored, in the order of the shards. Raises UserError if the index is damaged."""
        self._index.check_places()
        for shard in self._index.shards():
            yield from self._index.rows_of(shard)

    def read_at(self, address: Address) -> np.ndarray:
        """Return the row at an address, its checksum verified. Raises CorruptRow."""
        shard = address.shard
        buffer = np.empty((1, shard.row_bytes), np.uint8)
        self._read_into(buffer, [address], is_new_check=True)
        return buffer.view(np.dtype(shard.dtype).newbyteorder("<")).reshape(shard.shape)

    def num_bytes(self) -> int:
        """Return what the index and the shards take on the disk."""
        return self.index_bytes() + sum(path.stat().st_size for path in self._shards_path.iterdir())

    def index_bytes(self) -> int:
        """Return what the index takes on the disk."""
        return (self.path / INDEX_NAME).stat().st_size

    def shards(self) -> list[Shard]:
        """Return all shards, in the order in which they were added."""
        return self._index.shards()

    def delete(self, addresses: Iterable[Address], keep_photos: Collection[str]) -> None:
        """Delete rows and what is noted of all photos but these, and give the space back to the disk.

        For a cache that was opened exclusively. Killed at any moment, it leaves every other row in the cache; the next
        call gives the rest of the space back, even if it deletes nothing.
        """
        self._index.remove(addresses)
        self._index.forget_photos(keep_photos)
        self._close_files()
        self._checked.clear()
        compact(self._index, self._shards_path)
        self._index.give_back()

    def seen_photos(self, files: Sequence[str]) -> dict[str, tuple[str, int, int]]:
        """Return (SHA-256, size in bytes, mtime in ns) of those files that were read before, as they were then."""
        return self._index.seen_photos(files)

    def note_photos(self, photos: dict[str, tuple[str, int, int]]) -> None:
        """Store what `seen_photos` returns. Does nothing if the cache is read-only."""
        self._index.note_photos(photos)
