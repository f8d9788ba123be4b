"""Parquet files and the .arrow files of Hugging Face datasets: tables of captions, with or without pictures in them.

They are read by a process of its own (arrow_child.py) with pyarrow, an optional package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import posixpath
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from safelight.data.sources.caption import MAX_LISTED_ROWS, Rejection
from safelight.data.sources.entry import KEYS, TEXT_KEYS, Entry, entry_of
from safelight.data.sources.tables import in_our_case
from safelight.errors import UserError
from safelight.text import collapse, counted, shortened, storable
from safelight.untrusted import UnsafeFile, check_regular, parse_json

NEEDS_PYARROW = "needs pyarrow to be read: run `pip install pyarrow`"
MAX_ROWS = 2_000_000
# an answer in JSON: escaped, a character takes up to 12 bytes
MAX_LINE_BYTES = 2**24
MAX_PICTURE_BYTES = 2**30
# the process may be swapped out, and a group of rows may have to be decompressed
MAX_SECONDS = 120
ENDED = "damaged: pyarrow did not survive reading it"
# the datasets library's column of classes, by their numbers
_LABEL = "label"
# WebDataset's column of captions, where no other has them
_TXT = "txt"
_USED = ("file_name", "caption_source", _LABEL, *KEYS)


class ArrowProcess:
    """The process that reads such files: started when it is first asked, and again after it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._buffer = bytearray()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def ask(self, path: Path, **request: object) -> tuple[dict, bytes]:
        """Return (the answer about a file, the bytes that follow it). Raises UserError with what is wrong with it."""
        with self._lock:
            self._send(path, request)
            answer = self._answer()
            num_bytes = answer.get("num_bytes")
            if not isinstance(num_bytes, int):
                return answer, b""
            if not 0 <= num_bytes <= MAX_PICTURE_BYTES:
                self._end()
                raise UnsafeFile(f"it has a picture of {num_bytes:,} bytes (limit {MAX_PICTURE_BYTES:,})")
            return answer, self._read(num_bytes)

    def ask_rows(self, path: Path, **request: object) -> Iterator[dict]:
        """Yield what is said of each row of a file. Raises UserError where the file is damaged."""
        with self._lock:
            is_all = False
            try:
                self._send(path, {"do": "rows", **request})
                while "end" not in (answer := self._answer()):
                    yield answer
                is_all = True
            finally:
                # rows that nobody reads would be taken for the next answer
                if not is_all:
                    self._end()

    def _send(self, path: Path, request: dict) -> None:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps({"path": os.fsencode(path).hex(), **request}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._end()
            raise UnsafeFile(ENDED) from None

    def _start(self) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(NEEDS_PYARROW)
        if importlib.util.find_spec("resource") is None:
            raise UserError("not read on this system, which cannot limit a process's memory: use Linux or macOS")
        self._process = subprocess.Popen(
            # -P: the current folder, which may be the one with the photographs, is no place for modules
            [sys.executable, "-P", "-m", "safelight.data.sources.arrow_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ
            | {
                # as this process has it
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                # its other allocators reserve memory, which counts towards the limit
                "ARROW_DEFAULT_MEMORY_POOL": "system",
            },
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None
        self._buffer.clear()

    def _answer(self) -> dict:
        line = self._read(None)
        try:
            answer = parse_json(line, allow_nan=True)
        except UnsafeFile as error:
            self._end()
            raise UnsafeFile(f"damaged: {error}") from None
        if not isinstance(answer, dict):
            self._end()
            raise UnsafeFile(ENDED)
        if "error" in answer:
            raise UnsafeFile(f"damaged, or in a form that is not read: {answer['error']}")
        return answer

    def _read(self, num_bytes: int | None) -> bytes:
        """Return the next bytes of the answer, a line if their number is None."""
        deadline = time.monotonic() + MAX_SECONDS
        searched = 0
        while True:
            if num_bytes is None:
                end = self._buffer.find(b"\n", searched) + 1
                searched = len(self._buffer)
            else:
                end = num_bytes if len(self._buffer) >= num_bytes else 0
            if end or num_bytes == 0:
                content = bytes(self._buffer[:end])
                del self._buffer[:end]
                return content
            pipe = self._process.stdout
            is_late = not select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]
            content = b"" if is_late else os.read(pipe.fileno(), 2**20)
            if not content or (num_bytes is None and len(self._buffer) > MAX_LINE_BYTES):
                self._end()
                raise UnsafeFile(f"damaged: pyarrow read for {MAX_SECONDS} seconds" if is_late else ENDED)
            self._buffer += content


class ArrowFile:
    """A Parquet or .arrow file: rows that say something of pictures, and may hold them; see `Packed`.

    A picture is named by its row, with the file name that the row gives it. Raises UserError if the file cannot be
    read, or pyarrow is missing; OSErrors as open does.
    """

    def __init__(self, path: Path, process: ArrowProcess):
        check_regular(path)
        self.path, self._process = path, process
        self.rejections: list[Rejection] = []
        self.entries: dict[str, Entry] = {}
        self.is_complete = True
        self._rows: dict[str, int] = {}
        answer, _ = process.ask(path, do="open")
        written = [name for name, _ in answer["columns"]]
        self._columns = in_our_case(written)
        # a picture is a struct with the binary child bytes: another kind of struct shows why it is none
        kinds = zip(self._columns, (kind for _, kind in answer["columns"]), strict=True)
        self._shown = [f"{name} ({kind})" if kind.startswith("struct<") else name for name, kind in kinds]
        # of each column, how we call it
        self._name_of_column = dict(zip(written, self._columns, strict=True))
        self._text_is_txt = _TXT in self._columns and not any(key in self._columns for key in TEXT_KEYS)
        self._picture = answer["picture"]
        self._classes = _class_names(answer["features"])

    @property
    def folders(self) -> dict[str, tuple[list[str], list[str]]]:
        """The pictures, all in one folder."""
        return {"": ([], list(self._rows))}

    def read_pictures(self) -> None:
        """Read what the rows say of their pictures. Raises UserError if there are none."""
        if self._picture is None:
            raise UserError(
                f"a table without pictures (its columns: {shortened(', '.join(self._shown))}); if it has captions of "
                "files, name it metadata.parquet"
            )
        source = f"{self.path.suffix.lower()} column"
        num_bad, first = 0, ""
        try:
            for number, row, path in self._read_rows():
                name = self._name(number, path)
                self._rows[name] = number
                try:
                    entry = entry_of(self._with_class(row), source)
                    if entry.says_something:
                        self.entries[name] = entry
                except UserError as error:
                    num_bad += 1
                    first = first or f"row {number + 1}: {error}"
                    if num_bad <= MAX_LISTED_ROWS:
                        self._reject(f"{self.path}:{number + 1}", str(error), "row")
        except UserError as error:
            self.is_complete = False
            self._reject(self.path, f"{error} (after {len(self._rows):,} rows, which are used)", "other")
        if num_bad > MAX_LISTED_ROWS:
            more = num_bad - MAX_LISTED_ROWS
            self._reject(self.path, f"{more:,} more rows with captions that cannot be used", "row", more)
        if self._rows and not self.entries:
            self._reject(self.path, f"no captions of it are used: {self._why_nothing_is_said(num_bad, first)}")

    def _why_nothing_is_said(self, num_bad: int, first: str) -> str:
        """Return why no row says anything of its picture. num_bad, first: rows that cannot be used, and what is wrong
        with the first of them."""
        if num_bad:
            return f"{counted(num_bad, 'row')} cannot be used, the first is {first}"
        if texts := [name for name in self._columns if name in TEXT_KEYS or (name == _TXT and self._text_is_txt)]:
            return f"its column {texts[0]} is empty, or holds no texts"
        picture = self._picture.removesuffix(".bytes")
        if others := [name for name in self._columns if name != picture]:
            return f"it has no column text or caption; if {shortened(', '.join(others))} has them, rename it"
        return f"it has no column but {picture}"

    def rows(self) -> Iterator[tuple[int, dict | UserError]]:
        """Yield (number from 1, row) for a table of captions of files. Raises UserError where it is damaged."""
        if "file_name" not in self._columns:
            raise UserError("it has no column file_name")
        for number, row, _ in self._read_rows():
            yield number + 1, row

    def _read_rows(self) -> Iterator[tuple[int, dict, object]]:
        used = (*_USED, _TXT) if self._text_is_txt else _USED
        columns = [column for column, name in self._name_of_column.items() if name in used]
        for number, answer in enumerate(self._process.ask_rows(self.path, columns=columns, picture=self._picture)):
            if number >= MAX_ROWS:
                raise UserError(f"it has more than {MAX_ROWS:,} rows; split it")
            row = answer.get("row")
            row = row if isinstance(row, dict) else {}
            row = {self._name_of_column.get(column, column): value for column, value in row.items() if value != ""}
            if self._text_is_txt and _TXT in row:
                row["text"] = row.pop(_TXT)
            yield number, row, answer.get("path")

    def _name(self, number: int, path: object) -> str:
        name = posixpath.basename(collapse(path).replace("\\", "/"))[:200] if isinstance(path, str) else ""
        # a number alone is no caption, and tells two files of one name apart
        return f"{number:06d}" if not name or name in self._rows or name.startswith(".") else storable(name)

    def _with_class(self, row: dict) -> dict:
        """Return the row with the name of its class as its text, if it has no other."""
        label = row.pop(_LABEL, None)
        if isinstance(label, int) and 0 <= label < len(self._classes) and not any(key in row for key in TEXT_KEYS):
            row["text"] = self._classes[label]
        return row

    def _reject(self, path: object, reason: str, kind: str = "caption", num: int = 1) -> None:
        self.rejections.append(Rejection(storable(str(path)), storable(reason), kind, num))

    def size_of(self, name: str) -> int:
        """Return 0: the size is not known before it is read."""
        return 0

    def read(self, name: str) -> bytes:
        answer, content = self._process.ask(self.path, do="picture", row=self._rows[name], picture=self._picture)
        if answer["num_bytes"] is None:
            raise UserError("the row holds no picture")
        return content


def _class_names(features: object) -> list[str]:
    """Return the names of the classes in the datasets library's record of its columns, [] if there are none."""
    try:
        label = parse_json(features)["info"]["features"][_LABEL]
        names = label["names"] if label["_type"] == "ClassLabel" else []
    except (UserError, KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
