"""The rows of caption tables: JSON lines and CSV, in Hugging Face's imagefolder layout."""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path

from safelight.data.sources.entry import KEYS
from safelight.data.sources.tag_text import parse_tags
from safelight.errors import UserError
from safelight.text import shortened, storable
from safelight.untrusted import UnsafeFile, kind_of, parse_json

# the captions of one photo, as in a sidecar
MAX_ROW_CHARACTERS = 2**20
MAX_COLUMNS = 1000
FILE_NAME_KEY, ORIGIN_KEY = "file_name", "caption_source"
_KNOWN_KEYS = frozenset((*KEYS, FILE_NAME_KEY, ORIGIN_KEY))


def in_our_case(names: Iterable[str]) -> list[str]:
    """Return the names of columns, those that we know in lower case, however they are written: File_Name, TEXT.

    A name that is there in lower case as well stays as it is.
    """
    names = list(names)
    taken = set(names)
    return [lower if (lower := name.lower()) in _KNOWN_KEYS and lower not in taken else name for name in names]


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines of a text, one at a time: a list of them may take 30 times the memory of the text.

    Lines end with a line feed alone. splitlines also splits at U+2028, a character that JSON strings may contain.
    """
    start = 0
    while start <= len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


def json_rows(text: str) -> Iterator[tuple[int, dict | UserError]]:
    """Yield (number of the line, its row or what is wrong with it) for each line that is not empty."""
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        try:
            yield number, _json_row(line)
        except UserError as error:
            yield number, error


def _json_row(line: str) -> dict:
    if len(line) > MAX_ROW_CHARACTERS:
        raise UserError(f"it has {len(line):,} characters, too many for captions (limit {MAX_ROW_CHARACTERS:,})")
    try:
        row = parse_json(line)
    except UnsafeFile as error:
        raise UserError(f"it is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"it is {kind_of(row)}, not an object")
    return row


def csv_rows(text: str) -> Iterator[tuple[int, dict | UserError]]:
    """Yield (number of the line where it begins, its row or what is wrong with it) for each row below the header.

    Cells are separated by commas or, as spreadsheets in some languages have it, by semicolons or tabs. Empty cells are
    left out. A cell `tags` is a list such as `animal:1.5, park`.
    """
    header = next(lines_of(text))
    delimiter = max(",;\t", key=header.count)
    # strict: a quote that is never closed is an error, not the rest of the file
    reader = csv.reader((f"{line}\n" for line in lines_of(text)), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # a quote that is not closed is noticed at the next one, at the limit of a cell, or at the end
            is_open = reader.line_num > first
            hint = f", on line {reader.line_num}; a quote that opens here is not closed" if is_open else ""
            yield first, UserError(f"it is not CSV: {error}{hint}")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = in_our_case(cell.strip() for cell in cells)
            if FILE_NAME_KEY not in names or len(names) > MAX_COLUMNS or len(set(names)) < len(names):
                yield 1, UserError("it is no header, which must name each column once, file_name among them")
                return
            continue
        try:
            yield first, _csv_row(names, cells)
        except UserError as error:
            yield first, error


def _csv_row(names: list[str], cells: list[str]) -> dict:
    if len(cells) > len(names):
        raise UserError(f"it has {len(cells):,} cells below {len(names)} names; put quotes around text with commas")
    if sum(map(len, cells)) > MAX_ROW_CHARACTERS:
        raise UserError(f"it has too many characters for captions (limit {MAX_ROW_CHARACTERS:,})")
    row: dict = {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
    if "tags" in row:
        row["tags"] = {tag.name: tag.weight for tag in parse_tags(row["tags"])}
    return row


def name_in_row(row: dict) -> str:
    """Return the file name in a row. Raises UserError if it has none."""
    name = row.get(FILE_NAME_KEY)
    if not isinstance(name, str) or not name.strip():
        raise UserError("it has no 'file_name'")
    return name


def normal_name(name: str, folder: Path) -> str:
    """Return a file name normalized, relative to its table's folder. Raises UserError if it leads out of it."""
    normal = posixpath.normpath(storable(os.path.expanduser(name) if name.startswith("~/") else name))
    for place in (os.path.abspath(folder), os.path.realpath(folder)):
        normal = normal.removeprefix(f"{place}/")
    if posixpath.isabs(normal) or normal.split("/")[0] == "..":
        raise UserError(f"its file_name {shortened(normal)!r} is outside the table's folder")
    return normal
