"""Find what is said of a photo: in files beside it, tables, settings of its folders, and its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.data.photo import MAX_CAPTIONS, MAX_TAGS, NO_CREDIT, USUAL_SETTINGS, Tag, settings_of
from safelight.data.sources.caption import FILE_NAME, Caption, caption_of_name, is_camera_name
from safelight.data.sources.caption_tables import CaptionTables
from safelight.data.sources.entry import Entry, entry_of
from safelight.data.sources.folder_settings import (
    FolderSettings,
    entry_of_yaml,
    kohya_doubt,
    kohya_entry,
    looks_like_kohya,
)
from safelight.data.sources.listing import NO_PICTURE, suffix_of
from safelight.data.sources.source_tree import MAX_SIDECAR_BYTES, SourceTree
from safelight.data.sources.tag_text import split_tags, united
from safelight.errors import UserError
from safelight.text import collapse, printable, shortened
from safelight.untrusted import parse_json


@dataclass
class CaptionReader(SourceTree):
    """The files of a source, and what they say of its photos.

    kohya: folder names like `10_my dog` are repeats and captions. comma_tags: captions are lists; what follows the
    first comma are tags.
    """

    kohya: bool = False
    comma_tags: bool = False

    def __post_init__(self) -> None:
        self._tables = CaptionTables(self)
        self._settings = FolderSettings(self)

    def hint_at_kohya(self) -> None:
        """Add a note if the folders that were listed are named as kohya's, and were not read so, all or some."""
        named = [folder.name for folder in self.folders_of_pictures()]
        if self.kohya:
            doubts: dict[str, list[str]] = {}
            for name in named:
                doubts.setdefault(kohya_doubt(name), []).append(name)
            for doubt, (first, *others) in doubts.items():
                if doubt:
                    shown = printable(shortened(first, 40)) + (f" and {len(others):,} more" if others else "")
                    self.warnings.append(f"--kohya: of {shown}, {doubt}")
        elif looks_like_kohya(named):
            repeats, _, caption = named[0].partition("_")
            self.warnings.append(
                f"{printable(named[0])} is named as a folder of kohya's: with --kohya each of its photographs is used "
                f"{repeats} times an epoch, with the caption {printable(caption)!r} if it has no other"
            )

    def read(self, photo: Path) -> Caption:
        """Return what the sources say of a photo at or below the root.

        They are asked in this order: files beside it, NAME.jpg.txt before NAME.txt, then the same with .caption, .yaml,
        .yml, .json and .cls; the tables of its folder (metadata.jsonl, captions.jsonl, metadata.csv, metadata.parquet),
        then those of each folder above, up to the root; local.yaml and multiply.txt and the like in its folder;
        global.yaml in its folder, then in each folder above; a kohya folder's name; its own name. The captions, each
        setting and the credit are those of the first source that gives them; the tags of all are united. A name that is
        equal wins over one that differs in letter case or accents. An empty text is skipped with a warning.
        """
        entries = [*self._beside(photo), *self._tables.entries_of(photo), *self._settings.entries_of(photo.parent)]
        if self.kohya and (entry := kohya_entry(photo.parent.name)):
            entries.append(entry)
        return self._united(photo, entries)

    def _united(self, photo: Path, entries: list[Entry]) -> Caption:
        values: dict = {}
        for entry in reversed(entries):
            values |= entry.settings
        settings = settings_of(values) if values else USUAL_SETTINGS
        tags = united(tag for entry in entries for tag in entry.tags)
        first = next((entry for entry in entries if entry.texts), None)
        if first is None:
            name = caption_of_name(photo.stem)
            first = Entry(FILE_NAME, ("" if tags and is_camera_name(name) else name,), is_typed=True)
            if not name and not tags:
                self.warnings.append(
                    f"{printable(photo)} has no caption, not even in its file name; it will be trained on with an "
                    "empty one"
                )
        texts = first.texts
        if first.is_typed:
            texts, typed = _without_tags(texts, self.comma_tags or bool(settings.shuffle_tags))
            tags = united((*typed, *tags))
        if len(tags) > MAX_TAGS:
            self.warnings.append(f"{printable(photo)} has {len(tags):,} tags; only the first {MAX_TAGS:,} are used")
        if len(texts) > MAX_CAPTIONS:
            self.warnings.append(
                f"{printable(photo)} has {len(texts):,} captions; only the first {MAX_CAPTIONS:,} are used"
            )
        credit = next((entry.credit for entry in entries if entry.credit != NO_CREDIT), NO_CREDIT)
        return Caption(texts[:MAX_CAPTIONS], first.source, tags[:MAX_TAGS], settings, credit, first.captioner)

    def _beside(self, photo: Path) -> Iterator[Entry]:
        """Yield what the files beside a photo say, the first to be heard first. Of texts, only one is read."""
        has_text = False
        for name in self.listing_or_empty(photo.parent).sidecars.get(photo.name, ()):
            path, suffix = photo.with_name(name), suffix_of(name)
            is_text = suffix in (".txt", ".caption", ".cls")
            if is_text and has_text:
                continue
            text = self.text(path, MAX_SIDECAR_BYTES, as_caption=is_text)
            if text is None:
                continue
            if is_text and not collapse(text):
                self.warnings.append(f"{printable(path)} is empty and was ignored")
            elif suffix == ".cls" and text.strip().isdigit():
                # a class by its number has no name here
                continue
            elif is_text:
                has_text = True
                yield Entry(f"sidecar {suffix}", (collapse(text),), is_typed=True)
            elif entry := self._record(path, text):
                has_text = has_text or bool(entry.texts)
                yield entry

    def _record(self, path: Path, text: str) -> Entry | None:
        """Return what a YAML or JSON file beside a photo says, or None if that is nothing or cannot be used."""
        suffix = suffix_of(path.name)
        try:
            if suffix == ".json":
                row = parse_json(text)
                entry = entry_of(row, "sidecar .json") if isinstance(row, dict) else Entry("")
            else:
                entry, unused = entry_of_yaml(text, f"sidecar {suffix}")
                self.say_unused(path, unused)
        except UserError as error:
            self.reject(path, f"not used: {error}")
            return None
        if not entry.says_something:
            reason = NO_PICTURE[".json"] if suffix == ".json" else "it holds neither captions nor settings"
            self.reject(path, reason, "other" if suffix == ".json" else "caption")
            return None
        return entry


def _without_tags(texts: tuple[str, ...], is_list: bool) -> tuple[tuple[str, ...], tuple[Tag, ...]]:
    """Return (captions, tags) of captions in which tags may stand. is_list: tags also follow the first comma."""
    captions, tags = [], []
    for text in texts:
        caption, found = split_tags(text)
        if is_list and not found and len(texts) == 1:
            caption, *others = map(str.strip, caption.split(","))
            found = tuple(Tag(name) for name in others if name)
        captions.append(caption)
        tags += found
    return tuple(dict.fromkeys(captions)), united(tags)
