"""Find the files that `safelight prepare` reads, and recognize the folders and photos of earlier calls.

A dataset names its sources: a photo's `source` is "NAME/path below the source". The name is the folder's own, numbered
if another source has it already; sources.json records which folder each name stands for. A folder that was moved, or
whose record is missing, is recognized by the photos in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.data.atomic import atomic_write_text
from safelight.data.images import RejectedImage, read_file
from safelight.data.manifest import IMAGES_FOLDER, MANIFEST_NAME
from safelight.data.photo import Photo
from safelight.data.sources.caption import Rejection
from safelight.data.sources.captions import CaptionReader
from safelight.data.sources.listing import PACKED_SUFFIXES, Listing
from safelight.data.sources.packed import PackedPicture
from safelight.errors import UserError
from safelight.text import storable
from safelight.untrusted import UnsafeFile, read_json_object

SOURCES_NAME = "sources.json"
# files that are read to recognize a folder
NUM_COMPARED = 32


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. root: the source's folder. relative: the path below it, with forward slashes.

    path: of a file inside another, such as a tar, the path goes on in it.
    """

    path: Path
    root: Path
    relative: str
    reader: CaptionReader

    @property
    def picture(self) -> Path | PackedPicture:
        """Where its bytes are."""
        return self.reader.picture(self.path)

    @property
    def mask(self) -> Path | PackedPicture | None:
        """Where the bytes of its loss mask are, None if it has none."""
        mask = self.reader.mask_of(self.path)
        return None if mask is None else self.reader.picture(mask)

    @property
    def may_mask(self) -> Path | None:
        """The file whose loss mask this one may be by its name, None if there is none."""
        return self.reader.may_mask(self.path)


def _reject(reader: CaptionReader, folder: Path, reason: str) -> None:
    reader.rejections.append(Rejection(storable(str(folder)), reason))


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _enter(folder: Path, visited: set[tuple[int, int]], reader: CaptionReader) -> Listing:
    """Return what a folder holds, and list what in it is no picture. Empty for folders that are not entered.

    Those are folders already visited (symlink loops), and two that are listed: other datasets, whose photos are copies,
    and folders that cannot be read.
    """
    if reader.is_packed(folder):
        reader.leave_out_texts(folder)
        return reader.listing(folder)
    try:
        identity = _identity(folder)
        if identity in visited:
            return Listing()
        visited.add(identity)
        if os.path.isfile(folder / MANIFEST_NAME) and os.path.isdir(folder / IMAGES_FOLDER):
            _reject(reader, folder, "a dataset made by `safelight prepare`, not a folder of originals")
            return Listing()
        listing = reader.listing(folder)
    except OSError as error:
        _reject(reader, folder, f"a folder that cannot be read: {error.strerror}")
        reader.incomplete.add(folder)
        return Listing()
    reader.leave_out_texts(folder)
    return listing


def _walk(root: Path, dataset: Path, reader: CaptionReader) -> Iterator[Path]:
    """Yield the files below a folder that may be pictures, sorted by name in each folder. Skips hidden ones.

    A stack in place of recursion: folders may be nested deeper than Python recurses.
    """
    # never enters the dataset that is being written
    visited = {_identity(dataset)} if dataset.is_dir() else set()

    def entries(folder: Path) -> Iterator[tuple[Path, bool]]:
        listing = _enter(folder, visited, reader)
        for name in listing.packed:
            reader.open_packed(folder / name)
        folders = [*listing.folders, *(name for name in listing.packed if reader.is_packed(folder / name))]
        named = [*((name, True) for name in folders), *((name, False) for name in listing.pictures)]
        return ((folder / name, is_folder) for name, is_folder in sorted(named))

    stack = [entries(root)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif entry[1]:
            stack.append(entries(entry[0]))
        else:
            yield entry[0]


def find_files(
    sources: list[Path], dataset: Path, kohya: bool = False, comma_tags: bool = False
) -> tuple[list[SourceFile], list[CaptionReader]]:
    """Return the candidate files of all sources, and one caption reader per source, which the caller closes.

    kohya, comma_tags: see `CaptionReader`. Raises UserError for a source that does not exist or lies in the dataset.
    """
    files, readers = [], []
    for source in map(Path, sources):
        if not os.path.exists(source):
            raise UserError(
                f"source {source} does not exist or cannot be reached; give a folder of photos, or one photo"
            )
        if source.resolve().is_relative_to(dataset):
            raise UserError(f"source {source} is inside the dataset folder {dataset}; give the folder of the originals")
        found, reader = files_of(source, dataset, kohya, comma_tags)
        files += found
        readers.append(reader)
    return files, readers


def files_of(
    source: Path, dataset: Path, kohya: bool = False, comma_tags: bool = False
) -> tuple[list[SourceFile], CaptionReader]:
    """Return the candidate files of one source, which exists, and its caption reader."""
    root = source if source.is_dir() else source.parent
    reader = CaptionReader(root, kohya=kohya, comma_tags=comma_tags)
    if source.is_dir():
        paths = list(_walk(source, dataset, reader))
        reader.hint_at_kohya()
    elif source.suffix.lower() in PACKED_SUFFIXES:
        reader.open_packed(source)
        paths = list(_walk(source, dataset, reader))
    else:
        paths = [] if reader.is_mask(source) else [source]
    return [SourceFile(path, root, storable(path.relative_to(root).as_posix()), reader) for path in paths], reader


def read_sources(dataset: Path) -> dict[str, str]:
    """Return the folders of a dataset's sources by name, {} if it has no record. Raises UserError if it is damaged."""
    path = dataset / SOURCES_NAME
    try:
        folders = read_json_object(path)
    except FileNotFoundError:
        return {}
    except UnsafeFile as error:
        raise UserError(f"{error}; delete it: sources are then recognized by their photographs") from None
    if not all(isinstance(folder, str) and "\0" not in folder and "/" not in name for name, folder in folders.items()):
        raise UserError(
            f"{path} does not hold names of folders; delete it: sources are recognized by their photographs"
        )
    return folders


def write_sources(dataset: Path, folders: dict[str, str]) -> None:
    """Record the folders of a dataset's sources by name."""
    # ASCII only, as in rejected.jsonl
    atomic_write_text(dataset / SOURCES_NAME, json.dumps(folders, indent=1) + "\n")


def split_label(label: str) -> tuple[str, str]:
    """Return (source name, path below the source) of a photo's `source`."""
    name, _, relative = label.partition("/")
    return name, relative


def place_of(root: Path) -> str:
    """Return a source folder as sources.json records it: its absolute path without links."""
    return storable(os.path.realpath(root))


def name_roots(
    roots: list[Path], files: list[SourceFile], folders: dict[str, str], photos: list[Photo]
) -> dict[Path, str]:
    """Return the name of each source folder of a call: that of an earlier call, or a new one.

    roots, files: the call's. folders: the record, see `read_sources`. photos: those of earlier calls.
    """
    files_of_root: dict[Path, dict[str, SourceFile]] = {root: {} for root in roots}
    for file in files:
        files_of_root[file.root][file.relative] = file
    photos_of_name: dict[str, list[Photo]] = {name: [] for name in folders}
    for photo in photos:
        photos_of_name.setdefault(split_label(photo.source)[0], []).append(photo)
    name_of_place = {place: name for name, place in folders.items()}
    names: dict[Path, str] = {}
    # folders at their recorded place first: no other may take their name
    for root in sorted(files_of_root, key=lambda root: place_of(root) not in name_of_place):
        place = place_of(root)
        if place not in name_of_place:
            base = storable(os.path.basename(os.path.realpath(root)))
            lost = [n for n in photos_of_name if not os.path.isdir(folders.get(n, "")) and n not in names.values()]
            lost.sort(key=lambda n: n != base)
            found = next((n for n in lost if _holds(files_of_root[root], photos_of_name[n])), None)
            name_of_place[place] = found or _new_name(base, {*photos_of_name, *name_of_place.values()})
        names[root] = name_of_place[place]
    return names


def _new_name(base: str, taken: set[str]) -> str:
    number, name = 1, base
    while name in taken:
        number += 1
        name = f"{base} ({number})"
    return name


def _holds(files: dict[str, SourceFile], photos: list[Photo]) -> bool:
    """Return whether one of the photos is among a folder's files, under its old path and with its old content."""
    present = [photo for photo in photos if split_label(photo.source)[1] in files]
    step = max(1, len(present) // NUM_COMPARED)
    return any(_is_unchanged(files[split_label(photo.source)[1]], photo) for photo in present[::step])


def _is_unchanged(file: SourceFile, photo: Photo) -> bool:
    # the oldest manifests have no hash of the original
    if not photo.origin_sha256:
        return True
    try:
        return hashlib.sha256(read_file(file.picture)).hexdigest() == photo.origin_sha256
    except RejectedImage:
        return False
