"""Find a photo's captions: in a sidecar file, in a Hugging Face imagefolder table (metadata.jsonl), or in its name."""

from __future__ import annotations

import os
import posixpath
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from safelight.data.photo import NO_CREDIT, Credit
from safelight.data.sources.caption import FILE_NAME, Caption, Rejection, caption_of_name
from safelight.data.sources.encodings import decode_text
from safelight.data.sources.listing import NO_PICTURE, TABLE_NAMES, Listing, list_folder, stem_of, suffix_of
from safelight.errors import UserError
from safelight.text import collapse, printable, shortened, storable
from safelight.untrusted import UnsafeFile, is_link_out, open_regular, parse_json

TEXT_KEYS = ("text", "caption")
# text encoders read at most a few hundred words; a larger file beside a photo is something else, such as a log
MAX_SIDECAR_BYTES = 2**20
# rows of a million photos
MAX_TABLE_BYTES = 2**28
MAX_TABLE_ROWS = 2_000_000
# the captions of one photo, as in a sidecar
MAX_ROW_CHARACTERS = 2**20
# of each table; of further ones only the number is kept
MAX_LISTED_ROWS = 1000


def _row(line: str) -> dict:
    """Return a table's row. Raises UserError with what is wrong with the line."""
    try:
        row = parse_json(line)
    except UnsafeFile as error:
        raise UserError(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"is a {type(row).__name__}, not an object")
    return row


def _row_texts(row: dict) -> tuple[str, ...]:
    """Return the caption variants of a table row. Raises UserError if it has none."""
    value = next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None)
    if value is None:
        raise UserError("has neither 'text' nor 'caption'")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"its text {reprlib.repr(value)} is neither a string nor a list of strings")
    # repeats are removed, or training would draw them more often; a dict keeps the order
    texts = tuple(dict.fromkeys(collapse(text) for text in texts if text.strip()))
    if not texts and isinstance(row.get("credit"), dict):
        # it says whose the photo is, and that nobody has captioned it
        return ("",)
    if not texts:
        raise UserError("its text is empty")
    return texts


def _row_credit(row: dict) -> Credit:
    """Return whose photo a row describes: our own form, a name, or the address of a page. Others are left aside."""
    credit = row.get("credit")
    if isinstance(credit, str):
        is_page = credit.startswith(("http://", "https://"))
        credit = {"page" if is_page else "photographer": credit}
    given = credit if isinstance(credit, dict) else {}
    texts = {field.name: given.get(field.name) for field in fields(Credit)}
    return Credit(**{name: collapse(text) for name, text in texts.items() if isinstance(text, str)})


def _row_name(row: dict) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise UserError("has no 'file_name'")
    return name


def _normal_name(name: str, folder: Path) -> str:
    """Return a file name normalized, relative to its table's folder. Raises UserError if it leads out of it."""
    normal = posixpath.normpath(storable(os.path.expanduser(name) if name.startswith("~/") else name))
    for place in (os.path.abspath(folder), os.path.realpath(folder)):
        normal = normal.removeprefix(f"{place}/")
    if posixpath.isabs(normal) or normal.split("/")[0] == "..":
        raise UserError(f"file_name {shortened(normal)!r} is outside the table's folder")
    return normal


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text, one at a time: a list of them may take 30 times the memory of the text.

    Lines end with a line feed alone. splitlines also splits at U+2028, a character that JSON strings may contain.
    """
    start = 0
    while start <= len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


@dataclass
class CaptionReader:
    """Finds the captions of the photos below one source root.

    rejections, warnings: what it could not use, added as `read` comes across it.
    """

    root: Path
    rejections: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _listings: dict[Path, Listing] = field(default_factory=dict)
    # of each folder, the tables in it and in the folders above it, nearest first
    _tables: dict[Path, list[tuple[Path, dict[str, Caption]]]] = field(default_factory=dict)

    def listing(self, folder: Path) -> Listing:
        """Return what a folder holds; each is read once. Raises OSError if it cannot be read."""
        if folder not in self._listings:
            self._listings[folder] = list_folder(folder)
        return self._listings[folder]

    def leave_out_texts(self, folder: Path) -> None:
        """List the captions of no photo and the tables of other forms in a folder that `listing` has read."""
        listing = self._listings[folder]
        for name in listing.unclaimed:
            reason = f"a text that belongs to no photograph: no picture in its folder is named {stem_of(name)}"
            self._reject(folder / name, reason)
        for name in listing.unclaimed_masks:
            reason = (
                "the mask of no photograph: its folder has no picture of this name, or it has another mask; if it is a "
                "photograph itself, rename it"
            )
            self._reject(folder / name, reason, "photo")
        for name in listing.others:
            self._reject(folder / name, NO_PICTURE[suffix_of(name)], "other")

    def _reject(self, path: Path, reason: str, kind: str = "caption") -> None:
        self.rejections.append(Rejection(storable(str(path)), storable(reason), kind))

    def read(self, photo: Path) -> Caption:
        """Return the captions of a photo at or below the root.

        The first of these wins: NAME.jpg.txt; NAME.txt; NAME.jpg.caption; NAME.caption; metadata.jsonl or
        captions.jsonl in the photo's folder, then in each folder above it up to the root; the file name. A name that is
        equal wins over one that differs in letter case or accents. An empty sidecar is skipped with a warning. A table
        says whose the photo is, also where a sidecar captions it.
        """
        tables = self._tables_for(photo.parent)
        rows = (table.get(storable(photo.relative_to(folder).as_posix())) for folder, table in tables)
        row = next(filter(None, rows), None)
        for name in self._listing_or_empty(photo.parent).sidecars.get(photo.name, ()):
            sidecar = photo.with_name(name)
            text = self._text(sidecar, MAX_SIDECAR_BYTES)
            if text is not None and collapse(text):
                source = f"sidecar {suffix_of(name)}"
                return Caption((collapse(text),), source, credit=row.credit if row else NO_CREDIT)
            if text is not None:
                self.warnings.append(f"{printable(sidecar)} is empty and was ignored")
        if row is not None:
            return row
        text = caption_of_name(photo.stem)
        if not text:
            self.warnings.append(
                f"{printable(photo)} has no caption, not even in its file name; it will be trained on with an empty one"
            )
        return Caption((text,), FILE_NAME)

    def mask_of(self, photo: Path) -> Path | None:
        """Return the loss mask that stands beside a photo, None if it has none."""
        name = self._listing_or_empty(photo.parent).masks.get(photo.name)
        return None if name is None else photo.with_name(name)

    def is_mask(self, path: Path) -> bool:
        """Return whether a picture is the loss mask of another one beside it."""
        return path.name in self._listing_or_empty(path.parent).masks.values()

    def _listing_or_empty(self, folder: Path) -> Listing:
        try:
            return self.listing(folder)
        except OSError:
            return self._listings.setdefault(folder, Listing())

    def _tables_for(self, folder: Path) -> list[tuple[Path, dict[str, Caption]]]:
        """Return the tables in a folder and in those above it, up to the root, each with its captions by file name."""
        missing = []
        while folder not in self._tables:
            missing.append(folder)
            if folder == self.root:
                break
            folder = folder.parent
        for current in reversed(missing):
            names = sorted(self._listing_or_empty(current).tables, key=lambda name: TABLE_NAMES.index(name.lower()))
            own = [(current, self._read_table(current / name)) for name in names]
            above = self._tables[current.parent] if current != self.root else []
            self._tables[current] = [(place, table) for place, table in own if table] + above
        return self._tables[missing[0] if missing else folder]

    def _text(self, path: Path, max_bytes: int) -> str | None:
        """Return a file's text, or None if it is too large or cannot be read. Adds a warning or a rejection then."""
        if self.leads_out(path):
            self._reject(path, "a link out of this folder, which is not followed; copy the file it points to")
            return None
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    limit = f"{size:,} bytes are too many for captions (limit {max_bytes:,})"
                    self.warnings.append(f"{printable(path)} was ignored: {limit}")
                    return None
                text, note = decode_text(file.read())
        except UnsafeFile as error:
            self._reject(path, str(error).removeprefix(f"{path} is "))
            return None
        except OSError as error:
            self.warnings.append(f"{printable(path)} cannot be read: {error.strerror}")
            return None
        if note:
            self.warnings.append(f"{printable(path)} {note}")
        return text

    def leads_out(self, path: Path) -> bool:
        """Return whether a file is a link that ends outside of both the source and the folder that it was found in.

        The two differ if that folder is itself below a link, which the user made.
        """
        return is_link_out(path, path.parent) and is_link_out(path, self.root)

    def _find(self, folder: Path, name: str) -> str | None:
        """Return the name of a file below a folder as it is written there, None if there is no such file."""
        *above, last = name.split("/")
        found = folder
        for part in above:
            actual = self._listing_or_empty(found).find(part)
            if actual is None:
                return None
            found = found / actual
        actual = self._listing_or_empty(found).find(last)
        return None if actual is None else storable((found / actual).relative_to(folder).as_posix())

    def _read_table(self, path: Path) -> dict[str, Caption]:
        """Return a table's captions by the names of existing files, relative to its folder."""
        captions: dict[str, Caption] = {}
        shown = storable(str(path))
        num_bad = 0
        for number, line in enumerate(_lines(self._text(path, MAX_TABLE_BYTES) or ""), start=1):
            if number > MAX_TABLE_ROWS:
                reason = f"the rows from this one on, as a table may have {MAX_TABLE_ROWS:,}; split it by folder"
                self.rejections.append(Rejection(f"{shown}:{number}", reason, "row"))
                break
            if not line.strip():
                continue
            try:
                found, caption = self._read_row(line, path)
                if found in captions:
                    raise UserError(f"is a second row for {shortened(found)}; give one row a list of texts instead")
                captions[found] = caption
            except UserError as error:
                num_bad += 1
                if num_bad <= MAX_LISTED_ROWS:
                    self.rejections.append(Rejection(f"{shown}:{number}", storable(f"the row {error}"), "row"))
        num_more = num_bad - MAX_LISTED_ROWS
        if num_more > 0:
            reason = f"{num_more:,} more rows that cannot be used; only the first {MAX_LISTED_ROWS:,} are listed"
            self.rejections.append(Rejection(shown, reason, "row", num_more))
        return captions

    def _read_row(self, line: str, table: Path) -> tuple[str, Caption]:
        """Return (a photo's name relative to its table's folder, its captions). Raises UserError with what is wrong."""
        if len(line) > MAX_ROW_CHARACTERS:
            raise UserError(f"has {len(line):,} characters, too many for captions (limit {MAX_ROW_CHARACTERS:,})")
        row = _row(line)
        written = _row_name(row)
        # with backslashes as in the table, then as Windows means them
        names = dict.fromkeys((written, written.replace("\\", "/")))
        found = next(filter(None, (self._find(table.parent, _normal_name(n, table.parent)) for n in names)), None)
        if found is None:
            raise UserError(f"names {shortened(written)}, which does not exist")
        origin = row.get("caption_source")
        source = f"{table.name}: {collapse(origin)}" if isinstance(origin, str) and origin.strip() else table.name
        captioner = row.get("captioner")
        captioner = collapse(captioner) if isinstance(captioner, str) else ""
        return found, Caption(_row_texts(row), source, credit=_row_credit(row), captioner=captioner)
