"""Find a photo's captions: in a sidecar file, in a Hugging Face imagefolder table (metadata.jsonl), or in its name."""

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

from safelight.errors import UserError
from safelight.text import printable, storable

SIDECAR_SUFFIXES = (".txt", ".caption")
TABLE_NAMES = ("metadata.jsonl", "captions.jsonl")
TEXT_KEYS = ("text", "caption")
# text encoders read at most a few hundred words; a larger file beside a photo is something else, such as a log
MAX_SIDECAR_BYTES = 2**20


@dataclass(frozen=True)
class Caption:
    """The captions of one photo. texts: one or more variants. source: where they were found, shown to the user."""

    texts: tuple[str, ...]
    source: str


# `Caption.source` of a caption that nobody wrote
FILE_NAME = "file name"


# names that cameras, phones and programs give to pictures, with their numbers
_CAMERA_NAME = re.compile(
    r"(img|dsc[nf]?|dscf|cimg|imag|mvi|pxl|gopr?|dji|sam|wp|p|screenshot|image|photo|picture|untitled)?[\d\s.()-]*",
    re.IGNORECASE,
)


def is_camera_name(caption: str) -> bool:
    """Return whether a caption is a camera's file name, such as IMG or DSC01234: the model would learn it as a word."""
    return _CAMERA_NAME.fullmatch(caption) is not None


@dataclass(frozen=True)
class Rejection:
    """A file that is not used, or one row of a caption table (is_row), whose path is then `table.jsonl:LINE`.

    reason: why, shown to the user.
    """

    path: str
    reason: str
    is_row: bool = False


def collapse(text: str) -> str:
    """Return the text stripped, with every run of white space and control characters replaced by one space.

    A lone surrogate, which JSON can contain but UTF-8 cannot encode, becomes U+FFFD.
    """
    if not text.isprintable():
        kinds = {"Cc": " ", "Cs": "\ufffd"}
        text = "".join(kinds.get(unicodedata.category(char), char) for char in text)
    return " ".join(text.split())


def caption_of_name(stem: str) -> str:
    """Return the caption that a file's stem gives: the part before its first `_`, hyphens kept."""
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
    """Return the caption variants of a table row. Raises UserError if it has none."""
    value = next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None)
    if value is None:
        raise UserError("has neither 'text' nor 'caption'")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"its text {reprlib.repr(value)} is neither a string nor a list of strings")
    # repeats are removed, or training would draw them more often; a dict keeps the order
    texts = tuple(dict.fromkeys(collapse(text) for text in texts if text.strip()))
    if not texts:
        raise UserError("its text is empty")
    return texts


def _row_name(row: dict) -> str:
    """Return a row's normalized file name, relative to its table. Raises UserError if it leads out of the folder."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise UserError("has no 'file_name'")
    name = storable(name)
    normal = posixpath.normpath(name)
    if posixpath.isabs(normal) or normal.split("/")[0] == "..":
        raise UserError(f"file_name {name!r} is outside the table's folder")
    return unicodedata.normalize("NFC", normal)


@dataclass
class CaptionReader:
    """Finds the captions of the photos below one source root.

    rejections, warnings: what it could not use, added as `read` comes across it.
    """

    root: Path
    rejections: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _tables: dict[Path, dict[str, Caption]] = field(default_factory=dict)

    def read(self, photo: Path) -> Caption:
        """Return the captions of a photo at or below the root.

        The first of these wins: NAME.txt; NAME.caption; metadata.jsonl or captions.jsonl in the photo's folder, then in
        each folder above it up to the root; the file name. An empty sidecar is skipped with a warning.
        """
        for suffix in SIDECAR_SUFFIXES:
            sidecar = photo.with_suffix(suffix)
            # not Path.is_file(), which raises if the name is too long or the folder must not be entered
            if not os.path.isfile(sidecar):
                continue
            text = self._text(sidecar, MAX_SIDECAR_BYTES)
            if text is not None and collapse(text):
                return Caption((collapse(text),), f"sidecar {suffix}")
            if text is not None:
                self.warnings.append(f"{printable(sidecar)} is empty and was ignored")
        for folder in self._folders(photo):
            for table_name in TABLE_NAMES:
                name = unicodedata.normalize("NFC", storable(photo.relative_to(folder).as_posix()))
                caption = self._table(folder / table_name).get(name)
                if caption is not None:
                    return caption
        text = caption_of_name(photo.stem)
        if not text:
            self.warnings.append(
                f"{printable(photo)} has no caption, not even in its file name; it will be trained on with an empty one"
            )
        return Caption((text,), FILE_NAME)

    def _folders(self, photo: Path) -> list[Path]:
        """Return the photo's folder and the folders above it, up to and including the root."""
        below = photo.parent.relative_to(self.root).parts
        return [self.root.joinpath(*below[:depth]) for depth in range(len(below), -1, -1)]

    def _text(self, path: Path, max_bytes: int | None = None) -> str | None:
        """Return a file's text, invalid bytes replaced, or None if it is too large or cannot be read.

        Adds a warning in each of these cases.
        """
        try:
            size = path.stat().st_size
            if max_bytes is not None and size > max_bytes:
                self.warnings.append(
                    f"{printable(path)} was ignored: {size:,} bytes are too many for a caption (limit {max_bytes:,})"
                )
                return None
            content = path.read_bytes()
        except OSError as error:
            self.warnings.append(f"{printable(path)} cannot be read: {error.strerror}")
            return None
        # Windows editors save "Unicode" text as UTF-16 with a byte order mark
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        name, encoding = ("UTF-16", "utf-16") if is_utf16 else ("UTF-8", "utf-8-sig")
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            self.warnings.append(f"{printable(path)} is not {name} (byte {error.start}); invalid bytes were replaced")
            return content.decode(encoding, errors="replace")

    def _table(self, path: Path) -> dict[str, Caption]:
        """Return a table's captions by normalized file name, {} if there is no such table. Each table is read once."""
        if path not in self._tables:
            self._tables[path] = self._read_table(path) if os.path.isfile(path) else {}
        return self._tables[path]

    def _read_table(self, path: Path) -> dict[str, Caption]:
        captions: dict[str, Caption] = {}
        shown = storable(str(path))
        # not splitlines(), which also splits at U+2028, a character that JSON strings may contain
        for number, line in enumerate((self._text(path) or "").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = _row(line)
                name = _row_name(row)
                if name in captions:
                    raise UserError(f"is a second row for {name}; give one row a list of texts instead")
                # file systems keep names as they were written: composed, or decomposed as on macOS
                if not any(os.path.exists(path.parent / unicodedata.normalize(form, name)) for form in ("NFC", "NFD")):
                    raise UserError(f"names {name}, which does not exist")
                origin = row.get("caption_source")
                source = f"{path.name}: {collapse(origin)}" if isinstance(origin, str) and origin.strip() else path.name
                captions[name] = Caption(_row_texts(row), source)
            except UserError as error:
                self.rejections.append(Rejection(f"{shown}:{number}", f"the row {error}", is_row=True))
        return captions
