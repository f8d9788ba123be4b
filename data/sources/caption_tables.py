"""The caption tables of a source, in each folder and those above it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safelight.data.sources.arrow import ArrowFile
from safelight.data.sources.caption import MAX_LISTED_ROWS, Rejection
from safelight.data.sources.entry import Entry, entry_of
from safelight.data.sources.listing import TABLE_NAMES, suffix_of
from safelight.data.sources.source_tree import SourceTree
from safelight.data.sources.tables import ORIGIN_KEY, csv_rows, in_our_case, json_rows, name_in_row, normal_name
from safelight.errors import UserError
from safelight.text import collapse, shortened, storable

# rows of a million photos
MAX_TABLE_BYTES = 2**28
MAX_TABLE_ROWS = 2_000_000


class CaptionTables:
    """Reads each table of a source once, when it is first needed."""

    def __init__(self, tree: SourceTree):
        self._tree = tree
        # of each folder, the tables in it and in the folders above it, nearest first
        self._known: dict[Path, list[tuple[Path, dict[str, Entry]]]] = {}

    def entries_of(self, photo: Path) -> list[Entry]:
        """Return what the tables say of a photo, the nearest first."""
        tables = self._for_folder(photo.parent)
        named = [table.get(storable(photo.relative_to(place).as_posix())) for place, table in tables]
        return [entry for entry in named if entry is not None]

    def _for_folder(self, folder: Path) -> list[tuple[Path, dict[str, Entry]]]:
        """Return the tables in a folder and in those above it, up to the root, each with its captions by file name."""
        for current in self._tree.from_known(folder, self._known):
            names = sorted(
                self._tree.listing_or_empty(current).tables, key=lambda name: TABLE_NAMES.index(name.lower())
            )
            own = [(current, self._read_table(current / name)) for name in names]
            if current in self._tree.packed:
                own.append((current, self._tree.packed[current].entries))
            above = self._known[current.parent] if current != self._tree.root else []
            self._known[current] = [(place, table) for place, table in own if table] + above
        return self._known[folder]

    def _rows(self, path: Path) -> Iterator[tuple[int, dict | UserError]]:
        """Yield (number, row or what is wrong with it) for the rows of a table, as far as it can be read."""
        suffix = suffix_of(path.name)
        if suffix != ".parquet":
            text = self._tree.text(path, MAX_TABLE_BYTES) or ""
            yield from csv_rows(text) if suffix == ".csv" else json_rows(text)
        elif self._tree.is_packed(path.parent):
            self._tree.reject(path, "a Parquet table inside another file, which is not read; write metadata.jsonl")
        elif not self._tree.refuses_link(path):
            try:
                yield from ArrowFile(path, self._tree.arrow).rows()
            except UserError as error:
                self._tree.reject(path, str(error).removeprefix(f"{path} is "))
            except OSError as error:
                self._tree.reject(path, f"cannot be read: {error.strerror}")

    def _read_table(self, path: Path) -> dict[str, Entry]:
        """Return a table's captions by the names of existing files, relative to its folder."""
        entries: dict[str, Entry] = {}
        shown = storable(str(path))
        num_bad = 0
        for number, row in self._rows(path):
            if number > MAX_TABLE_ROWS:
                reason = f"the rows from this one on, as a table may have {MAX_TABLE_ROWS:,}; split it by folder"
                self._tree.rejections.append(Rejection(f"{shown}:{number}", reason, "row"))
                break
            try:
                if isinstance(row, UserError):
                    raise row
                row = dict(zip(in_our_case(row), row.values(), strict=True))
                found = self._name_in(row, path)
                entry = entry_of(row, _source_of(row, path.name))
                if not entry.says_something:
                    raise UserError("it has neither 'text' nor 'caption'")
                if found in entries:
                    raise UserError(f"it is a second row for {shortened(found)}; give one row a list of texts instead")
                entries[found] = entry
            except UserError as error:
                num_bad += 1
                if num_bad <= MAX_LISTED_ROWS:
                    self._tree.rejections.append(Rejection(f"{shown}:{number}", storable(str(error)), "row"))
        num_more = num_bad - MAX_LISTED_ROWS
        if num_more > 0:
            reason = f"{num_more:,} more rows that cannot be used; only the first {MAX_LISTED_ROWS:,} are listed"
            self._tree.rejections.append(Rejection(shown, reason, "row", num_more))
        return entries

    def _name_in(self, row: dict, table: Path) -> str:
        """Return the name of a row's photo, relative to its table's folder. Raises UserError if there is none."""
        written = name_in_row(row)
        # with backslashes as in the table, then as Windows means them
        names = dict.fromkeys((written, written.replace("\\", "/")))
        found = next(filter(None, (self._tree.find(table.parent, normal_name(n, table.parent)) for n in names)), None)
        if found is None:
            raise UserError(f"it names {shortened(written)}, which does not exist")
        return found


def _source_of(row: dict, table: str) -> str:
    origin = row.get(ORIGIN_KEY)
    return f"{table}: {collapse(origin)}" if isinstance(origin, str) and origin.strip() else table
