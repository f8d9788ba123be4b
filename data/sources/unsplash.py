"""Photographs of the Unsplash Lite dataset: reads its table, draws a sample, downloads it with captions and credits.

The table (photos.tsv000, or .csv000, also in parts) is Unsplash's; its terms are the user's to keep. Photographs land
in DATASET/downloads/unsplash as ID.jpg, beside a metadata.jsonl with captions and credits: a folder like any other,
which `ingest` reads as such.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import heapq
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np

from safelight.data.atomic import atomic_write_text
from safelight.data.draws import draw_words
from safelight.data.photo import Credit, id_of
from safelight.data.sources.caption import MAX_LISTED_ROWS, Rejection
from safelight.data.sources.table_filter import Derived, Row, columns_of, holds, parse_conditions
from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose
from safelight.text import collapse, counted, shortened, storable
from safelight.untrusted import UnsafeFile, check_kinds, parse_json, path_in, read_json_object, read_lines

if TYPE_CHECKING:
    from safelight.data.sources.download import Limits

PREFIX = "unsplash:"
FOLDER = Path("downloads", "unsplash")
# what the photographs were asked for with; other files of the same names would not be downloaded again
ASKED_NAME = ".asked.json"
METADATA_NAME = "metadata.jsonl"
DEFAULT_LIMIT, DEFAULT_WIDTH = 500, 1600
MAX_LIMIT = 1_000_000
WIDTHS = (64, 8192)
JPEG_QUALITY = 85
# the full dataset's table has about 7 million rows of less than 1 KiB
MAX_TABLE_BYTES = 2**35
MAX_LINE_BYTES = 2**18
# captions.py reads as much
MAX_METADATA_BYTES = 2**28
# of a row, whose quoted texts may have line ends
MAX_ROW_BYTES = 2**19
ROWS_AT_ONCE = 4096
_ID = re.compile(r"[A-Za-z0-9_-]{11}")
REQUIRED = ("photo_id", "photo_image_url")
CAPTION_COLUMNS = {"ai": "ai_description", "photographer": "photo_description"}
CREDIT_COLUMNS = ("photo_url", "photographer_first_name", "photographer_last_name", "photographer_username")


def _size(row: Row) -> tuple[float, float]:
    try:
        return float(row["photo_width"]), float(row["photo_height"])
    except ValueError:
        return float("nan"), float("nan")


def _shape(compare: Callable[[float, float], bool]) -> Derived:
    return Derived(("photo_width", "photo_height"), lambda row: "yes" if compare(*_size(row)) else "")


# names in --where beside the table's columns
DERIVED = {
    "landscape": _shape(lambda width, height: width > height),
    "portrait": _shape(lambda width, height: width < height),
    "square": _shape(lambda width, height: width == height),
    "shorter_side": Derived(("photo_width", "photo_height"), lambda row: f"{min(_size(row)):g}"),
    "camera": Derived(
        ("exif_camera_make", "exif_camera_model"), lambda row: f"{row['exif_camera_make']} {row['exif_camera_model']}"
    ),
}


@dataclass(frozen=True)
class Request:
    """Which photographs of which tables. width: px that they are asked for in; narrower ones stay as they are.

    limit: how many are drawn. where: conditions on rows (table_filter.py). captions: what their captions are read from.
    """

    tables: tuple[Path, ...]
    limit: int = DEFAULT_LIMIT
    width: int = DEFAULT_WIDTH
    seed: int = 0
    where: str = ""
    captions: Literal["ai", "photographer", "none"] = "none"


@dataclass(frozen=True)
class Photograph:
    """A row that was drawn. address: of the picture, at the width that was asked for."""

    id: str
    address: str
    caption: str
    credit: Credit

    @property
    def file_name(self) -> str:
        return f"{self.id}.jpg"


@dataclass
class Fetched:
    """What was downloaded. folder: a source for `ingest`. notes: what there is to say about it.

    failed: names of files in it that were wanted, and could not be downloaded this time.
    """

    folder: Path
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: tuple[str, ...] = ()


def tables_of(source: str) -> list[Path]:
    """Return the tables that `unsplash:PATTERN` names: a file, a glob, or a folder with photos.tsv000.

    Raises UserError if there are none.
    """
    pattern = os.path.expanduser(source.removeprefix(PREFIX))
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "photos.[ct]sv*")
    found = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
    if not found:
        raise UserError(
            f"{source} names no file; give the table of the Unsplash Lite dataset: {PREFIX}photos.tsv000, or "
            f"{PREFIX}photos.csv000"
        )
    return [Path(name) for name in found]


class _Lines:
    """The lines of a table, for csv.reader. number: of the last line. num_bytes: since the row's start."""

    def __init__(self, table: Path):
        self._lines = read_lines(table, MAX_TABLE_BYTES, MAX_LINE_BYTES)
        self.number = self.num_bytes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.num_bytes += len(line or b"")
        if line is None or self.num_bytes > MAX_ROW_BYTES:
            raise csv.Error(f"has more than {MAX_LINE_BYTES if line is None else MAX_ROW_BYTES:,} bytes")
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8", errors="replace")


def _rows(table: Path, needed: Callable[[list[str]], set[str]]) -> Iterator[tuple[int, Row | str]]:
    """Yield (line, row) of a table; in place of a row that cannot be read, why.

    needed: returns the columns that are read, of those in the header. Raises UserError if the table has none of them.
    """
    lines = _Lines(table)
    try:
        first_line = next(lines)
        delimiter = "\t" if "\t" in first_line else ","
        header = [name.strip() for name in next(csv.reader([first_line], delimiter=delimiter), [])]
    except (StopIteration, csv.Error):
        raise UserError(f"{table} has no header; give photos.tsv000 of the Unsplash Lite dataset") from None
    if first_line.startswith("PK"):
        raise UserError(f"{table} is an archive; unpack it, and give the photos.tsv000 in it")
    missing = sorted({*REQUIRED, *needed(header)} - {*header})
    if missing:
        raise UserError(
            f"{table} has no column {missing[0]}; give photos.tsv000 of the Unsplash Lite dataset, with its header"
        )
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        first, lines.num_bytes = lines.number + 1, 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, f"the row cannot be read: {error}; is a quote not closed?"
            continue
        if len(cells) == len(header):
            yield first, dict(zip(header, cells, strict=True))
        elif cells:
            yield first, f"the row has {counted(len(cells), 'column')}, and the header {len(header)}"


def _web_address(text: str) -> str:
    """Return an http or https address, empty if the text is none."""
    try:
        parts = urlsplit(text.strip())
        return text.strip() if parts.scheme in ("http", "https") and parts.hostname else ""
    except ValueError:
        return ""


def image_address(address: str, width: int) -> str:
    """Return the address of a picture as a JPEG of at most this width."""
    parts = urlsplit(address)
    query = dict(parse_qsl(parts.query)) | {"w": width, "fit": "max", "fm": "jpg", "q": JPEG_QUALITY}
    return urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(query), ""))


def _photograph(row: Row, request: Request) -> Photograph:
    """Return the photograph of a row. Raises UserError with what is wrong with the row."""
    photo_id = row["photo_id"]
    if not _ID.fullmatch(photo_id):
        raise UserError(f"the row's photo_id {shortened(photo_id)!r} is not 11 letters, digits, - or _")
    address = _web_address(row["photo_image_url"])
    if not address:
        raise UserError(f"the row's photo_image_url {shortened(row['photo_image_url'])!r} is no http or https address")
    column = CAPTION_COLUMNS.get(request.captions)
    names = (row.get("photographer_first_name", ""), row.get("photographer_last_name", ""))
    name = collapse(" ".join(names)) or collapse(row.get("photographer_username", ""))
    credit = Credit(name, _web_address(row.get("photo_url", "")) or address)
    caption = collapse(row[column]) if column else ""
    return Photograph(photo_id, image_address(address, request.width), caption, credit)


class _Draw:
    """The photographs with the smallest keyed draws among those that are added.

    A draw depends on the seed and the photograph's id alone: neither on the order of rows nor on the limit, so that a
    larger limit adds photographs to those of a smaller one.
    """

    def __init__(self, seed: int, limit: int):
        self._seed, self._limit = seed, limit
        self._pending: list[Photograph] = []
        # the largest draw first: of negated ones, the smallest
        self._heap: list[tuple[int, str]] = []
        self._chosen: dict[str, Photograph] = {}

    def add(self, photograph: Photograph) -> None:
        self._pending.append(photograph)
        if len(self._pending) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        hashes = (hashlib.sha256(one.id.encode()).hexdigest() for one in self._pending)
        words = draw_words([Key(self._seed, Purpose.TABLE_SAMPLE, id_of(digest)) for digest in hashes])
        draws = (words[:, 0] << np.uint64(32) | words[:, 1]).tolist()
        for draw, one in zip(draws, self._pending, strict=True):
            # a second row of an id changes nothing
            if one.id in self._chosen or (len(self._heap) == self._limit and (-draw, one.id) <= self._heap[0]):
                continue
            self._chosen[one.id] = one
            heapq.heappush(self._heap, (-draw, one.id))
            if len(self._heap) > self._limit:
                del self._chosen[heapq.heappop(self._heap)[1]]
        self._pending.clear()

    def chosen(self) -> list[Photograph]:
        """Return the photographs, in the order of their draws."""
        self._flush()
        return [self._chosen[photo_id] for _, photo_id in sorted(self._heap, reverse=True)]


def choose(request: Request) -> tuple[list[Photograph], list[Rejection], int]:
    """Return (photographs drawn from the tables, rows that cannot be used, how many there were to draw from).

    Raises UserError if a table cannot be read, or no row meets the conditions.
    """
    conditions = parse_conditions(request.where)
    draw = _Draw(request.seed, request.limit)
    rejected: list[Rejection] = []
    num_rows = num_bad = num_met = 0

    def needed(header: list[str]) -> set[str]:
        caption = {CAPTION_COLUMNS[request.captions]} if request.captions in CAPTION_COLUMNS else set()
        return caption | columns_of(conditions, header, DERIVED)

    for table in request.tables:
        for line, row in _rows(table, needed):
            num_rows += 1
            try:
                if isinstance(row, str):
                    raise UserError(row)
                photograph = _photograph(row, request)
                if all(holds(condition, row, DERIVED) for condition in conditions):
                    num_met += 1
                    draw.add(photograph)
            except UserError as error:
                num_bad += 1
                if num_bad <= MAX_LISTED_ROWS:
                    rejected.append(Rejection(f"{storable(str(table))}:{line}", storable(str(error)), "row"))
    if num_bad > MAX_LISTED_ROWS:
        reason = (
            f"{num_bad - MAX_LISTED_ROWS:,} more rows that cannot be used; the first {MAX_LISTED_ROWS:,} are listed"
        )
        rejected.append(Rejection(storable(str(request.tables[0])), reason, "row", num_bad - MAX_LISTED_ROWS))
    if not num_met:
        first = f"; the first that cannot be used: {rejected[0].path}: {rejected[0].reason}" if rejected else ""
        where = f"meets --where {request.where!r}" if conditions else "names a photograph"
        raise UserError(f"none of {counted(num_rows, 'row')} in {', '.join(map(str, request.tables))} {where}{first}")
    return draw.chosen(), rejected, num_met


def _check(request: Request) -> None:
    if not 1 <= request.limit <= MAX_LIMIT:
        raise UserError(f"--limit {request.limit} is outside 1 to {MAX_LIMIT:,}; use {DEFAULT_LIMIT}")
    if not WIDTHS[0] <= request.width <= WIDTHS[1]:
        raise UserError(f"--width {request.width} is outside {WIDTHS[0]} to {WIDTHS[1]} px; use {DEFAULT_WIDTH}")
    if not 0 <= request.seed < 2**64:
        raise UserError(f"--seed {request.seed} is outside 0 to 2^64 - 1; use 0")


def _check_width(folder: Path, width: int) -> None:
    """Raise UserError if the folder holds photographs of another width, else record this one."""
    path = folder / ASKED_NAME
    try:
        held = read_json_object(path).get("width")
    except FileNotFoundError:
        held = None
    except UnsafeFile as error:
        raise UserError(f"{error}; delete {folder} to download its photographs again") from None
    if held != width and any(map(_is_download, _files_in(folder))):
        raise UserError(
            f"{folder} holds photographs that were downloaded with --width {held}; give the same width, or another "
            "dataset with -o"
        )
    atomic_write_text(path, json.dumps({"width": width}) + "\n")


def _held_rows(path: Path, names: set[str]) -> dict[str, dict]:
    """Return the rows of an earlier metadata.jsonl for these files, by name; what is damaged is left out."""
    rows = {}
    for line in read_lines(path, MAX_METADATA_BYTES, MAX_ROW_BYTES) if os.path.lexists(path) else []:
        try:
            row = parse_json(line or b"")
            if row["file_name"] in names:
                rows[row["file_name"]] = row
        except (UnsafeFile, TypeError, KeyError):
            continue
    return rows


def _metadata_row(photograph: Photograph, request: Request) -> dict:
    credit = {name: storable(text) for name, text in asdict(photograph.credit).items() if text}
    source = CAPTION_COLUMNS[request.captions] if photograph.caption else "no caption"
    return {"file_name": photograph.file_name, "text": photograph.caption, "caption_source": source, "credit": credit}


def _proxy_hint() -> str:
    """Return a hint if the environment names a proxy: through one, no address could be checked."""
    names = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    return f"; downloads do not use the proxy of {names[0]}: they need a direct connection" if names else ""


def _is_download(name: str) -> bool:
    return name.endswith(".jpg") and _ID.fullmatch(name.removesuffix(".jpg")) is not None


def _files_in(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_file()}


def fetch(
    request: Request,
    dataset: Path,
    prune: bool,
    progress: Callable[[int, int, str], None],
    limits: Limits | None = None,
) -> Fetched:
    """Draw photographs from the tables and download them into the dataset, those that are not there yet.

    prune: delete downloads of earlier calls that are not drawn now. progress: see `download`. The caller holds the
    dataset's lock. Raises UserError if a setting is out of range, a table cannot be used, or no photograph can be
    downloaded.
    """
    # a sixth of a second, for photographs from folders in vain
    from safelight.data.sources.download import Wanted, download

    _check(request)
    chosen, rejected, num_met = choose(request)
    check_kinds(dataset, (FOLDER.parent.as_posix(), FOLDER.as_posix()), (), "a dataset", follow_links=False)
    folder = path_in(dataset, FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    _check_width(folder, request.width)
    names = {one.file_name for one in chosen}
    for name in os.listdir(folder):
        is_part = name.startswith(".") and name.endswith((".part", ".note"))
        is_unwanted = name[1:].rpartition(".")[0] not in names if is_part else prune and _is_download(name)
        # a folder is none of ours
        if is_unwanted and name not in names and ((folder / name).is_symlink() or not (folder / name).is_dir()):
            (folder / name).unlink()
    wanted = [Wanted(one.address, folder / one.file_name) for one in chosen]
    failures = download(wanted, progress, limits)
    if len(failures) == len(chosen):
        raise UserError(
            f"none of {counted(len(chosen), 'photograph')} can be downloaded; the first is {failures[0].wanted.url}: "
            f"{failures[0].reason}{_proxy_hint()}"
        )
    rejected += [Rejection(storable(failure.wanted.url), storable(failure.reason)) for failure in failures]
    there = _files_in(folder)
    new_rows = {one.file_name: _metadata_row(one, request) for one in chosen if one.file_name in there}
    rows = _held_rows(folder / METADATA_NAME, there) | new_rows
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    atomic_write_text(folder / METADATA_NAME, "".join(lines))
    failed = tuple(failure.wanted.path.name for failure in failures)
    return Fetched(folder, rejected, _notes(request, chosen, num_met, folder), failed)


def _notes(request: Request, chosen: list[Photograph], num_met: int, folder: Path) -> list[str]:
    notes = []
    if len(chosen) < request.limit:
        met = "meet --where" if request.where.strip() else "can be used"
        notes.append(f"{counted(num_met, 'row')} {met}, fewer than --limit {request.limit:,}: all were taken")
    num_earlier = len(set(filter(_is_download, _files_in(folder))) - {one.file_name for one in chosen})
    if num_earlier:
        notes.append(
            f"{counted(num_earlier, 'photograph')} of earlier draws stay in the dataset (--prune removes them)"
        )
    num_uncaptioned = sum(not one.caption for one in chosen)
    if request.captions == "none":
        notes.append(
            "no captions were asked for: the photographs have empty ones; `safelight caption` writes some, or give "
            "--captions ai"
        )
    elif num_uncaptioned:
        notes.append(
            f"{num_uncaptioned:,} of {counted(len(chosen), 'photograph')} have no {CAPTION_COLUMNS[request.captions]} "
            "and thus an empty caption"
        )
    return notes
