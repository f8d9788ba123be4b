"""The files of one source: its folders, and the files in it that are folders themselves; what of them is not used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safelight.data.sources.arrow import ArrowFile, ArrowProcess
from safelight.data.sources.caption import Rejection
from safelight.data.sources.encodings import decode_text, is_caption
from safelight.data.sources.listing import (
    MASK_FOLDERS,
    MAX_ALIKE,
    NO_PICTURE,
    Listing,
    folded,
    list_folder,
    make_listing,
    pictures_by_form,
    stem_of,
    suffix_of,
)
from safelight.data.sources.packed import Packed, PackedPicture
from safelight.data.sources.tar import Tar
from safelight.errors import UserError
from safelight.text import printable, storable
from safelight.untrusted import UnsafeFile, is_inside, open_regular

LINK_OUT = "a link out of this folder, which is not followed; copy the file it points to"
BEHIND_LINK = (
    "in a folder that is a link out of this one, where only photographs are read; give the folder it points to as a "
    "source of its own"
)
# text encoders read at most a few hundred words; a larger file beside a photo is something else, such as a log
MAX_SIDECAR_BYTES = 2**20


@dataclass
class SourceTree:
    """The files below one source root; each folder is listed once.

    rejections, warnings: what cannot be used, added as it is come across. incomplete: packed files of which not
    everything could be read, and folders that could not be. unknown: photographs that could not be fetched. foreign:
    folders that are not entered, as no photographs are kept there. unread: captions, tables and masks in folders that
    are links out of the root.
    """

    root: Path
    rejections: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    incomplete: set[Path] = field(default_factory=set)
    unknown: set[Path] = field(default_factory=set)
    foreign: set[Path] = field(default_factory=set)
    unread: set[Path] = field(default_factory=set)
    # packed files, and the folders in them with their paths there
    packed: dict[Path, Packed] = field(default_factory=dict)
    _folders: dict[Path, tuple[Packed, str]] = field(default_factory=dict)
    _listings: dict[Path, Listing] = field(default_factory=dict)
    _unused_keys: set[str] = field(default_factory=set)
    _is_outside: dict[Path, bool] = field(default_factory=dict)
    _refused: set[Path] = field(default_factory=set)
    # of each folder of masks, the pictures near it by their folded names
    _masked_in: dict[Path, dict[str, Path]] = field(default_factory=dict)
    arrow: ArrowProcess = field(default_factory=ArrowProcess)

    def folders_of_pictures(self) -> list[Path]:
        """Return the folders listed so far that hold pictures."""
        return [folder for folder, listing in self._listings.items() if listing.pictures]

    def listing(self, folder: Path) -> Listing:
        """Return what a folder holds; each is read once. Raises OSError if it cannot be read."""
        if folder not in self._listings:
            self._listings[folder] = list_folder(folder)
        return self._listings[folder]

    def open_packed(self, path: Path) -> None:
        """Make a file that holds pictures a folder, as far as it can be read; what cannot is listed."""
        self._listings[path] = Listing()
        if path.parent in self._folders:
            self.reject(path, "a file with pictures inside another, which is not opened; unpack it", "other")
            return
        if self.leads_out(path):
            self.reject(path, LINK_OUT if os.path.islink(path) else BEHIND_LINK, "other")
            return
        try:
            packed = self._opened(path)
        except (UserError, OSError) as error:
            self.incomplete.add(path)
            is_system = isinstance(error, OSError)
            reason = f"cannot be read: {error.strerror}" if is_system else str(error).removeprefix(f"{path} is ")
            self.reject(path, reason, "other")
            return
        if not packed.is_complete:
            self.incomplete.add(path)
        self.rejections += packed.rejections
        self.packed[path] = packed
        for inner, (folders, files) in packed.folders.items():
            self._folders[path / inner] = packed, inner
            self._listings[path / inner] = make_listing(folders, files)

    def _opened(self, path: Path) -> Packed:
        if suffix_of(path.name) == ".tar":
            return Tar(path)
        file = ArrowFile(path, self.arrow)
        file.read_pictures()
        return file

    def close(self) -> None:
        """End the process that reads Arrow files, if there is one."""
        self.arrow.close()

    def is_packed(self, folder: Path) -> bool:
        """Return whether a folder is a packed file, or in one, that was opened."""
        return folder in self._folders

    def picture(self, path: Path) -> Path | PackedPicture:
        """Return where the bytes of a photo are."""
        if path.parent not in self._folders:
            return path
        packed, inner = self._folders[path.parent]
        return PackedPicture(packed, f"{inner}/{path.name}" if inner else path.name)

    def leave_out_texts(self, folder: Path) -> None:
        """List the captions of no photo and the tables of other forms in a folder that `listing` has read."""
        listing = self._listings[folder]
        for name in listing.unclaimed:
            reason = f"a text that belongs to no photograph: no picture in its folder is named {stem_of(name)}"
            self.reject(folder / name, reason)
        for name in listing.unclaimed_masks:
            reason = (
                "the mask of no photograph: its folder has no picture of this name, or it has another mask; if it is a "
                "photograph itself, rename it"
            )
            self.reject(folder / name, reason, "photo")
        for name in listing.foreign_folders:
            self.foreign.add(folder / name)
            self.reject(folder / name, "a folder for thumbnails or deleted files, which is not entered", "other")
        for name in listing.others:
            self.reject(folder / name, NO_PICTURE[suffix_of(name)], "other")

    def reject(self, path: Path, reason: str, kind: str = "caption") -> None:
        """List a file that is not used. kind: as of `Rejection`."""
        self.rejections.append(Rejection(storable(str(path)), storable(reason), kind))

    def mask_of(self, photo: Path) -> Path | None:
        """Return the loss mask that stands beside a photo, None if it has none, or one that is not read."""
        name = self.listing_or_empty(photo.parent).masks.get(photo.name)
        return None if name is None or self.refuses_link(photo.with_name(name)) else photo.with_name(name)

    def is_mask(self, path: Path) -> bool:
        """Return whether a picture is the loss mask of another one beside it."""
        return path.name in self.listing_or_empty(path.parent).masks.values()

    def may_mask(self, path: Path) -> Path | None:
        """Return the picture whose mask another picture may be by its name or folder, None if there is no such one.

        That is one beside it (a_mask.png, a.jpg), or if it lies in a folder of masks, one of its name in the folder
        above or in one beside that folder.
        """
        folder, listing = path.parent, self.listing_or_empty(path.parent)
        if path.name in listing.like_masks:
            return path.with_name(listing.like_masks[path.name])
        if folded(folder.name) not in MASK_FOLDERS or folder == self.root:
            return None
        if folder not in self._masked_in:
            above = self.listing_or_empty(folder.parent)
            beside = [folder.parent / name for name in above.folders if name != folder.name][:MAX_ALIKE]
            owners: dict[str, Path] = {}
            for place in (folder.parent, *beside):
                for form, picture in pictures_by_form(self.listing_or_empty(place)).items():
                    owners.setdefault(form, place / picture)
            self._masked_in[folder] = owners
        owners = self._masked_in[folder]
        return owners.get(folded(path.name)) or owners.get(folded(stem_of(path.name)))

    def listing_or_empty(self, folder: Path) -> Listing:
        """Return what a folder holds, nothing if it cannot be read."""
        try:
            return self.listing(folder)
        except OSError:
            return self._listings.setdefault(folder, Listing())

    def refuses_link(self, path: Path) -> bool:
        """Return whether a caption, table or mask is not read because it leads out of the source, after listing it."""
        if not self.leads_out(path):
            return False
        if not os.path.islink(path):
            self.unread.add(path)
        elif path not in self._refused:
            self.reject(path, LINK_OUT)
        self._refused.add(path)
        return True

    def text(self, path: Path, max_bytes: int, as_caption: bool = False) -> str | None:
        """Return a file's text, or None if it is too large or cannot be read. Adds a warning or a rejection then.

        as_caption: the whole text is a caption, so that nothing else tells that the file is no text.
        """
        if self.refuses_link(path):
            return None
        try:
            content = self._content(path, max_bytes)
        except UnsafeFile as error:
            self.reject(path, str(error).removeprefix(f"{path} is "))
            return None
        except OSError as error:
            self.warnings.append(f"{printable(path)} cannot be read: {error.strerror}")
            return None
        if isinstance(content, int):
            limit = f"{content:,} bytes are too many for captions (limit {max_bytes:,})"
            self.warnings.append(f"{printable(path)} was ignored: {limit}")
            return None
        text, note = decode_text(content)
        if as_caption and not is_caption(text):
            self.reject(path, "not text, or in an unknown encoding; delete it, or save it as UTF-8")
            return None
        if note:
            self.warnings.append(f"{printable(path)} {note}")
        return text

    def _content(self, path: Path, max_bytes: int) -> bytes | int:
        """Return a file's bytes, or how many they are if they are more than max_bytes."""
        picture = self.picture(path)
        if isinstance(picture, PackedPicture):
            return picture.size if picture.size > max_bytes else picture.read()
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            return size if size > max_bytes else file.read()

    def leads_out(self, path: Path) -> bool:
        """Return whether a file lies outside of the source: it is a link out of it, or in a folder that is."""
        if os.path.islink(path):
            return not is_inside(path, self.root)
        folder = path.parent
        if folder not in self._is_outside:
            self._is_outside[folder] = not is_inside(folder, self.root)
        return self._is_outside[folder]

    def find(self, folder: Path, name: str) -> str | None:
        """Return the name of a file below a folder as it is written there, None if there is no such file."""
        *above, last = name.split("/")
        found = folder
        for part in above:
            actual = self.listing_or_empty(found).find(part)
            if actual is None:
                return None
            found = found / actual
        actual = self.listing_or_empty(found).find(last)
        return None if actual is None else storable((found / actual).relative_to(folder).as_posix())

    def say_unused(self, path: Path, keys: list[str]) -> None:
        """Add a note on keys of a file that are not used, each once."""
        new = [key for key in keys if key not in self._unused_keys]
        self._unused_keys.update(new)
        if new:
            self.warnings.append(f"{printable(path)} sets {printable(', '.join(new))}, which is not used here")

    def from_known(self, folder: Path, known: dict) -> Iterable[Path]:
        """Return the folders from the root down to this one that are not in `known`."""
        missing = []
        while folder not in known:
            missing.append(folder)
            if folder == self.root:
                break
            folder = folder.parent
        return reversed(missing)
