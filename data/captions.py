"""What a photo shows, in words: sidecar files, Hugging Face imagefolder tables, or the file's name."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

SIDECAR_SUFFIXES = (".txt", ".caption")
TABLE_NAMES = ("metadata.jsonl", "captions.jsonl")
TEXT_KEYS = ("text", "caption")


@dataclass(frozen=True)
class Caption:
    """texts: one or more variants. source: what they were read from, for a reader."""

    texts: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Rejection:
    """path: the file that is left out, or `table.jsonl:LINE`. reason: why, for a reader."""

    path: str
    reason: str


def collapse(text: str) -> str:
    """Return the text with every run of white space as one space and none at the ends."""
    return " ".join(text.split())


def caption_of_name(stem: str) -> str:
    """Return the part of a file's stem before its first `_`, hyphens kept."""
    return collapse(stem.split("_", 1)[0])


def _row_texts(row: dict) -> tuple[str, ...]:
    """Return the caption variants of a table's row. Raises ValueError if it has none."""
    value = next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None)
    if value is None:
        raise ValueError("has neither 'text' nor 'caption'")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"its text {value!r} is neither a string nor a list of strings")
    # a repeated variant would only be drawn more often; dict keeps the order
    texts = tuple(dict.fromkeys(collapse(text) for text in texts if text.strip()))
    if not texts:
        raise ValueError("its text is empty")
    return texts


def _row_name(row: dict) -> str:
    """Return a row's file name relative to its table, normalised. Raises ValueError if it leads out of the folder."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError("has no 'file_name'")
    normal = posixpath.normpath(name)
    if posixpath.isabs(normal) or normal.split("/")[0] == "..":
        raise ValueError(f"file_name {name!r} lies outside the table's folder")
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
            if sidecar.is_file():
                text = collapse(self._text(sidecar))
                if text:
                    return Caption((text,), f"sidecar {suffix}")
                self.warnings.append(f"{sidecar} is empty; the caption is taken from elsewhere")
        for folder in self._folders(photo):
            for table_name in TABLE_NAMES:
                name = unicodedata.normalize("NFC", photo.relative_to(folder).as_posix())
                caption = self._table(folder / table_name).get(name)
                if caption is not None:
                    return caption
        text = caption_of_name(photo.stem)
        if not text:
            self.warnings.append(f"{photo} has no caption and its name gives none; it trains with the empty caption")
        return Caption((text,), "file name")

    def _folders(self, photo: Path) -> list[Path]:
        """Return the photo's folder and those above it, down to and including the root."""
        below = photo.parent.relative_to(self.root).parts
        return [self.root.joinpath(*below[:depth]) for depth in range(len(below), -1, -1)]

    def _text(self, path: Path) -> str:
        """Return a file as text; bytes that are not UTF-8 are replaced and listed."""
        content = path.read_bytes()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.warnings.append(f"{path} is not UTF-8 (byte {error.start}); the bad bytes are replaced")
            return content.decode("utf-8-sig", errors="replace")

    def _table(self, path: Path) -> dict[str, Caption]:
        """Return a table's captions by normalised file name; empty if there is no such table. Read once."""
        if path not in self._tables:
            self._tables[path] = self._read_table(path) if path.is_file() else {}
        return self._tables[path]

    def _read_table(self, path: Path) -> dict[str, Caption]:
        captions: dict[str, Caption] = {}
        # not splitlines(): JSON strings may hold U+2028, which that splits at
        for number, line in enumerate(self._text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"is a {type(row).__name__}, not an object")
                name = _row_name(row)
                if name in captions:
                    raise ValueError(f"is a second row for {name}; give one row a list of texts instead")
                # file systems keep a name as it was written: composed, or decomposed as macOS does
                if not any((path.parent / unicodedata.normalize(form, name)).exists() for form in ("NFC", "NFD")):
                    raise ValueError(f"names {name}, which does not exist")
                how = row.get("caption_source")
                source = f"{path.name}: {collapse(how)}" if isinstance(how, str) and how.strip() else path.name
                captions[name] = Caption(_row_texts(row), source)
            except json.JSONDecodeError as error:
                self.rejections.append(Rejection(f"{path}:{number}", f"the row is not JSON: {error}"))
            except ValueError as error:
                self.rejections.append(Rejection(f"{path}:{number}", f"the row {error}"))
        return captions
