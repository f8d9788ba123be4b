"""`safelight prepare`: turn folders of photos into a dataset folder.

It holds images/ and manifest.jsonl; rejected.jsonl, which lists what was left out; notes.txt, with what else there is
to say; and sources.json, which tells where the photos came from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from safelight.data.atomic import atomic_write_bytes, atomic_write_text, sync_file, sync_folder
from safelight.data.captions import FILE_NAME, CaptionReader, Rejection
from safelight.data.images import COPYABLE_FORMATS, RejectedImage, decode, encode, read_file
from safelight.data.lock import FolderLock
from safelight.data.manifest import IMAGES_FOLDER, MANIFEST_NAME, Photo, read_manifest, write_manifest
from safelight.data.near_copies import find_near_copies, fingerprint, merge_groups, thumbnail
from safelight.data.sources import (
    SourceFile,
    find_files,
    name_roots,
    place_of,
    read_sources,
    split_label,
    write_sources,
)
from safelight.errors import UserError
from safelight.text import printable, storable
from safelight.untrusted import UnsafeFile, read_bytes

REJECTED_NAME = "rejected.jsonl"
NOTES_NAME = "notes.txt"
# stored photos are read this small to compare them
THUMBNAIL_MEGAPIXELS = 0.02
CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
ADVICE = "choose another dataset folder with -o"
MAX_STEM_CHARACTERS = 64
# beyond this aspect ratio even the widest usual bucket, 4 : 1, shows less than half of a photo
MAX_SEEN_ASPECT = 8
# threads that sync stored files while the next photos are decoded: syncing one by one took half of the total time
NUM_SYNC_THREADS = 4


@dataclass(frozen=True)
class Note:
    """Something to know about the dataset. kind: notes of one kind are shown together."""

    kind: Literal["file", "caption", "changed", "removed", "pruned", "source", "near-copies"]
    text: str


@dataclass
class IngestSummary:
    """What one call did. photos: the whole manifest after the call; all other fields describe this call alone.

    num_of_source: photos by where they came from, a folder, or its name if the folder is unknown. near_copies: the
    groups of two or more photos.
    """

    photos: list[Photo] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    num_duplicates: int = 0
    num_shrunk: int = 0
    num_copied: int = 0
    num_of_source: dict[str, int] = field(default_factory=dict)
    near_copies: list[list[Photo]] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """The notes' texts."""
        return [note.text for note in self.notes]

    def note(self, kind: str, text: str) -> None:
        self.notes.append(Note(kind, printable(text)))

    def reject(self, source: SourceFile, reason: str, kind: str = "photo") -> None:
        self.rejected.append(Rejection(storable(str(source.path)), storable(reason), kind))


@dataclass(frozen=True)
class _Prepared:
    """A source file as it will be stored in the dataset."""

    data: bytes
    suffix: str
    width: int
    height: int
    origin_sha256: str
    content_sha256: str
    is_shrunk: bool
    is_copied: bool
    warning: str
    fingerprint: str


def _prepare(
    path: Path, max_megapixels: float, image_format: str, quality: int, stop: threading.Event
) -> _Prepared | str:
    """Return the file as it will be stored, or the reason why it cannot be used. stop: see `decode`."""
    try:
        content = read_file(path)
        decoded = decode(content, max_megapixels, stop)
        if decoded.is_copyable:
            data, suffix = content, COPYABLE_FORMATS[decoded.format]
        else:
            data, suffix = encode(decoded.image, image_format, quality)
    except RejectedImage as error:
        return str(error)
    width, height = decoded.image.size
    warning = decoded.warning
    if max(width, height) > MAX_SEEN_ASPECT * min(width, height):
        too_narrow = f"{width} x {height} px is so long and narrow that training crops away more than half of it"
        warning = f"{warning}; {too_narrow}" if warning else too_narrow
    return _Prepared(
        data,
        suffix,
        *decoded.image.size,
        origin_sha256=hashlib.sha256(content).hexdigest(),
        content_sha256=decoded.content_sha256,
        is_shrunk=decoded.is_shrunk,
        is_copied=decoded.is_copyable,
        warning=warning,
        fingerprint=fingerprint(decoded.image),
    )


def _in_order(function: Callable, items: list) -> Iterable:
    """Yield function(item, stop) for each item in order. stop: an event, set when no more results are wanted.

    Threads compute results ahead of the consumer, but only a few: each holds a whole image.
    """
    stop = threading.Event()
    num_workers = os.cpu_count() or 1
    executor = ThreadPoolExecutor(num_workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item, stop))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _safe_stem(stem: str) -> str:
    """Return the stem reduced to ASCII letters, digits, `-`, `_` and `.`, which every file system accepts."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-.")[:MAX_STEM_CHARACTERS].strip("-.") or "photo"


class _Collection:
    """The new manifest while it is built: the photos of earlier calls, and those this call adds or replaces.

    touched: the photos (by index) that this call found. decoded: labels (`Photo.source`) of files that are pictures.
    pending: files with the same picture as a photo of another file; once all files are read, `find_moved` tells
    whether they are duplicates or that photo under a new name. syncs: of stored photos; `flush` waits for them.
    """

    def __init__(self, dataset: Path, roots: list[Path], files: list[SourceFile], summary: IngestSummary, prune: bool):
        self.dataset, self.summary, self.prune = dataset, summary, prune
        self.syncs: list[Future] = []
        self.photos: list[Photo] = []
        self.touched: set[int] = set()
        self.decoded: set[str] = set()
        self.pending: list[tuple[SourceFile, int]] = []
        # hashes of original files, pixels and stored files share one dict: SHA-256 values never collide by chance
        self.index_of_hash: dict[str, int] = {}
        self.replaced_files: set[str] = set()
        for photo in read_manifest(dataset, may_be_empty=True) if (dataset / MANIFEST_NAME).is_file() else []:
            if (dataset / photo.file).is_file():
                self._put(len(self.photos), photo)
            else:
                summary.note("file", f"{photo.file} no longer exists; its line was removed from the manifest")
        self.earlier = list(self.photos)
        self.earlier_labels = {photo.source for photo in self.photos}
        self.folders = read_sources(dataset)
        self.names = name_roots(roots, files, self.folders, self.photos)
        self.root_of_name = {name: root for root, name in self.names.items()}
        self.present = {self.label(file) for file in files}

    def label(self, source: SourceFile) -> str:
        return f"{self.names[source.root]}/{source.relative}"

    def _put(self, index: int, photo: Photo) -> None:
        self.photos[index : index + 1] = [photo]
        for digest in (photo.sha256, photo.origin_sha256, photo.content_sha256):
            if digest:
                self.index_of_hash.setdefault(digest, index)

    def add(self, source: SourceFile, prepared: _Prepared | str) -> None:
        """Store a prepared file and add it to the manifest, or list it as a duplicate or as left out."""
        label = self.label(source)
        if isinstance(prepared, str):
            kept = "; the dataset keeps what was prepared earlier" if label in self.earlier_labels else ""
            self.summary.reject(source, f"{prepared}{kept}")
            return
        self.decoded.add(label)
        hashes = (prepared.origin_sha256, prepared.content_sha256, hashlib.sha256(prepared.data).hexdigest())
        index = next((self.index_of_hash[digest] for digest in hashes if digest in self.index_of_hash), None)
        if index is not None and index not in self.touched and self.photos[index].source != label:
            self.pending.append((source, index))
        elif index in self.touched:
            self._list_duplicate(source, index)
        else:
            self._store(source, prepared, index)

    def find_moved(self) -> dict[int, SourceFile]:
        """Return the photos, by index, whose picture is now in another file.

        Called when all files have been added. The caller prepares each of these files and passes it to `move`, then
        calls `list_duplicates`.
        """
        moved: dict[int, SourceFile] = {}
        duplicates = []
        for source, index in self.pending:
            if index in self.touched or index in moved or not self._is_gone(self.photos[index]):
                duplicates.append((source, index))
            else:
                moved[index] = source
        self.pending = duplicates
        return moved

    def move(self, index: int, source: SourceFile, prepared: _Prepared | str) -> None:
        """Prepare a photo again, from the file that now has its picture."""
        if isinstance(prepared, str):
            self.summary.reject(source, prepared)
        else:
            self._store(source, prepared, index)

    def list_duplicates(self) -> None:
        for source, index in self.pending:
            self._list_duplicate(source, index)

    def _list_duplicate(self, source: SourceFile, index: int) -> None:
        self.summary.num_duplicates += 1
        reason = f"same picture as {self.photos[index].source}"
        if self._adopt_caption(index, source):
            reason += ", which now uses the caption of this file"
        self.summary.reject(source, reason, "duplicate")

    def _is_gone(self, photo: Photo) -> bool:
        """Return whether a photo that was not found in this call has left its source, or its source is dropped."""
        name, relative = split_label(photo.source)
        if name not in self.root_of_name:
            return self.prune or (name in self.folders and not os.path.lexists(self.folders[name]))
        if photo.source in self.present:
            # if it could not be read, nothing is known about it
            return photo.source in self.decoded
        try:
            os.lstat(self.root_of_name[name] / relative)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return True
        except OSError:
            pass
        return False

    def _store(self, source: SourceFile, prepared: _Prepared, index: int | None) -> None:
        """Store a picture: a new one, or that of an earlier photo."""
        sha256 = hashlib.sha256(prepared.data).hexdigest()
        old = self.photos[index] if index is not None else None
        file = f"{IMAGES_FOLDER}/{_safe_stem(source.path.stem)}-{sha256[:8]}{prepared.suffix}"
        if old is not None and old.sha256 == sha256:
            file = old.file
        elif old is not None:
            self.replaced_files.add(old.file)
        stored = self.dataset / file
        if not _has_content(stored, prepared.data):
            atomic_write_bytes(stored, prepared.data, sync=False)
            self.syncs.append(self.disk.submit(sync_file, stored))
        caption = source.reader.read(source.path)
        photo = Photo(
            file,
            sha256,
            prepared.width,
            prepared.height,
            caption.texts,
            self.label(source),
            caption.source,
            prepared.origin_sha256,
            prepared.content_sha256,
            prepared.fingerprint,
            old.group if old is not None else "",
        )
        index = len(self.photos) if index is None else index
        self._put(index, photo)
        self.touched.add(index)
        self.summary.num_shrunk += prepared.is_shrunk
        self.summary.num_copied += prepared.is_copied
        if prepared.warning:
            self.summary.note("file", f"{source.path}: {prepared.warning}")

    def flush(self) -> None:
        """Wait until every stored photo would survive a power cut."""
        for sync in self.syncs:
            sync.result()
        if self.syncs:
            sync_folder(self.dataset / IMAGES_FOLDER)

    def _adopt_caption(self, index: int, duplicate: SourceFile) -> bool:
        """Return whether a photo took over the caption of its duplicate.

        It does if its own caption is only a file name and somebody wrote one for the duplicate.
        """
        if self.photos[index].caption_source != FILE_NAME:
            return False
        caption = duplicate.reader.read(duplicate.path)
        if caption.source != FILE_NAME:
            self._put(index, replace(self.photos[index], captions=caption.texts, caption_source=caption.source))
        return caption.source != FILE_NAME

    def take_stock(self) -> None:
        """Say which photos this call did not find in its sources, or drop them, and which sources the dataset has."""
        kept = []
        for index, photo in enumerate(self.photos):
            name, relative = split_label(photo.source)
            if index in self.touched or not self._is_gone(photo):
                kept.append(photo)
                continue
            place = self.root_of_name[name] / relative if name in self.root_of_name else photo.source
            if self.prune:
                self.summary.note("pruned", f"{place}: {photo.file} was removed from the dataset")
                self.replaced_files.add(photo.file)
                continue
            kept.append(photo)
            if photo.source in self.decoded:
                self.summary.note(
                    "changed",
                    f"{place} changed since it was last prepared; the dataset keeps the earlier version, {photo.file}, "
                    "as well (--prune removes it)",
                )
            elif name in self.root_of_name:
                self.summary.note(
                    "removed",
                    f"{place} is no longer in its folder; the dataset keeps it, and it is trained on "
                    "(--prune removes it)",
                )
        self.photos = kept
        self._count_sources()

    def _count_sources(self) -> None:
        num_of_name = Counter(split_label(photo.source)[0] for photo in self.photos)
        for root, name in self.names.items():
            self.folders[name] = place_of(root)
        self.folders = {name: folder for name, folder in self.folders.items() if name in num_of_name}
        self.summary.num_of_source = {self.folders.get(name, name): num for name, num in num_of_name.items()}
        known = {split_label(label)[0] for label in self.earlier_labels}
        others = num_of_name.keys() - set(self.names.values())
        for name in sorted(num_of_name.keys() - known) if known and others else []:
            shown = ", ".join(f"{self.folders.get(other, other)} ({num_of_name[other]})" for other in sorted(others))
            self.summary.note(
                "source",
                f"{self.folders[name]} was added; the dataset also has photographs of {shown} "
                "(--prune keeps only those of the sources given now)",
            )

    def group_near_copies(self) -> None:
        """Give near-copies a common group. Only pairs with a photo that was never compared before are looked at."""

        def fill(photo: Photo, stop: threading.Event) -> Photo:
            image = None if photo.fingerprint else _stored_image(self.dataset, photo)
            return photo if image is None else replace(photo, fingerprint=fingerprint(image))

        def load(index: int) -> np.ndarray | None:
            image = _stored_image(self.dataset, self.photos[index])
            return None if image is None else thumbnail(image)

        compared = {photo.sha256 for photo in self.earlier if photo.fingerprint}
        self.photos = list(_in_order(fill, self.photos))
        pairs = find_near_copies(
            [photo.fingerprint for photo in self.photos],
            [photo.width / photo.height for photo in self.photos],
            [photo.sha256 not in compared for photo in self.photos],
            load,
        )
        groups = merge_groups([p.group for p in self.photos], [p.sha256 for p in self.photos], pairs)
        self.photos = [
            replace(photo, group=group) if photo.group != group else photo
            for photo, group in zip(self.photos, groups, strict=True)
        ]
        members: dict[str, list[Photo]] = {}
        for photo in self.photos:
            if photo.group:
                members.setdefault(photo.group, []).append(photo)
        self.summary.near_copies = [photos for photos in members.values() if len(photos) > 1]
        for first, *others in self.summary.near_copies:
            self.summary.note(
                "near-copies",
                f"near-copies of {first.source}, held out or trained on together with it: "
                + ", ".join(photo.source for photo in others),
            )


def _stored_image(dataset: Path, photo: Photo) -> Image.Image | None:
    """Return a stored photo, shrunk, or None if it cannot be read."""
    try:
        return decode(read_file(dataset / photo.file), THUMBNAIL_MEGAPIXELS).image
    except RejectedImage:
        return None


def _has_content(path: Path, content: bytes) -> bool:
    try:
        return read_bytes(path, len(content)) == content
    except (OSError, UnsafeFile):
        return False


def _write_lists(dataset: Path, summary: IngestSummary) -> None:
    """Write everything that was left out and every note; the terminal shows the first of each kind."""
    # ASCII only: a path may contain Unicode line separators, which JSON does not escape otherwise
    lines = [json.dumps({"path": item.path, "reason": item.reason}) + "\n" for item in summary.rejected]
    atomic_write_text(dataset / REJECTED_NAME, "".join(lines))
    if summary.notes:
        atomic_write_text(dataset / NOTES_NAME, "".join(f"{storable(note.text)}\n" for note in summary.notes))
    else:
        (dataset / NOTES_NAME).unlink(missing_ok=True)


def ingest(
    sources: list[Path],
    dataset: Path,
    max_megapixels: float = 1.5,
    quality: int = 95,
    image_format: Literal["jpeg", "webp"] = "jpeg",
    prune: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> IngestSummary:
    """Add the photos of `sources` (folders or files) to the dataset folder and return a summary of what was done.

    Photos over max_megapixels (10^6 px) are shrunk. Files that need no change are copied byte for byte; all others are
    re-encoded as sRGB at `quality` (1 to 100). Originals are only read. Files that cannot be used, duplicates included,
    are listed with the reason in the summary and in rejected.jsonl. Photos of earlier calls stay in the manifest, and
    repeating a call gives the same manifest; with `prune`, photos that are not, or no longer, in the sources are
    removed. Near-copies get a common group, which the validation split keeps together. progress(files done, files in
    total) is called after each file.
    Raises UserError if a source does not exist or lies in the dataset, a setting is out of range, no photo can be
    used, the dataset cannot be written, or another process is preparing it.
    """
    if not max_megapixels > 0:
        raise UserError(f"max_megapixels {max_megapixels} is not above 0; use 1.5")
    if not 1 <= quality <= 100:
        raise UserError(f"quality {quality} is outside 1 to 100; use 95")
    if image_format not in ("jpeg", "webp"):
        raise UserError(f"image_format {image_format!r} is not supported; use 'jpeg' or 'webp'")
    dataset = Path(dataset).resolve()
    if dataset.exists() and not dataset.is_dir():
        raise UserError(f"dataset {dataset} is a file; give a folder")
    files, readers = find_files(sources, dataset)

    def prepare(file: SourceFile, stop: threading.Event) -> _Prepared | str:
        return _prepare(file.path, max_megapixels, image_format, quality, stop)

    try:
        with FolderLock(dataset, ADVICE, f"wait until it ends, or {ADVICE}") as lock:
            summary = IngestSummary()
            if lock.note:
                summary.note("file", lock.note)
            _ingest(sources, files, readers, dataset, summary, prepare, prune, progress)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(f"{error.filename or dataset} cannot be written ({error.strerror}); {ADVICE}") from error
    return summary


def _ingest(
    sources: list[Path],
    files: list[SourceFile],
    readers: list[CaptionReader],
    dataset: Path,
    summary: IngestSummary,
    prepare: Callable[[SourceFile, threading.Event], _Prepared | str],
    prune: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Do the work of `ingest`. The caller holds the dataset's lock."""
    for leftover in (dataset / IMAGES_FOLDER).glob(".*.tmp"):
        # half-written when an earlier call was killed
        leftover.unlink()
    collection = _Collection(dataset, [reader.root for reader in readers], files, summary, prune)
    with ThreadPoolExecutor(NUM_SYNC_THREADS) as collection.disk:
        for num_done, (file, prepared) in enumerate(zip(files, _in_order(prepare, files), strict=True), start=1):
            collection.add(file, prepared)
            if progress is not None:
                progress(num_done, len(files))
        moved = collection.find_moved()
        for (index, file), prepared in zip(moved.items(), _in_order(prepare, list(moved.values())), strict=True):
            collection.move(index, file, prepared)
        collection.list_duplicates()
        collection.flush()
        _check_use(sources, collection, readers, dataset)
        collection.take_stock()
        collection.group_near_copies()
    for reader in readers:
        summary.rejected += reader.rejections
        summary.notes += [Note("caption", text) for text in reader.warnings]
    summary.photos = collection.photos
    _write_lists(dataset, summary)
    write_sources(dataset, collection.folders)
    write_manifest(dataset, summary.photos)
    for file in collection.replaced_files - {photo.file for photo in summary.photos}:
        (dataset / file).unlink(missing_ok=True)


def _check_use(sources: list[Path], collection: _Collection, readers: list[CaptionReader], dataset: Path) -> None:
    """Raise UserError if no photo can be used, or nothing of a source whose other photos would be removed."""
    names = ", ".join(map(str, sources))
    summary = collection.summary
    rejected = [*summary.rejected, *(item for reader in readers for item in reader.rejections if item.kind == "photo")]
    if not collection.decoded and not rejected:
        raise UserError(f"no photos found in {names}; give a folder that contains JPEG, PNG or WebP files")
    if not collection.decoded:
        summary.rejected = rejected
        _write_lists(dataset, summary)
        raise UserError(
            f"none of the photos in {names} can be used ({len(rejected)} rejected); the first is "
            f"{rejected[0].path}: {rejected[0].reason} (full list: {dataset / REJECTED_NAME})"
        )
    used = {split_label(label)[0] for label in collection.decoded}
    for root, name in collection.names.items() if collection.prune else ():
        if name not in used:
            raise UserError(
                f"{root} holds no photograph that can be used; nothing was removed: check it, or leave it out"
            )
