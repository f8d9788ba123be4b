"""What a folder holds: pictures, the texts that belong to each, tables, and files that are neither.

Names are matched as the file systems of cameras, Windows and macOS write them: in any letter case, and with accents
composed or decomposed.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safelight.text import storable

# of the loss mask of a photo, ours, OneTrainer's and one that is easily written: IMG_1-mask.png beside IMG_1.jpg
MASK_ENDINGS = ("-mask.png", "-masklabel.png", ".mask.png")
# how other tools and people name a mask: behind the picture's name, perhaps with a number, or in front of it
_LIKE_A_MASK = (
    re.compile(r"(.+?)[-_ .]*masks?(?:[-_ .]?label)?[-_ .]*(?:[0-9]{1,3}|\([0-9]{1,3}\))?", re.IGNORECASE),
    re.compile(r"masks?[-_ .]+(.+)", re.IGNORECASE),
)
# folders of masks, which have the names of the pictures in the folder above, or in one beside
MASK_FOLDERS = ("mask", "masks")
# in lower case: thumbnails and deleted files, kept by network drives, Windows, macOS and Linux
FOREIGN_FOLDERS = {
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__macosx",
}
# of a text alone, of captions with settings, and of a class in WebDataset; the first are read first
SIDECAR_SUFFIXES = (".txt", ".caption", ".yaml", ".yml", ".json", ".cls")
TABLE_NAMES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "metadata.parquet")
# EveryDream's files with one setting for the photos of a folder
SETTING_OF_FILE = {
    "multiply.txt": "repeats",
    "cond_dropout.txt": "caption_dropout",
    "flip_p.txt": "flip_p",
    "batch_id.txt": "batch_id",
    "loss_scale.txt": "loss_scale",
    "shuffle_tags.txt": "shuffle_tags",
}
# and with several: for the photos of a folder, and for those of the folders below as well
LOCAL_NAMES = ("local.yaml", "local.yml")
GLOBAL_NAMES = ("global.yaml", "global.yml")
# files that hold pictures: WebDataset's, and those of Hugging Face datasets
PACKED_SUFFIXES = (".tar", ".parquet", ".arrow")
# what the datasets library writes beside its .arrow files
DATASET_INFO, DATASET_STATE, DATASET_DICT = "dataset_info.json", "state.json", "dataset_dict.json"
# as file systems have it
MAX_NAME_CHARACTERS = 255
# names that differ in letter case or accents alone, to which a sidecar may belong
MAX_ALIKE = 16
WRITE_TABLE = 'write its captions as metadata.jsonl, one {"file_name": "IMG_1.jpg", "text": "a dog"} a line'
# files that stand beside photographs and are none: what they are, and what to do if their captions are wanted
_NO_PICTURES = {
    (".csv", ".tsv"): "a table of another name, which is not read; if it has captions, name it metadata.csv",
    (
        ".json",
    ): f"a JSON file (other programs keep captions or settings in such files), which is not read; {WRITE_TABLE}",
    (".yaml", ".yml"): "settings of no photograph: no picture in its folder has this name; EveryDream's names for the "
    "settings of a folder are local.yaml and global.yaml",
    (".jsonl", ".ndjson"): "a table of another name, which is not read; if it has captions, name it metadata.jsonl",
    (".arrow",): "a cache of the datasets library, not its data",
    (".xmp",): "metadata of another program, which is not read; write its caption into a .txt file of the same name",
    (".npz", ".npy", ".safetensors"): "arrays, such as another trainer's cache, not an image",
    (".zip", ".gz", ".tgz", ".7z", ".rar"): "a compressed archive, which is not opened; unpack it",
    (".mp4", ".mov", ".avi", ".mkv", ".webm"): "a video, not an image",
    (".md", ".html", ".pdf", ".ini", ".db", ".log", ".aae"): "a document or another program's file, not an image",
}
NO_PICTURE = {suffix: reason for suffixes, reason in _NO_PICTURES.items() for suffix in suffixes}


def folded(name: str) -> str:
    """Return a name as it is compared: in lower case, accents composed."""
    return unicodedata.normalize("NFC", storable(name)).casefold()


def stem_of(name: str) -> str:
    return os.path.splitext(name)[0]


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@dataclass
class Listing:
    """The names in one folder, sorted, hidden ones left out.

    foreign_folders: those in which systems keep thumbnails and deleted files, which are not entered. packed: files that
    hold pictures. settings: EveryDream's files with settings of the folder. sidecars: of each picture, the one that is
    read first at the front. unclaimed: texts of no picture.
    """

    folders: list[str] = field(default_factory=list)
    foreign_folders: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unclaimed: list[str] = field(default_factory=list)
    sidecars: dict[str, list[str]] = field(default_factory=dict)
    # the loss mask of each picture that has one, and the masks of none
    masks: dict[str, str] = field(default_factory=dict)
    unclaimed_masks: list[str] = field(default_factory=list)
    # pictures that, by their names, may be the mask of another one, with that one
    like_masks: dict[str, str] = field(default_factory=dict)

    @cached_property
    def by_folded(self) -> dict[str, list[str]]:
        """Pictures, folders and packed files by their folded names: for folders with a table that names them."""
        names: dict[str, list[str]] = {}
        for name in (*self.folders, *self.packed, *self.pictures):
            names.setdefault(folded(name), []).append(name)
        return names

    def find(self, name: str) -> str | None:
        """Return the picture or folder of this name, in whatever form it is written; None if none or several fit."""
        if len(name) > MAX_NAME_CHARACTERS and not name.isascii():
            # bringing n accents on one letter into order takes time of order n^2
            return None
        names = self.by_folded.get(folded(name), [])
        composed = unicodedata.normalize("NFC", name)
        exact = [other for other in names if unicodedata.normalize("NFC", storable(other)) == composed]
        return (exact or names)[0] if len(exact or names) == 1 else None


def list_folder(folder: Path) -> Listing:
    """Return what a folder holds. Raises OSError if it cannot be read."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            (folders if os.path.isdir(entry.path) else files).append(entry.name)
    return make_listing(folders, files)


def make_listing(folders: list[str], files: list[str]) -> Listing:
    """Return the listing of a folder with these names in it."""
    listing, sidecars = Listing(), []
    for name in sorted(name for name in folders if not name.startswith(".")):
        (listing.foreign_folders if name.lower() in FOREIGN_FOLDERS else listing.folders).append(name)
    for name in sorted(files):
        suffix = suffix_of(name)
        if name.startswith("."):
            continue
        if name.lower() in TABLE_NAMES:
            listing.tables.append(name)
        elif suffix == ".arrow" and name.startswith("cache-"):
            listing.others.append(name)
        elif suffix in PACKED_SUFFIXES:
            listing.packed.append(name)
        elif suffix in SIDECAR_SUFFIXES:
            sidecars.append(name)
        elif suffix in NO_PICTURE:
            listing.others.append(name)
        else:
            listing.pictures.append(name)
    _take_masks(listing)
    _note_masklike(listing)
    _assign(sidecars, listing)
    _sort_out(listing)
    return listing


def _take_masks(listing: Listing) -> None:
    """Move the masks out of the pictures, to the pictures that each names, with their suffix or without."""
    masks = [name for name in listing.pictures if name.lower().endswith(MASK_ENDINGS)]
    if not masks:
        return
    listing.pictures = [name for name in listing.pictures if name not in set(masks)]
    pictures: dict[str, list[str]] = {}
    for picture in listing.pictures:
        for form in {folded(picture), folded(stem_of(picture))}:
            pictures.setdefault(form, []).append(picture)
    for mask in masks:
        base = mask[: -len(next(ending for ending in MASK_ENDINGS if mask.lower().endswith(ending)))]
        alike = pictures.get(folded(base), [])
        exact = [picture for picture in alike if base in (picture, stem_of(picture))]
        free = [picture for picture in (exact or alike)[:MAX_ALIKE] if picture not in listing.masks]
        listing.masks |= dict.fromkeys(free, mask)
        if not free:
            listing.unclaimed_masks.append(mask)


def _note_masklike(listing: Listing) -> None:
    """Note which pictures are named as another one's mask, though not as masks are read: a_mask.png beside a.jpg."""
    named = [name for name in listing.pictures if "mask" in name.lower()]
    if not named:
        return
    pictures = pictures_by_form(listing)
    for name in named:
        stem = stem_of(name)
        found = [match[1] for pattern in _LIKE_A_MASK if (match := pattern.fullmatch(stem))]
        owner = next((pictures[form] for form in map(folded, found) if form in pictures), None)
        if owner is not None and owner != name:
            listing.like_masks[name] = owner


def pictures_by_form(listing: Listing) -> dict[str, str]:
    """Return the first picture of each folded name, with and without its suffix."""
    pictures: dict[str, str] = {}
    for picture in listing.pictures:
        for form in (folded(picture), folded(stem_of(picture))):
            pictures.setdefault(form, picture)
    return pictures


def _sort_out(listing: Listing) -> None:
    """Find what the texts that belong to no picture are: settings of the folder, records of a library, or nothing."""
    unclaimed, listing.unclaimed = listing.unclaimed, []
    is_arrow = any(suffix_of(name) == ".arrow" for name in listing.packed)
    for name in unclaimed:
        if name.lower() in (*SETTING_OF_FILE, *LOCAL_NAMES, *GLOBAL_NAMES):
            listing.settings.append(name)
        elif name == DATASET_DICT or (is_arrow and name in (DATASET_INFO, DATASET_STATE)):
            continue
        elif suffix_of(name) in NO_PICTURE:
            listing.others.append(name)
        else:
            listing.unclaimed.append(name)


def _assign(sidecars: list[str], listing: Listing) -> None:
    """Give each sidecar to the pictures that it belongs to."""
    # a sidecar names a picture with its suffix or without: IMG_1.jpg.txt, IMG_1.txt
    owners: dict[str, list[tuple[str, bool]]] = {}
    for picture in listing.pictures:
        for name, is_whole in {picture: True, stem_of(picture): False}.items():
            for form in {name, folded(name)}:
                owners.setdefault(form, []).append((picture, is_whole))
    ranked: dict[str, list[tuple]] = {}
    for sidecar in sidecars:
        base, suffix = stem_of(sidecar), suffix_of(sidecar)
        # of img.jpg and IMG.jpg, img.txt belongs to the first alone
        exact = [
            (picture, is_whole) for picture, is_whole in owners.get(base, []) if base in (picture, stem_of(picture))
        ]
        alike = owners.get(folded(base), [])
        if not exact and not 0 < len(alike) <= MAX_ALIKE:
            listing.unclaimed.append(sidecar)
            continue
        for picture, is_whole in exact or alike:
            rank = (SIDECAR_SUFFIXES.index(suffix), not is_whole, not exact, not sidecar.endswith(suffix), sidecar)
            ranked.setdefault(picture, []).append(rank)
    listing.sidecars = {picture: [rank[-1] for rank in sorted(ranks)] for picture, ranks in ranked.items()}
