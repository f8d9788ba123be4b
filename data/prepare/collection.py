"""The dataset while `safelight prepare` builds it: photos of earlier calls and of this one, and their sources."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import unicodedata
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from safelight.data.atomic import atomic_write_bytes, sync_file, sync_folder
from safelight.data.manifest import IMAGES_FOLDER, MASKS_FOLDER, has_manifest, read_manifest
from safelight.data.photo import NO_CREDIT, Photo, Quality
from safelight.data.sources.caption import FILE_NAME, Caption, Rejection
from safelight.data.sources.captions import CaptionReader
from safelight.data.sources.roots import SourceFile, name_roots, place_of, read_sources, split_label
from safelight.text import counted, printable, storable
from safelight.untrusted import UnsafeFile, read_bytes

MAX_STEM_CHARACTERS = 64
# stored photos that are not synced yet; each takes more memory than its record
MAX_SYNCS = 64


@dataclass(frozen=True, slots=True)
class Note:
    """Something to know about the dataset. kind: notes of one kind are shown together."""

    kind: Literal[
        "file", "caption", "changed", "removed", "pruned", "source", "link", "near-copies", "mask", "detail", "exposure"
    ]
    text: str


@dataclass
class IngestSummary:
    """What one call did. photos: the whole manifest after the call; all other fields describe this call alone.

    num_of_source: photos by where they came from, a folder, or its name if the folder is unknown. near_copies: the
    groups of two or more photos. num_transparent: photos of this call that are transparent somewhere.
    num_captions_inherited, num_masks_inherited: photos that took over the caption, or the mask, of a dropped near-copy.
    """

    photos: list[Photo] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    num_duplicates: int = 0
    num_shrunk: int = 0
    num_copied: int = 0
    num_converted: int = 0
    num_transparent: int = 0
    num_of_source: dict[str, int] = field(default_factory=dict)
    near_copies: list[list[Photo]] = field(default_factory=list)
    num_near_copies_dropped: int = 0
    num_captions_inherited: int = 0
    num_masks_inherited: int = 0

    @property
    def warnings(self) -> list[str]:
        """The notes' texts."""
        return [note.text for note in self.notes]

    def note(self, kind: str, text: str) -> None:
        self.notes.append(Note(kind, printable(text)))

    def reject(self, source: SourceFile, reason: str, kind: str = "photo") -> None:
        self.rejected.append(Rejection(storable(str(source.path)), storable(reason), kind))


class NoPhotograph(str):
    """Why a picture is no photograph, though it can be read: one of an earlier call is removed by --prune."""


@dataclass(frozen=True)
class PreparedFile:
    """A source file as it will be stored in the dataset. mask: the file of its loss mask, empty without one."""

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
    quality: Quality
    mask: bytes = b""
    is_transparent: bool = False


def _safe_stem(stem: str) -> str:
    """Return the stem reduced to ASCII letters, digits, `-`, `_` and `.`, which every file system accepts."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-.")[:MAX_STEM_CHARACTERS].strip("-.") or "photo"


def _has_content(path: Path, content: bytes) -> bool:
    try:
        return read_bytes(path, len(content)) == content
    except (OSError, UnsafeFile):
        return False


def has_written_caption(photo: Photo) -> bool:
    """Return whether somebody wrote a photo's caption: it is no file name, not empty and not a captioner's."""
    return photo.caption_source != FILE_NAME and any(photo.captions) and not photo.captioner


def with_caption(photo: Photo, caption: Caption, tagger: str = "") -> Photo:
    """Return a photo with the caption of a copy of it, and what goes with that. tagger: who gave the copy its tags."""
    theirs = {"captions": caption.texts, "caption_source": caption.source, "captioner": caption.captioner}
    theirs |= {"settings": caption.settings}
    theirs |= {"credit": photo.credit if caption.credit == NO_CREDIT else caption.credit}
    if caption.tags or not photo.tagger:
        theirs |= {"tags": caption.tags, "tagger": tagger}
    return replace(photo, **theirs)


class Collection:
    """The new manifest while it is built: the photos of earlier calls, and those this call adds or replaces.

    touched: the photos (by index) that this call found. decoded: labels (`Photo.source`) of files that are pictures.
    pending: files with the same picture as a photo of another file; once all files are read, `find_moved` tells
    whether they are duplicates or that photo under a new name. compared: sha256 of the photos among which near-copies
    were looked for already. syncs: of the last stored photos; `flush` waits for them. lost: photos of earlier calls
    whose files are gone, by the hashes of original and stored file. returned: photos of which a model's caption, or its
    tags, gave way to what the source says. earlier_masks: (file, hash of the mask so far) of photos of earlier calls,
    by label.
    """

    def __init__(
        self,
        dataset: Path,
        readers: list[CaptionReader],
        files: list[SourceFile],
        summary: IngestSummary,
        disk: ThreadPoolExecutor,
        prune: bool,
    ):
        self.dataset, self.summary, self.disk, self.prune = dataset, summary, disk, prune
        self.syncs: deque[Future] = deque()
        self.has_written = False
        self.photos: list[Photo] = []
        self.touched: set[int] = set()
        self.decoded: set[str] = set()
        self.pending: list[tuple[SourceFile, int]] = []
        # hashes of original files, pixels and stored files share one dict: SHA-256 values never collide by chance
        self.index_of_hash: dict[str, int] = {}
        self.replaced_files: set[str] = set()
        self.lost: dict[str, Photo] = {}
        self.earlier_masks: dict[str, tuple[Path, str]] = {}
        self.returned: dict[str, list[Path]] = {"caption": [], "tags": []}
        for photo in read_manifest(dataset, may_be_empty=True) if has_manifest(dataset) else []:
            if (dataset / photo.file).is_file():
                self._put(len(self.photos), photo)
            else:
                self.lost |= {digest: photo for digest in (photo.origin_sha256, photo.sha256) if digest}
                self.replaced_files |= {photo.mask} - {""}
        self.compared = {photo.sha256 for photo in self.photos if photo.fingerprint}
        self.earlier_labels = {photo.source for photo in self.photos}
        self.folders = read_sources(dataset)
        self.names = name_roots([reader.root for reader in readers], files, self.folders, self.photos)
        self.root_of_name = {name: root for root, name in self.names.items()}
        self.present = {self.label(file) for file in files}
        masks = ((file.root, file.reader.mask_of(file.path)) for file in files)
        # pictures that earlier calls, before there were masks, may have taken for photos
        self.masks = {
            f"{self.names[root]}/{storable(mask.relative_to(root).as_posix())}" for root, mask in masks if mask
        }
        # files with pictures in them of which a part could not be read
        self.incomplete = {
            f"{self.names[reader.root]}/{storable(path.relative_to(reader.root).as_posix())}/"
            for reader in readers
            for path in reader.incomplete
        }

        # folders that earlier calls may have entered
        self.foreign = {
            f"{self.names[reader.root]}/{storable(path.relative_to(reader.root).as_posix())}/"
            for reader in readers
            for path in reader.foreign
        }
        self.unknown = {
            f"{self.names[reader.root]}/{storable(path.relative_to(reader.root).as_posix())}"
            for reader in readers
            for path in reader.unknown
        }

    def label(self, source: SourceFile) -> str:
        # interned, because the same label stands in several records
        return sys.intern(f"{self.names[source.root]}/{source.relative}")

    def _put(self, index: int, photo: Photo) -> None:
        self.photos[index : index + 1] = [photo]
        for digest in (photo.sha256, photo.origin_sha256, photo.content_sha256):
            if digest:
                self.index_of_hash.setdefault(digest, index)

    def add(self, source: SourceFile, prepared: PreparedFile | str) -> None:
        """Store a prepared file and add it to the manifest, or list it as a duplicate or as left out."""
        label = self.label(source)
        if isinstance(prepared, str):
            kept = "; the dataset keeps what was prepared earlier" if label in self.earlier_labels else ""
            if isinstance(prepared, NoPhotograph):
                self.masks.add(label)
                kept = ""
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

    def move(self, index: int, source: SourceFile, prepared: PreparedFile | str) -> None:
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
        if source.reader.mask_of(source.path) and not self.photos[index].mask:
            reason += "; the mask of this file is not used"
        self.summary.reject(source, reason, "duplicate")

    def _is_gone(self, photo: Photo) -> bool:
        """Return whether a photo that was not found in this call has left its source, or its source is dropped."""
        name, relative = split_label(photo.source)
        if name not in self.root_of_name:
            return self.prune or (name in self.folders and not os.path.lexists(self.folders[name]))
        if photo.source in self.unknown or photo.source.startswith(tuple(self.incomplete)):
            return False
        if self._why_no_photograph(photo):
            return True
        if photo.source in self.present:
            # if it could not be read, nothing is known about it
            return photo.source in self.decoded
        try:
            path = self.root_of_name[name] / relative
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            # behind a link that leads nowhere now, as to a disk that is not mounted, nothing is known
            return not any(parent.is_symlink() and not parent.exists() for parent in path.parents)
        except ValueError:
            return True
        except OSError:
            pass
        return False

    def _why_no_photograph(self, photo: Photo) -> str:
        """Return why a file that an earlier call took for a photo is none, in words behind its name; '' if it is."""
        if photo.source in self.masks:
            return "is no photograph but a mask"
        in_foreign = photo.source.startswith(tuple(self.foreign))
        return "is in a folder for thumbnails or deleted files" if in_foreign else ""

    def _store(self, source: SourceFile, prepared: PreparedFile, index: int | None) -> None:
        """Store a picture: a new one, or that of an earlier photo."""
        sha256 = hashlib.sha256(prepared.data).hexdigest()
        old = self.photos[index] if index is not None else None
        file = f"{IMAGES_FOLDER}/{_safe_stem(source.path.stem)}-{sha256[:8]}{prepared.suffix}"
        if old is not None and old.sha256 == sha256:
            file = old.file
        elif old is not None:
            self.replaced_files.add(old.file)
        self._write(file, prepared.data)
        mask, mask_sha256 = self._store_mask(source, prepared, old)
        caption = source.reader.read(source.path)
        lost = self.lost.get(prepared.origin_sha256) if old is None else None
        known = old or lost
        is_captioned = known is not None and bool(known.captioner)
        if is_captioned and not caption.is_written:
            # what a captioner wrote is in no source, and is better than nothing
            caption = replace(caption, texts=known.captions, source=known.caption_source, captioner=known.captioner)
        elif is_captioned and caption.texts != known.captions and not caption.captioner:
            self.returned["caption"].append(source.path)
        # and so with a tagger
        is_tagged = not caption.tags and known is not None and bool(known.tagger)
        if caption.tags and known is not None and known.tagger:
            self.returned["tags"].append(source.path)
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
            known.tags if is_tagged else caption.tags,
            caption.settings,
            caption.credit,
            prepared.quality,
            mask=mask,
            mask_sha256=mask_sha256,
            captioner=caption.captioner,
            tagger=known.tagger if is_tagged else "",
        )
        if lost is not None:
            for digest in (lost.origin_sha256, lost.sha256):
                self.lost.pop(digest, None)
            kept = [what for what, is_kept in (("caption", photo.captioner), ("tags", is_tagged)) if is_kept]
            keeps = f", with the {' and '.join(kept)} that a model wrote" if kept else ""
            self.summary.note("file", f"{lost.file} no longer existed; it was made anew from {source.path}{keeps}")
        index = len(self.photos) if index is None else index
        self._put(index, photo)
        self.touched.add(index)
        self.summary.num_shrunk += prepared.is_shrunk
        self.summary.num_copied += prepared.is_copied
        self.summary.num_converted += not (prepared.is_copied or prepared.is_shrunk)
        self.summary.num_transparent += prepared.is_transparent
        if prepared.warning:
            self.summary.note("file", f"{source.path}: {prepared.warning}")

    def _write(self, file: str, content: bytes) -> None:
        """Write a file of the dataset, if it is not there already."""
        stored = self.dataset / file
        if not _has_content(stored, content):
            atomic_write_bytes(stored, content, sync=False)
            self.syncs.append(self.disk.submit(sync_file, stored))
            self.has_written = True
            if len(self.syncs) > MAX_SYNCS:
                self.syncs.popleft().result()

    def _store_mask(self, source: SourceFile, prepared: PreparedFile, old: Photo | None) -> tuple[str, str]:
        """Store the mask of a photo, if any; return its file and hash."""
        file = sha256 = ""
        if prepared.mask:
            sha256 = hashlib.sha256(prepared.mask).hexdigest()
            file = f"{MASKS_FOLDER}/{_safe_stem(source.path.stem)}-{sha256[:8]}.png"
            self._write(file, prepared.mask)
        if old is not None:
            self.earlier_masks[self.label(source)] = source.path, old.mask_sha256
        if old is not None and old.mask != file:
            self.replaced_files |= {old.mask} - {""}
        return file, sha256

    def note_masks(self, photos: list[Photo]) -> None:
        """Say which masks are not what they were. photos: the new manifest."""
        for photo in photos:
            path, earlier = self.earlier_masks.get(photo.source, (Path(), photo.mask_sha256))
            if photo.mask_sha256 != earlier:
                gone = "its mask is gone, so that all of it is learned from now on"
                change = gone if not photo.mask else "its mask changed" if earlier else "it has a mask now"
                self.summary.note("mask", f"{path}: {change}")

    def flush(self) -> None:
        """Wait until every stored photo would survive a power cut."""
        while self.syncs:
            self.syncs.popleft().result()
        if self.has_written:
            for folder in (self.dataset / IMAGES_FOLDER, self.dataset / MASKS_FOLDER):
                if folder.is_dir():
                    sync_folder(folder)

    def _adopt_caption(self, index: int, duplicate: SourceFile) -> bool:
        """Return whether a photo took over the caption of its duplicate.

        It does if nobody wrote its own caption, which is a file name, empty or a captioner's, and somebody wrote one
        for the duplicate.
        """
        own = self.photos[index]
        if has_written_caption(own):
            return False
        caption = duplicate.reader.read(duplicate.path)
        if caption.is_written:
            self._put(index, with_caption(own, caption))
        return caption.is_written

    def take_stock(self) -> None:
        """Say which photos this call did not find in its sources, or drop them, and which sources the dataset has."""
        for photo in dict.fromkeys(self.lost.values()):
            self.summary.note("file", f"{photo.file} no longer exists; its line was removed from the manifest")
        kept = []
        for index, photo in enumerate(self.photos):
            name, relative = split_label(photo.source)
            if index in self.touched or not self._is_gone(photo):
                kept.append(photo)
                continue
            place = self.root_of_name[name] / relative if name in self.root_of_name else photo.source
            if self.prune:
                self.summary.note("pruned", f"{place}: {photo.file} was removed from the dataset")
                self.replaced_files |= {photo.file, photo.mask} - {""}
                continue
            kept.append(photo)
            if why := self._why_no_photograph(photo):
                self.summary.note(
                    "changed",
                    f"{place} {why}; the dataset keeps {photo.file}, and it is trained on (--prune removes it)",
                )
            elif photo.source in self.decoded:
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

    def note_links(self, files: list[SourceFile], readers: list[CaptionReader]) -> None:
        """Say how many photographs lie outside of their source, and what beside them was not read therefore."""
        links = [file.path for file in files if self.label(file) in self.decoded and file.reader.leads_out(file.path)]
        if links:
            lie = "lie" if len(links) > 1 else "lies"
            self.summary.note(
                "link",
                f"{counted(len(links), 'photograph')} {lie} behind links out of the folder, such as {links[0]}; the "
                "dataset has a copy of what is there",
            )
        if unread := sorted(path for reader in readers for path in reader.unread):
            self.summary.note(
                "link",
                f"{counted(len(unread), 'file')} with captions, settings or masks not read, behind links out of the "
                f"folder, such as {unread[0]}; give {os.path.realpath(unread[0].parent)} as a source of its own, or "
                "copy it",
            )

    def note_returned(self) -> None:
        """Say of how many photos the source's own captions and tags took the place of a model's."""
        for what, paths in self.returned.items():
            if not paths:
                continue
            option = "" if what == "caption" else " --tags FILE"
            have = "has" if len(paths) == 1 else "have"
            self.summary.note(
                "caption",
                f"{counted(len(paths), 'photograph')} {have} the {what} of the source, no longer a model's, such as "
                f"{paths[0]}; for the model's, which are remembered, run `safelight caption "
                f"{shlex.quote(str(self.dataset))}{option} --overwrite` again, with the options that it had",
            )

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
