"""Find a photo's captions: in a sidecar file, in a Hugging Face imagefolder table (metadata.jsonl), or in its name.

Names are matched as the file systems of cameras, Windows and macOS write them: in any letter case, and with accents
composed or decomposed.
"""

from __future__ import annotations

import codecs
import os
import posixpath
import re
import reprlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from safelight.data.photo import NO_CREDIT, USUAL_SETTINGS, Credit, PhotoSettings, Tag
from safelight.errors import UserError
from safelight.text import collapse, printable, shortened, storable
from safelight.untrusted import UnsafeFile, is_link_out, open_regular, parse_json

SIDECAR_SUFFIXES = (".txt", ".caption")
TABLE_NAMES = ("metadata.jsonl", "captions.jsonl")
TEXT_KEYS = ("text", "caption")
# text encoders read at most a few hundred words; a larger file beside a photo is something else, such as a log
MAX_SIDECAR_BYTES = 2**20
# rows of a million photos
MAX_TABLE_BYTES = 2**28
MAX_TABLE_ROWS = 2_000_000
# the captions of one photo, as in a sidecar
MAX_ROW_CHARACTERS = 2**20
# as file systems have it
MAX_NAME_CHARACTERS = 255
# names that differ in letter case or accents alone, to which a sidecar may belong
MAX_ALIKE = 16
# of each table; of further ones only the number is kept
MAX_LISTED_ROWS = 1000
WRITE_TABLE = 'write its captions as metadata.jsonl, one {"file_name": "IMG_1.jpg", "text": "a dog"} a line'
# files that stand beside photographs and are none: what they are, and what to do if their captions are wanted
_NO_PICTURES = {
    (".csv", ".tsv"): f"a table in another form, which is not read; {WRITE_TABLE}",
    (
        ".json",
    ): f"a JSON file (other programs keep captions or settings in such files), which is not read; {WRITE_TABLE}",
    (".parquet", ".arrow"): f"a table in another form, which is not read; {WRITE_TABLE}",
    (".jsonl", ".ndjson"): "a table of another name, which is not read; if it has captions, name it metadata.jsonl",
    (".xmp",): "metadata of another program, which is not read; write its caption into a .txt file of the same name",
    (".npz", ".npy", ".safetensors"): "arrays, such as another trainer's cache, not an image",
    (".zip", ".tar", ".gz", ".7z", ".rar"): "an archive, which is not opened; unpack it",
    (".mp4", ".mov", ".avi", ".mkv", ".webm"): "a video, not an image",
    (".md", ".html", ".pdf", ".ini", ".db", ".log", ".aae"): "a document or another program's file, not an image",
}
_NO_PICTURE = {suffix: reason for suffixes, reason in _NO_PICTURES.items() for suffix in suffixes}


@dataclass(frozen=True)
class Caption:
    """The captions of one photo, and what else its source says of it.

    texts: one or more variants. source: where they were found, shown to the user. tags, settings, credit, captioner: as
    in `Photo`.
    """

    texts: tuple[str, ...]
    source: str
    tags: tuple[Tag, ...] = ()
    settings: PhotoSettings = USUAL_SETTINGS
    credit: Credit = NO_CREDIT
    captioner: str = ""


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
    """Something that is not used. path: of a file or folder; for a row of a caption table, `table.jsonl:LINE`.

    reason: why, shown to the user. kind: what it is; "other" is a file that cannot be a photo, such as a table. num:
    how many it stands for.
    """

    path: str
    reason: str
    kind: Literal["photo", "duplicate", "other", "caption", "row"] = "photo"
    num: int = 1


def caption_of_name(stem: str) -> str:
    """Return the caption that a file's stem gives: the part before its first `_`, hyphens kept."""
    return collapse(stem.split("_", 1)[0])


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
    if not texts and "credit" in row:
        # it says whose the photo is, and that nobody has captioned it
        return ("",)
    if not texts:
        raise UserError("its text is empty")
    return texts


def _row_credit(row: dict) -> Credit:
    """Return whose photo a row describes. Raises UserError if its credit is of another form."""
    credit = row.get("credit")
    if credit is None:
        return NO_CREDIT
    names = {field.name for field in fields(Credit)}
    if not isinstance(credit, dict) or not all(isinstance(credit.get(name, ""), str) for name in names):
        raise UserError(f"its credit {reprlib.repr(credit)} is not an object with texts: photographer, page")
    return Credit(**{name: collapse(credit[name]) for name in names & credit.keys()})


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


def _folded(name: str) -> str:
    """Return a name as it is compared: in lower case, accents composed."""
    return unicodedata.normalize("NFC", storable(name)).casefold()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


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
class Listing:
    """The names in one folder, sorted, hidden ones left out.

    sidecars: of each picture, the one that is read first at the front. unclaimed: sidecars of no picture.
    """

    folders: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unclaimed: list[str] = field(default_factory=list)
    sidecars: dict[str, list[str]] = field(default_factory=dict)
    # pictures and folders by their folded names
    by_folded: dict[str, list[str]] = field(default_factory=dict)

    def find(self, name: str) -> str | None:
        """Return the picture or folder of this name, in whatever form it is written; None if none or several fit."""
        if len(name) > MAX_NAME_CHARACTERS and not name.isascii():
            # bringing n accents on one letter into order takes time of order n^2
            return None
        names = self.by_folded.get(_folded(name), [])
        composed = unicodedata.normalize("NFC", name)
        exact = [other for other in names if unicodedata.normalize("NFC", storable(other)) == composed]
        return (exact or names)[0] if len(exact or names) == 1 else None


def list_folder(folder: Path) -> Listing:
    """Return what a folder holds. Raises OSError if it cannot be read."""
    listing, sidecars = Listing(), []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = entry.name
            if name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                listing.folders.append(name)
            elif _suffix(name) in SIDECAR_SUFFIXES:
                sidecars.append(name)
            elif name.lower() in TABLE_NAMES:
                listing.tables.append(name)
            elif _suffix(name) in _NO_PICTURE:
                listing.others.append(name)
            else:
                listing.pictures.append(name)
    for name in (*listing.folders, *listing.pictures):
        listing.by_folded.setdefault(_folded(name), []).append(name)
    _assign(sidecars, listing)
    return listing


def _assign(sidecars: list[str], listing: Listing) -> None:
    """Give each sidecar to the pictures that it belongs to."""
    # a sidecar names a picture with its suffix or without: IMG_1.jpg.txt, IMG_1.txt
    owners: dict[str, list[tuple[str, bool]]] = {}
    for picture in listing.pictures:
        for name, is_whole in {picture: True, _stem(picture): False}.items():
            for form in {name, _folded(name)}:
                owners.setdefault(form, []).append((picture, is_whole))
    ranked: dict[str, list[tuple]] = {}
    for sidecar in sidecars:
        base, suffix = _stem(sidecar), _suffix(sidecar)
        # of img.jpg and IMG.jpg, img.txt belongs to the first alone
        exact = [(picture, is_whole) for picture, is_whole in owners.get(base, []) if base in (picture, _stem(picture))]
        alike = owners.get(_folded(base), [])
        if not exact and not 0 < len(alike) <= MAX_ALIKE:
            listing.unclaimed.append(sidecar)
            continue
        for picture, is_whole in exact or alike:
            rank = (SIDECAR_SUFFIXES.index(suffix), not is_whole, not exact, not sidecar.endswith(suffix), sidecar)
            ranked.setdefault(picture, []).append(rank)
    listing.sidecars = {picture: [rank[-1] for rank in sorted(ranks)] for picture, ranks in ranked.items()}


def _is_text(text: str) -> bool:
    """Return whether every character is one that people write."""
    # a set: tables have hundreds of millions of characters, of a few kinds
    return all(char in "\t\n\r\f\v" or unicodedata.category(char) not in ("Cc", "Cn", "Co", "Cs") for char in set(text))


def _utf16_without_mark(content: bytes, is_utf8: bool) -> str | None:
    """Return the text of bytes that are UTF-16 beyond doubt, else None.

    Spaces, line ends and Latin letters have a zero byte, always on the same side; letters of one other alphabet share
    their high byte.
    """
    if len(content) % 2 or len(content) < 6:
        return None
    texts = []
    for low, encoding in ((0, "utf-16-le"), (1, "utf-16-be")):
        lows, highs = content[low::2], content[1 - low :: 2]
        num_high_bytes, num_zeros = len(set(highs)), highs.count(0)
        is_one_alphabet = num_high_bytes <= 1 + len(highs) // 4
        is_one_sided = num_zeros > 0 and lows.count(0) == 0 and (not is_utf8 or num_zeros > len(highs) // 2)
        if is_one_alphabet or is_one_sided:
            try:
                texts.append((num_high_bytes, content.decode(encoding)))
            except UnicodeDecodeError:
                continue
    texts = [(num, text) for num, text in texts if _is_text(text)]
    return min(texts)[1] if texts else None


def decode_text(content: bytes) -> tuple[str, str]:
    """Return (text, a note on its encoding or ""). Line ends are kept.

    Reads UTF-8, and what other programs write: UTF-8 and UTF-16 with a byte order mark, UTF-16 without one, and
    Windows-1252, which contains Latin-1. Never fails.
    """
    for mark, encoding, name in (
        (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
        (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
        (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
    ):
        if content.startswith(mark):
            try:
                return content.decode(encoding), ""
            except UnicodeDecodeError as error:
                note = f"is not {name} (byte {error.start}), although it starts like it; invalid bytes were replaced"
                return content.decode(encoding, errors="replace"), note
    try:
        text, bad = content.decode("utf-8"), None
    except UnicodeDecodeError as error:
        text, bad = content.decode("utf-8", errors="replace"), error
    if bad or not _is_text(text):
        wide = _utf16_without_mark(content, is_utf8=bad is None)
        if wide is not None:
            return wide, "has no byte order mark; it was read as UTF-16: if letters are wrong, save it as UTF-8"
    if not bad:
        return text, ""
    what = f"is not UTF-8 (byte {bad.start})"
    # more letters beyond ASCII that are valid than not: UTF-8, damaged
    if sum(char > "\x7f" and char != "\ufffd" for char in text) > text.count("\ufffd"):
        return text, f"{what}; invalid bytes were replaced"
    # errors: five bytes mean nothing in Windows-1252
    text = content.decode("cp1252", errors="replace")
    return text, f"{what}; it was read as Windows-1252 (Latin-1): if letters are wrong, save it as UTF-8"


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
            reason = f"a text that belongs to no photograph: no picture in its folder is named {_stem(name)}"
            self._reject(folder / name, reason)
        for name in listing.others:
            self._reject(folder / name, _NO_PICTURE[_suffix(name)], "other")

    def _reject(self, path: Path, reason: str, kind: str = "caption") -> None:
        self.rejections.append(Rejection(storable(str(path)), storable(reason), kind))

    def read(self, photo: Path) -> Caption:
        """Return the captions of a photo at or below the root.

        The first of these wins: NAME.jpg.txt; NAME.txt; NAME.jpg.caption; NAME.caption; metadata.jsonl or
        captions.jsonl in the photo's folder, then in each folder above it up to the root; the file name. A name that is
        equal wins over one that differs in letter case or accents. An empty sidecar is skipped with a warning.
        """
        for name in self._listing_or_empty(photo.parent).sidecars.get(photo.name, ()):
            sidecar = photo.with_name(name)
            text = self._text(sidecar, MAX_SIDECAR_BYTES)
            if text is not None and collapse(text):
                return Caption((collapse(text),), f"sidecar {_suffix(name)}")
            if text is not None:
                self.warnings.append(f"{printable(sidecar)} is empty and was ignored")
        for folder, table in self._tables_for(photo.parent):
            caption = table.get(storable(photo.relative_to(folder).as_posix()))
            if caption is not None:
                return caption
        text = caption_of_name(photo.stem)
        if not text:
            self.warnings.append(
                f"{printable(photo)} has no caption, not even in its file name; it will be trained on with an empty one"
            )
        return Caption((text,), FILE_NAME)

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
