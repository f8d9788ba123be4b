"""Find the files that `safelight prepare` reads: its sources are walked in sorted order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.data.captions import SIDECAR_SUFFIXES, TABLE_NAMES, CaptionReader, Rejection
from safelight.data.manifest import IMAGES_FOLDER, MANIFEST_NAME
from safelight.errors import UserError
from safelight.text import printable, storable


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. label: the root folder's name and the path below it, so it is the same on every machine."""

    path: Path
    reader: CaptionReader
    label: str


def _walk(folder: Path, dataset: Path, visited: set[Path], rejections: list[Rejection]) -> Iterator[Path]:
    """Yield the files below a folder in sorted order.

    Skips hidden files and folders, the dataset that is being written, and folders already visited (symlink loops).
    Folders that cannot be read and other datasets, whose photos are copies, are added to the rejections.
    """
    real = folder.resolve()
    if real in visited or real == dataset:
        return
    visited.add(real)
    if os.path.isfile(folder / MANIFEST_NAME) and os.path.isdir(folder / IMAGES_FOLDER):
        rejections.append(
            Rejection(storable(str(folder)), "a dataset made by `safelight prepare`, not a folder of originals")
        )
        return
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        rejections.append(Rejection(storable(str(folder)), f"a folder that cannot be read: {error.strerror}"))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry):
            yield from _walk(entry, dataset, visited, rejections)
        elif entry.suffix.lower() not in SIDECAR_SUFFIXES and entry.name not in TABLE_NAMES:
            yield entry


def find_files(sources: list[Path], dataset: Path) -> tuple[list[SourceFile], list[CaptionReader]]:
    """Return the candidate files of all sources, and one caption reader per source.

    Raises UserError for a source that does not exist or lies in the dataset.
    """
    files, readers = [], []
    for source in map(Path, sources):
        shown = printable(source)
        if not os.path.exists(source):
            raise UserError(
                f"source {shown} does not exist or cannot be reached; give a folder of photos, or one photo"
            )
        if source.resolve().is_relative_to(dataset):
            raise UserError(f"source {shown} is inside the dataset folder {dataset}; give the folder of the originals")
        root = source if source.is_dir() else source.parent
        reader = CaptionReader(root)
        readers.append(reader)
        paths = _walk(source, dataset, set(), reader.rejections) if source.is_dir() else [source]
        name = root.resolve().name
        files += [SourceFile(path, reader, storable(f"{name}/{path.relative_to(root).as_posix()}")) for path in paths]
    return files, readers
