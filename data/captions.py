"""What a photo shows, in words: sidecar files, Hugging Face imagefolder tables, or the file's name."""

from __future__ import annotations

import codecs
import json
import os
import posixpath
import re
import reprlib
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from safelight.data.text import printable, storable
from safelight.errors import UserError

SIDECAR_SUFFIXES = (".txt", ".caption")
TABLE_NAMES = ("metadata.jsonl", "captions.jsonl")
TEXT_KEYS = ("text", "caption")
# no encoder reads more than some hundred words: a longer file beside a photo is something else, a log or a book
MAX_SIDECAR_BYTES = 2**20


@dataclass(frozen=True)
class Caption:
    """texts: one or more variants. source: what they were read from, for a reader."""

    texts: tuple[str, ...]
    source: str


# the source of a caption that nobody wrote
FILE_NAME = "file name"


# what cameras, phones and programs call a picture, and a number
_NO_WORDS = re.compile(
    r"(img|dsc[nf]?|dscf|cimg|imag|mvi|pxl|gopr?|dji|sam|wp|p|screenshot|image|photo|picture|untitled)?[\d\s.()-]*",
    re.IGNORECASE,
)


def says_nothing(caption: str) -> bool:
    """Return whether a caption is a camera's name for a file, IMG or DSC01234, which would be trained as a word."""
    return _NO_WORDS.fullmatch(caption) is not None


@dataclass(frozen=True)
class Rejection:
    """path: the file that is left out, or `table.jsonl:LINE` for a row (is_row). reason: why, for a reader."""

    path: str
    reason: str
    is_row: bool = False


def collapse(text: str) -> str:
    """Return the text with every run of white space as one space and none at the ends; control characters are none.

    A half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.
    """
    if not text.isprintable():
        kinds = {"Cc": " ", "Cs": "\ufffd"}
        text = "".join(kinds.get(unicodedata.category(char), char) for char in text)
    return " ".join(text.split())


def caption_of_name(stem: str) -> str:
    """Return the part of a file's stem before its first `_`, hyphens kept."""
    return collapse(stem.split("_", 1)[0])


def _row(line: str) -> dict:
    """Return a table's row. Raises UserError with what is wrong with the line."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise UserError("is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"is a {type(row).__name__}, not an object")
    return row


def _row_texts(row: dict) -> tuple[str, ...]:
    """Return the caption variants of a table's row. Raises UserError if it has none."""
    value = next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None)
    if value is None:
        raise UserError("has neither 'text' nor 'caption'")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"its text {reprlib.repr(value)} is neither a string nor a list of strings")
    # a repeated variant would only be drawn more often; dict keeps the order
    texts = tuple(dict.fromkeys(collapse(text) for text in texts if text.strip()))
    if not texts:
        raise UserError("its text is empty")
    return texts


def _row_name(row: dict) -> str:
    """Return a row's file name relative to its table, normalised. Raises UserError if it leads out of the folder."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise UserError("has no 'file_name'")
    name = storable(name)
    normal = posixpath.normpath(name)
    if posixpath.isabs(normal) or normal.split("/")[0] == "..":
        raise UserError(f"file_name {name!r} lies outside the table's folder")
    return unicodedata.normalize("NFC", normal)


@dataclass
class CaptionReader:
    """Finds the captions of photos below one source root; what it could not use is listed in its two lists."""

    root: Path
    rejections: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _tables: dict[Path, dict[str, Caption]] = field(default_factory=dict)

    def read(self, photo: Path) -> Caption:
        """Return the captions of a photo at or below the root.

        First found wins: NAME.txt, NAME.caption; metadata.jsonl, captions.jsonl in the photo's folder, then in each
        folder above up to the root; the file's name. An empty sidecar is passed over with a warning.
        """
        for suffix in SIDECAR_SUFFIXES:
            sidecar = photo.with_suffix(suffix)
            # not Path.is_file(), which raises for a name too long for the file system or a folder it may not enter
            if not os.path.isfile(sidecar):
                continue
            text = self._text(sidecar, MAX_SIDECAR_BYTES)
            if text is not None and collapse(text):
                return Caption((collapse(text),), f"sidecar {suffix}")
            if text is not None:
                self.warnings.append(f"{printable(sidecar)} is empty; the caption is taken from elsewhere")
        for folder in self._folders(photo):
            for table_name in TABLE_NAMES:
                name = unicodedata.normalize("NFC", storable(photo.relative_to(folder).as_posix()))
                caption = self._table(folder / table_name).get(name)
                if caption is not None:
                    return caption
        text = caption_of_name(photo.stem)
        if not text:
            self.warnings.append(
                f"{printable(photo)} has no caption and its name gives none; it trains with the empty caption"
            )
        return Caption((text,), FILE_NAME)

    def _folders(self, photo: Path) -> list[Path]:
        """Return the photo's folder and those above it, down to and including the root."""
        below = photo.parent.relative_to(self.root).parts
        return [self.root.joinpath(*below[:depth]) for depth in range(len(below), -1, -1)]

    def _text(self, path: Path, max_bytes: int | None = None) -> str | None:
        """Return a file as text, bytes that are not UTF-8 replaced; None if it cannot be read. Either is listed."""
        try:
            size = path.stat().st_size
            if max_bytes is not None and size > max_bytes:
                self.warnings.append(
                    f"{printable(path)} is no caption: it has {size:,} bytes, more than {max_bytes:,}; it is not read"
                )
                return None
            content = path.read_bytes()
        except OSError as error:
            self.warnings.append(f"{printable(path)} cannot be read: {error.strerror}")
            return None
        # UTF-16 with its mark is what Windows' editors call Unicode
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        name, encoding = ("UTF-16", "utf-16") if is_utf16 else ("UTF-8", "utf-8-sig")
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            self.warnings.append(f"{printable(path)} is not {name} (byte {error.start}); the bad bytes are replaced")
            return content.decode(encoding, errors="replace")

    def _table(self, path: Path) -> dict[str, Caption]:
        """Return a table's captions by normalised file name; empty if there is no such table. Read once."""
        if path not in self._tables:
            self._tables[path] = self._read_table(path) if os.path.isfile(path) else {}
        return self._tables[path]

    def _read_table(self, path: Path) -> dict[str, Caption]:
        captions: dict[str, Caption] = {}
        shown = storable(str(path))
        # not splitlines(): JSON strings may hold U+2028, which that splits at
        for number, line in enumerate((self._text(path) or "").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = _row(line)
                name = _row_name(row)
                if name in captions:
                    raise UserError(f"is a second row for {name}; give one row a list of texts instead")
                # file systems keep a name as it was written: composed, or decomposed as macOS does
                if not any(os.path.exists(path.parent / unicodedata.normalize(form, name)) for form in ("NFC", "NFD")):
                    raise UserError(f"names {name}, which does not exist")
                how = row.get("caption_source")
                source = f"{path.name}: {collapse(how)}" if isinstance(how, str) and how.strip() else path.name
                captions[name] = Caption(_row_texts(row), source)
            except UserError as error:
                self.rejections.append(Rejection(f"{shown}:{number}", f"the row {error}", is_row=True))
        return captions
