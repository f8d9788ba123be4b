"""The process that reads Parquet and .arrow files with pyarrow; `arrow.py` starts it and asks it.

pyarrow trusts what it reads: a damaged .arrow file can crash it, and a few bytes of Parquet can stand for any amount of
memory. Here it does neither harm: this process has a memory limit, and its end is one message. Requests are JSON, one a
line; so are the answers, but for pictures, whose bytes follow the line with their number.
"""

from __future__ import annotations

import io
import json
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from safelight.errors import UserError
from safelight.untrusted import open_regular

# beside the pictures of one group of rows, pyarrow itself reserves about 2 GiB of addresses
MAX_MEMORY_BYTES = 2**33
MAX_CHARACTERS = 2**20
# rows that are decoded at once
NUM_ROWS = 256
# columns that hold pictures if they hold bytes; those of the datasets library are recognized by their type
PICTURE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture")
# an .arrow file in the file format, not the stream format, is a stream behind this
FILE_MAGIC = b"ARROW1\0\0"


class Parquet:
    """A Parquet file in its row groups."""

    def __init__(self, file: BinaryIO):
        schema = pq.read_schema(file)
        file.seek(0)
        # a dictionary of texts and pictures is not multiplied out: one value may stand in a million rows
        names = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_binary(f.type)]
        # a child that is not there, or has children, is an error
        names += [name for name in [picture_column(schema)] if name is not None and name.endswith(".bytes")]
        self._file = pq.ParquetFile(file, read_dictionary=names)
        self.schema = schema
        groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
        self.num_rows = [group.num_rows for group in groups]

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(NUM_ROWS, columns=columns, use_threads=False)

    def group(self, number: int, column: str) -> Any:
        """Return a column of a row group. column: of a struct its child as `image.bytes`."""
        return self._file.read_row_group(number, columns=[column], use_threads=False).combine_chunks().column(0)


class Stream:
    """An Arrow stream in its record batches, read one at a time."""

    def __init__(self, file: BinaryIO):
        self._file = pa.PythonFile(file, "r")
        if self._file.read(len(FILE_MAGIC)) != FILE_MAGIC:
            self._file.seek(0)
        self.schema = pa.ipc.read_schema(pa.ipc.read_message(self._file))
        self._places: list[int] = []
        self.num_rows: list[int] = []
        while (batch := self._next()) is not None:
            self.num_rows.append(batch.num_rows)

    def _next(self) -> pa.RecordBatch | None:
        place = self._file.tell()
        try:
            message = pa.ipc.read_message(self._file)
        except EOFError:
            return None
        if message.type != "record batch":
            raise UserError(f"has a {message.type}, which is not read")
        self._places.append(place)
        return pa.ipc.read_record_batch(message, self.schema)

    def _batch(self, number: int) -> pa.RecordBatch:
        self._file.seek(self._places[number])
        return pa.ipc.read_record_batch(pa.ipc.read_message(self._file), self.schema)

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for number in range(len(self._places)):
            batch = self._batch(number)
            for start in range(0, batch.num_rows, NUM_ROWS):
                yield batch.slice(start, NUM_ROWS)

    def group(self, number: int, column: str) -> Any:
        return self._batch(number).column(column.removesuffix(".bytes"))


def picture_column(schema: pa.Schema) -> str | None:
    """Return the column whose bytes are pictures, None if there is none. Of a struct, its child: `image.bytes`."""
    for column in schema:
        kind = column.type
        if not pa.types.is_struct(kind) or min(map(kind.get_field_index, ("bytes", "path"))) < 0:
            continue
        if _is_bytes(kind.field("bytes").type):
            return f"{column.name}.bytes"
    named = [c.name for c in schema if c.name.lower() in PICTURE_NAMES and _is_bytes(c.type)]
    return named[0] if named else None


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def plain(array: pa.Array) -> list:
    """Return the values of texts, numbers, and lists and structs of them; None for other types."""
    array.validate(full=True)
    kind = array.type
    if pa.types.is_dictionary(kind):
        words = plain(array.dictionary)
        return [None if index is None else words[index] for index in array.indices.to_pylist()]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        longest = pc.max(pc.binary_length(array)).as_py() or 0
        if longest > MAX_CHARACTERS:
            raise UserError(f"has a text of {longest:,} bytes, too many for captions (limit {MAX_CHARACTERS:,})")
    is_plain = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_floating(kind)
    is_plain = is_plain or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if is_plain or pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_struct(kind):
        if array.nbytes > 64 * MAX_CHARACTERS:
            raise UserError(f"has {array.nbytes:,} bytes in {len(array)} rows, too many for captions")
        return array.to_pylist()
    return [None] * len(array)


class Server:
    """Answers requests about files, of which it keeps the last one open."""

    def __init__(self, out: BinaryIO):
        self._out = out
        self._path = ""
        self._file: Parquet | Stream | None = None
        # number of a group -> its pictures; the last two, as several threads ask in order
        self._groups: dict[int, Any] = {}

    def answer(self, request: dict) -> None:
        try:
            file = self._opened(request["path"])
            if request["do"] == "open":
                metadata = (file.schema.metadata or {}).get(b"huggingface", b"")[:MAX_CHARACTERS]
                self._say(
                    {
                        "columns": [[column.name, str(column.type)[:100]] for column in file.schema],
                        "picture": picture_column(file.schema),
                        "features": metadata.decode(errors="replace"),
                        "num_rows": sum(file.num_rows),
                    }
                )
            elif request["do"] == "rows":
                self._rows(file, request["columns"], request["picture"])
            else:
                content = self._picture(file, request["row"], request["picture"])
                self._say({"num_bytes": None if content is None else len(content)})
                self._out.write(content or b"")
        # pyarrow raises many kinds, MemoryError among them
        except Exception as error:
            self._groups.clear()
            # a KeyError's text is its key as Python writes it: b'image.bytes'
            key = error.args[0] if isinstance(error, KeyError) and error.args else None
            key = key.decode(errors="replace") if isinstance(key, bytes) else key
            text = key if isinstance(key, str) else str(error)
            self._say({"error": text.partition("\n")[0][:300] or type(error).__name__})
        self._out.flush()

    def _say(self, value: dict) -> None:
        # NaN too, which the reader takes as a number out of range
        self._out.write(json.dumps(value, default=lambda value: None).encode() + b"\n")

    def _opened(self, path: str) -> Parquet | Stream:
        if self._path != path or self._file is None:
            self._groups.clear()
            self._path = ""
            file = open_regular(Path(os.fsdecode(bytes.fromhex(path))))
            is_parquet = file.read(4) == b"PAR1"
            file.seek(0)
            self._file = Parquet(file) if is_parquet else Stream(file)
            self._path = path
        return self._file

    def _rows(self, file: Parquet | Stream, columns: list[str], picture: str | None) -> None:
        """Say the values of some columns of every row, and of its picture the name and whether it has bytes."""
        struct = picture.removesuffix(".bytes") if picture and picture.endswith(".bytes") else None
        wanted = [*columns, *([f"{struct}.path"] if struct else [])]
        if not wanted:
            # pictures of which nothing is said
            for _ in range(sum(file.num_rows)):
                self._say({"row": {}, "path": None})
        for batch in file.batches(wanted) if wanted else ():
            values = {name: plain(batch.column(name)) for name in columns}
            paths = plain(batch.column(struct).field("path")) if struct else [None] * batch.num_rows
            for index in range(batch.num_rows):
                row = {name: column[index] for name, column in values.items()}
                row = {name: value for name, value in row.items() if value is not None}
                self._say({"row": row, "path": paths[index]})
        self._say({"end": True})

    def _picture(self, file: Parquet | Stream, row: int, picture: str) -> bytes | None:
        starts = [0]
        for num in file.num_rows:
            starts.append(starts[-1] + num)
        number = bisect_right(starts, row) - 1
        if number not in self._groups:
            while len(self._groups) > 1:
                del self._groups[next(iter(self._groups))]
            column = file.group(number, picture)
            column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            column.validate(full=True)
            self._groups[number] = column.field("bytes") if pa.types.is_struct(column.type) else column
        value = self._groups[number][row - starts[number]]
        if pa.types.is_dictionary(value.type):
            value = value.value
        content = value.as_py() if value is not None and value.is_valid else None
        if not isinstance(content, bytes | None):
            raise UserError(f"its column {picture} holds {value.type}, not the bytes of pictures")
        return content


def serve() -> None:
    """Answer requests on stdin until it ends."""
    # not on Windows, where the parent starts no such process
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    out = io.BufferedWriter(io.FileIO(os.dup(1), "w"), 2**16)
    # whatever a library prints is no answer
    os.dup2(2, 1)
    server = Server(out)
    for line in sys.stdin.buffer:
        server.answer(json.loads(line))


if __name__ == "__main__":
    serve()
