"""`safelight prepare`: turn folders of photos into a dataset folder with images/, manifest.jsonl and rejected.jsonl."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from safelight.data.atomic import atomic_write_bytes, atomic_write_text, sync_file, sync_folder
from safelight.data.captions import FILE_NAME, CaptionReader, Rejection
from safelight.data.images import COPYABLE_FORMATS, RejectedImage, decode_file, encode
from safelight.data.lock import FolderLock
from safelight.data.manifest import IMAGES_FOLDER, MANIFEST_NAME, Photo, read_manifest, write_manifest
from safelight.data.sources import SourceFile, find_files
from safelight.errors import UserError
from safelight.text import printable, storable

REJECTED_NAME = "rejected.jsonl"
MAX_STEM_CHARACTERS = 64
# beyond this aspect ratio even the widest usual bucket, 4 : 1, shows less than half of a photo
MAX_SEEN_ASPECT = 8
# threads that sync stored files while the next photos are decoded: syncing one by one took half of the total time
NUM_SYNC_THREADS = 4


@dataclass
class IngestSummary:
    """What one call did. photos: the whole manifest after the call; all other fields describe this call alone."""

    photos: list[Photo] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_duplicates: int = 0
    num_shrunk: int = 0
    num_copied: int = 0


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


def _prepare(
    path: Path, max_megapixels: float, image_format: str, quality: int, stop: threading.Event
) -> _Prepared | str:
    """Return the file as it will be stored, or the reason why it cannot be used. stop: see `decode_file`."""
    try:
        content, decoded = decode_file(path, max_megapixels, stop)
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

    syncs: pending syncs of stored photos; `flush` waits for them, before the manifest is written.
    """

    def __init__(self, dataset: Path, summary: IngestSummary, disk: ThreadPoolExecutor):
        self.dataset, self.summary, self.disk = dataset, summary, disk
        self.syncs: list[Future] = []
        self.photos: list[Photo] = []
        self.touched: set[int] = set()
        # hashes of original files, pixels and stored files share one dict: SHA-256 values never collide by chance
        self.index_of_hash: dict[str, int] = {}
        self.index_of_source: dict[str, int] = {}
        self.replaced_files: set[str] = set()
        for photo in read_manifest(dataset, may_be_empty=True) if (dataset / MANIFEST_NAME).is_file() else []:
            if (dataset / photo.file).is_file():
                self._put(len(self.photos), photo)
            else:
                summary.warnings.append(f"{photo.file} no longer exists; its line was removed from the manifest")

    def _put(self, index: int, photo: Photo) -> None:
        self.photos[index : index + 1] = [photo]
        self.index_of_source[photo.source] = index
        for digest in (photo.sha256, photo.origin_sha256, photo.content_sha256):
            if digest:
                self.index_of_hash.setdefault(digest, index)

    def add(self, source: SourceFile, prepared: _Prepared) -> None:
        """Store a prepared file and add it to the manifest, or list it as a duplicate."""
        sha256 = hashlib.sha256(prepared.data).hexdigest()
        hashes = (prepared.origin_sha256, prepared.content_sha256, sha256)
        index = next((self.index_of_hash[digest] for digest in hashes if digest in self.index_of_hash), None)
        # the same picture from the same source is prepared again; from any other source it is a duplicate
        if index is not None and (index in self.touched or self.photos[index].source != source.label):
            self.summary.num_duplicates += 1
            reason = f"same picture as {self.photos[index].source}"
            if self._adopt_caption(index, source):
                reason += ", which now uses the caption of this file"
            self.summary.rejected.append(Rejection(storable(str(source.path)), reason))
            return
        earlier = self.index_of_source.get(source.label)
        if index is None and earlier is not None and earlier not in self.touched:
            self.summary.warnings.append(
                f"{printable(source.path)} changed since it was last prepared; the dataset keeps the earlier version, "
                f"{self.photos[earlier].file}, as well (to remove it, delete that file and run `safelight prepare` "
                "again)"
            )
        old = self.photos[index] if index is not None else None
        file = f"{IMAGES_FOLDER}/{_safe_stem(source.path.stem)}-{sha256[:8]}{prepared.suffix}"
        if old is not None and old.sha256 == sha256:
            file = old.file
        elif old is not None:
            self.replaced_files.add(old.file)
        stored = self.dataset / file
        if not stored.is_file() or stored.read_bytes() != prepared.data:
            atomic_write_bytes(stored, prepared.data, sync=False)
            self.syncs.append(self.disk.submit(sync_file, stored))
        caption = source.reader.read(source.path)
        photo = Photo(
            file,
            sha256,
            prepared.width,
            prepared.height,
            caption.texts,
            source.label,
            caption.source,
            prepared.origin_sha256,
            prepared.content_sha256,
        )
        index = len(self.photos) if index is None else index
        self._put(index, photo)
        self.touched.add(index)
        self.summary.num_shrunk += prepared.is_shrunk
        self.summary.num_copied += prepared.is_copied
        if prepared.warning:
            self.summary.warnings.append(f"{printable(source.path)}: {prepared.warning}")

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


def _write_rejected(dataset: Path, rejected: list[Rejection]) -> None:
    # ASCII only: a path may contain Unicode line separators, which JSON does not escape otherwise
    lines = [json.dumps({"path": item.path, "reason": item.reason}) + "\n" for item in rejected]
    atomic_write_text(dataset / REJECTED_NAME, "".join(lines))


def ingest(
    sources: list[Path],
    dataset: Path,
    max_megapixels: float = 1.5,
    quality: int = 95,
    image_format: Literal["jpeg", "webp"] = "jpeg",
    progress: Callable[[int, int], None] | None = None,
) -> IngestSummary:
    """Add the photos of `sources` (folders or files) to the dataset folder and return a summary of what was done.

    Photos over max_megapixels (10^6 px) are shrunk. Files that need no change are copied byte for byte; all others are
    re-encoded as sRGB at `quality` (1 to 100). Originals are only read. Files that cannot be used, duplicates included,
    are listed with the reason in the summary and in rejected.jsonl. Photos of earlier calls stay in the manifest, and
    repeating a call gives the same manifest. progress(files done, files in total) is called after each file.
    Raises UserError if a source does not exist or lies in the dataset, a setting is out of range, no photo can be
    used, or another process is preparing this dataset.
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
    advice = "choose another dataset folder with -o"
    with FolderLock(dataset, advice, f"wait until it ends, or {advice}") as lock:
        summary = IngestSummary(warnings=[lock.note] if lock.note else [])
        _ingest(sources, files, readers, dataset, summary, max_megapixels, quality, image_format, progress)
    return summary


def _ingest(
    sources: list[Path],
    files: list[SourceFile],
    readers: list[CaptionReader],
    dataset: Path,
    summary: IngestSummary,
    max_megapixels: float,
    quality: int,
    image_format: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Do the work of `ingest`. The caller holds the dataset's lock."""
    for leftover in (dataset / IMAGES_FOLDER).glob(".*.tmp"):
        # half-written when an earlier call was killed
        leftover.unlink()
    with ThreadPoolExecutor(NUM_SYNC_THREADS) as disk:
        collection = _Collection(dataset, summary, disk)
        results = _in_order(
            lambda source, stop: _prepare(source.path, max_megapixels, image_format, quality, stop), files
        )
        for num_done, (source, prepared) in enumerate(zip(files, results, strict=True), start=1):
            if isinstance(prepared, str):
                summary.rejected.append(Rejection(storable(str(source.path)), prepared))
            else:
                collection.add(source, prepared)
            if progress is not None:
                progress(num_done, len(files))
        collection.flush()
    for reader in readers:
        summary.rejected += reader.rejections
        summary.warnings += reader.warnings
    summary.photos = collection.photos
    is_empty = not collection.touched and not summary.num_duplicates
    names = ", ".join(printable(source) for source in sources)
    if is_empty and not summary.rejected:
        raise UserError(f"no photos found in {names}; give a folder that contains JPEG, PNG or WebP files")
    _write_rejected(dataset, summary.rejected)
    if is_empty:
        first = summary.rejected[0]
        raise UserError(
            f"none of the photos in {names} can be used ({len(summary.rejected)} rejected); the first is "
            f"{printable(first.path)}: {printable(first.reason)} (full list: {dataset / REJECTED_NAME})"
        )
    write_manifest(dataset, summary.photos)
    for file in collection.replaced_files - {photo.file for photo in summary.photos}:
        (dataset / file).unlink(missing_ok=True)
