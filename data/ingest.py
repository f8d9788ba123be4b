"""`safelight prepare`: folders of photos become a dataset folder with images/, manifest.jsonl and rejected.jsonl."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from safelight.data.atomic import atomic_write_bytes, atomic_write_text, sync_file, sync_folder
from safelight.data.captions import FILE_NAME, CaptionReader, Rejection
from safelight.data.images import COPYABLE_FORMATS, RejectedImage, decode, encode, read_file
from safelight.data.lock import FolderLock
from safelight.data.manifest import IMAGES_FOLDER, MANIFEST_NAME, Photo, read_manifest, write_manifest
from safelight.data.sources import Found, find_files
from safelight.data.text import printable, storable
from safelight.errors import UserError

REJECTED_NAME = "rejected.jsonl"
MAX_STEM_CHARACTERS = 64
# beyond this aspect the widest usual bucket, 4 : 1, shows less than half of a photo
MAX_SEEN_ASPECT = 8
# files synced at once while the next photos are decoded: waiting for the disk one by one took half of the time
NUM_SYNCS = 4


@dataclass
class IngestSummary:
    """What one call did. photos: the whole manifest after it; the rest counts this call alone."""

    photos: list[Photo] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_duplicates: int = 0
    num_shrunk: int = 0
    num_copied: int = 0


@dataclass(frozen=True)
class _Prepared:
    """A file as it will be stored."""

    data: bytes
    suffix: str
    width: int
    height: int
    origin_sha256: str
    content_sha256: str
    is_shrunk: bool
    is_copied: bool
    warning: str


def _prepare(path: Path, max_megapixels: float, image_format: str, quality: int) -> _Prepared | str:
    """Return a file as it will be stored, or the reason why it cannot be used."""
    try:
        content = read_file(path)
        decoded = decode(content, max_megapixels)
        if decoded.is_copyable:
            data, suffix = content, COPYABLE_FORMATS[decoded.format]
        else:
            data, suffix = encode(decoded.image, image_format, quality)
    except RejectedImage as error:
        return str(error)
    width, height = decoded.image.size
    warning = decoded.warning
    if max(width, height) > MAX_SEEN_ASPECT * min(width, height):
        seen = f"{width} x {height} px, a strip: training sees the middle of it, a few times as long as it is wide"
        warning = f"{warning}; {seen}" if warning else seen
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
    """Yield function(item) for each item in order, computed by threads a bounded way ahead (results hold images)."""
    num_workers = os.cpu_count() or 1
    executor = ThreadPoolExecutor(num_workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _safe_stem(stem: str) -> str:
    """Return a file stem of ASCII letters, digits, `-`, `_` and `.` that every file system takes."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-.")[:MAX_STEM_CHARACTERS].strip("-.") or "photo"


class _Collection:
    """The manifest in the making: what was stored before, and what this call adds or renews.

    syncs: of the photos stored, by threads; all must have ended before the manifest names them.
    """

    def __init__(self, dataset: Path, summary: IngestSummary, disk: ThreadPoolExecutor):
        self.dataset, self.summary, self.disk = dataset, summary, disk
        self.syncs: list[Future] = []
        self.photos: list[Photo] = []
        self.touched: set[int] = set()
        # origin, content and stored hashes in one: they are all SHA-256, so never equal by chance
        self.index_of_hash: dict[str, int] = {}
        self.index_of_source: dict[str, int] = {}
        self.replaced_files: set[str] = set()
        for photo in read_manifest(dataset, may_be_empty=True) if (dataset / MANIFEST_NAME).is_file() else []:
            if (dataset / photo.file).is_file():
                self._put(len(self.photos), photo)
            else:
                summary.warnings.append(f"{photo.file} is gone from the dataset; its line leaves the manifest")

    def _put(self, index: int, photo: Photo) -> None:
        self.photos[index : index + 1] = [photo]
        self.index_of_source[photo.source] = index
        for digest in (photo.sha256, photo.origin_sha256, photo.content_sha256):
            if digest:
                self.index_of_hash.setdefault(digest, index)

    def add(self, found: Found, prepared: _Prepared) -> None:
        """Store a prepared file and put it in the manifest, or list it as a duplicate."""
        sha256 = hashlib.sha256(prepared.data).hexdigest()
        hashes = (prepared.origin_sha256, prepared.content_sha256, sha256)
        index = next((self.index_of_hash[digest] for digest in hashes if digest in self.index_of_hash), None)
        # a photo met again at its own place is being prepared anew; anywhere else it is a duplicate
        if index is not None and (index in self.touched or self.photos[index].source != found.label):
            self.summary.num_duplicates += 1
            reason = f"same picture as {self.photos[index].source}"
            if self._takes_caption(index, found):
                reason += ", which takes its caption"
            self.summary.rejected.append(Rejection(storable(str(found.path)), reason))
            return
        earlier = self.index_of_source.get(found.label)
        if index is None and earlier is not None and earlier not in self.touched:
            self.summary.warnings.append(
                f"{printable(found.path)} changed since it was prepared; {self.photos[earlier].file} is kept beside the new one "
                f"(to drop it, delete that file and prepare again)"
            )
        old = self.photos[index] if index is not None else None
        file = f"{IMAGES_FOLDER}/{_safe_stem(found.path.stem)}-{sha256[:8]}{prepared.suffix}"
        if old is not None and old.sha256 == sha256:
            file = old.file
        elif old is not None:
            self.replaced_files.add(old.file)
        stored = self.dataset / file
        if not stored.is_file() or stored.read_bytes() != prepared.data:
            atomic_write_bytes(stored, prepared.data, sync=False)
            self.syncs.append(self.disk.submit(sync_file, stored))
        caption = found.reader.read(found.path)
        photo = Photo(
            file,
            sha256,
            prepared.width,
            prepared.height,
            caption.texts,
            found.label,
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
            self.summary.warnings.append(f"{printable(found.path)}: {prepared.warning}")

    def settle(self) -> None:
        """Return when every photo stored would survive a power cut."""
        for sync in self.syncs:
            sync.result()
        if self.syncs:
            sync_folder(self.dataset / IMAGES_FOLDER)

    def _takes_caption(self, index: int, found: Found) -> bool:
        """Give a photo that is captioned by its file's name alone what was written for its duplicate; return whether there is."""
        if self.photos[index].caption_source != FILE_NAME:
            return False
        caption = found.reader.read(found.path)
        if caption.source != FILE_NAME:
            self._put(index, replace(self.photos[index], captions=caption.texts, caption_source=caption.source))
        return caption.source != FILE_NAME


def _write_rejected(dataset: Path, rejected: list[Rejection]) -> None:
    # ASCII: a path may hold line separators that JSON leaves as they are
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
    """Return what was done to bring the photos of `sources` (folders or files) into the folder `dataset`.

    Photos over max_megapixels (10^6 px) are shrunk; what needs no change is copied byte for byte, everything else is
    stored anew as sRGB at `quality` (1 to 100). Originals are only read. What cannot be used, a duplicate of a picture
    included, is listed with its reason here and in rejected.jsonl. Photos of earlier calls stay in the manifest; the
    same call again gives the same manifest. progress(files done, files in all) is called after each file.
    Raises UserError for a source that does not exist or lies in the dataset, for a setting out of range, where no
    photo could be used, and while another process prepares this dataset.
    """
    if not max_megapixels > 0:
        raise UserError(f"max_megapixels {max_megapixels} is not above 0; use 1.5")
    if not 1 <= quality <= 100:
        raise UserError(f"quality {quality} is outside 1 to 100; use 95")
    if image_format not in ("jpeg", "webp"):
        raise UserError(f"image_format {image_format!r} is not known; use 'jpeg' or 'webp'")
    dataset = Path(dataset).resolve()
    if dataset.exists() and not dataset.is_dir():
        raise UserError(f"dataset {dataset} is a file; give a folder")
    found, readers = find_files(sources, dataset)
    with FolderLock(dataset, "wait until it ends, or name another dataset with -o") as lock:
        summary = IngestSummary(warnings=[lock.note] if lock.note else [])
        _ingest(sources, found, readers, dataset, summary, max_megapixels, quality, image_format, progress)
    return summary


def _ingest(
    sources: list[Path],
    found: list[Found],
    readers: list[CaptionReader],
    dataset: Path,
    summary: IngestSummary,
    max_megapixels: float,
    quality: int,
    image_format: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Do what `ingest` says, in a dataset that is locked."""
    for litter in (dataset / IMAGES_FOLDER).glob(".*.tmp"):
        # half-written by a kill
        litter.unlink()
    with warnings.catch_warnings(), ThreadPoolExecutor(NUM_SYNCS) as disk:
        collection = _Collection(dataset, summary, disk)
        # Pillow warns of photos over half its limit, which are only shrunk here, and of damage, which is listed anyway
        warnings.filterwarnings("ignore", module=r"PIL\.")
        results = _in_order(lambda item: _prepare(item.path, max_megapixels, image_format, quality), found)
        for num_done, (item, prepared) in enumerate(zip(found, results, strict=True), start=1):
            if isinstance(prepared, str):
                summary.rejected.append(Rejection(storable(str(item.path)), prepared))
            else:
                collection.add(item, prepared)
            if progress is not None:
                progress(num_done, len(found))
        collection.settle()
    for reader in readers:
        summary.rejected += reader.rejections
        summary.warnings += reader.warnings
    summary.photos = collection.photos
    _write_rejected(dataset, summary.rejected)
    if not collection.touched and not summary.num_duplicates:
        names = ", ".join(printable(source) for source in sources)
        if not summary.rejected:
            raise UserError(f"no photo found in {names}; give a folder that holds JPEG, PNG or WebP files")
        first = summary.rejected[0]
        raise UserError(
            f"no photo of {names} can be used, {len(summary.rejected)} rejected; the first: {printable(first.path)}: "
            f"{printable(first.reason)} (all: {dataset / REJECTED_NAME})"
        )
    write_manifest(dataset, summary.photos)
    for file in collection.replaced_files - {photo.file for photo in summary.photos}:
        (dataset / file).unlink(missing_ok=True)
