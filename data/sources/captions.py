"""Find what is said of a photo: in files beside it, tables, settings of its folders, and its name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safelight.data.photo import MAX_TAGS, NO_CREDIT, USUAL_SETTINGS, Tag, settings_of
from safelight.data.sources.arrow import ArrowFile, ArrowProcess
from safelight.data.sources.caption import FILE_NAME, Caption, Rejection, caption_of_name, is_camera_name
from safelight.data.sources.encodings import decode_text
from safelight.data.sources.entry import Entry, entry_of
from safelight.data.sources.folder_settings import (
    entry_of_file,
    entry_of_yaml,
    inherited_entries,
    kohya_entry,
    looks_like_kohya,
    own_entries,
)
from safelight.data.sources.listing import (
    NO_PICTURE,
    TABLE_NAMES,
    Listing,
    list_folder,
    make_listing,
    stem_of,
    suffix_of,
)
from safelight.data.sources.packed import Packed, PackedPicture
from safelight.data.sources.tables import csv_rows, json_rows, name_in_row, normal_name
from safelight.data.sources.tag_text import split_tags, united
from safelight.data.sources.tar import Tar
from safelight.errors import UserError
from safelight.text import collapse, printable, shortened, storable
from safelight.untrusted import UnsafeFile, is_link_out, open_regular, parse_json

# text encoders read at most a few hundred words; a larger file beside a photo is something else, such as a log
MAX_SIDECAR_BYTES = 2**20
# rows of a million photos
MAX_TABLE_BYTES = 2**28
MAX_TABLE_ROWS = 2_000_000
# of each table; of further ones only the number is kept
MAX_LISTED_ROWS = 1000


@dataclass
class CaptionReader:
    """Finds the captions of the photos below one source root.

    kohya: folder names like `10_my dog` are repeats and captions. comma_tags: captions are lists; what follows the
    first comma are tags. rejections, warnings: what it could not use, added as `read` comes across it. incomplete:
    packed files of which not everything could be read.
    """

    root: Path
    kohya: bool = False
    comma_tags: bool = False
    rejections: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    incomplete: set[Path] = field(default_factory=set)
    _listings: dict[Path, Listing] = field(default_factory=dict)
    # of each folder, the tables in it and in the folders above it, nearest first
    _tables: dict[Path, list[tuple[Path, dict[str, Entry]]]] = field(default_factory=dict)
    # of each folder, what it says of the photos in it and below, and of those in it alone, the first to be heard first
    _inherited: dict[Path, list[Entry]] = field(default_factory=dict)
    _own: dict[Path, list[Entry]] = field(default_factory=dict)
    # packed files, and the folders in them with their paths there
    _packed: dict[Path, Packed] = field(default_factory=dict)
    _folders: dict[Path, tuple[Packed, str]] = field(default_factory=dict)
    _unused_keys: set[str] = field(default_factory=set)
    _arrow: ArrowProcess = field(default_factory=ArrowProcess)

    def listing(self, folder: Path) -> Listing:
        """Return what a folder holds; each is read once. Raises OSError if it cannot be read."""
        if folder not in self._listings:
            self._listings[folder] = list_folder(folder)
        return self._listings[folder]

    def open_packed(self, path: Path) -> None:
        """Make a file that holds pictures a folder, as far as it can be read; what cannot is listed."""
        self._listings[path] = Listing()
        if path.parent in self._folders:
            self._reject(path, "a file with pictures inside another, which is not opened; unpack it", "other")
            return
        if self._leads_out_said(path):
            return
        try:
            packed = self._opened(path)
        except (UserError, OSError) as error:
            self.incomplete.add(path)
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._reject(path, str(reason).removeprefix(f"{path} is "), "other")
            return
        if not packed.is_complete:
            self.incomplete.add(path)
        self.rejections += packed.rejections
        self._packed[path] = packed
        for inner, (folders, files) in packed.folders.items():
            self._folders[path / inner] = packed, inner
            self._listings[path / inner] = make_listing(folders, files)

    def _opened(self, path: Path) -> Packed:
        if suffix_of(path.name) == ".tar":
            return Tar(path)
        file = ArrowFile(path, self._arrow)
        file.read_pictures()
        return file

    def close(self) -> None:
        """End the process that reads Arrow files, if there is one."""
        self._arrow.close()

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
            self._reject(folder / name, reason)
        for name in listing.unclaimed_masks:
            reason = (
                "the mask of no photograph: its folder has no picture of this name, or it has another mask; if it is a "
                "photograph itself, rename it"
            )
            self._reject(folder / name, reason, "photo")
        for name in listing.others:
            self._reject(folder / name, NO_PICTURE[suffix_of(name)], "other")

    def hint_at_kohya(self) -> None:
        """Add a note if the folders that were listed are named as kohya's, and were not read so."""
        named = [folder.name for folder, listing in self._listings.items() if listing.pictures]
        if not self.kohya and looks_like_kohya(named):
            repeats, _, caption = named[0].partition("_")
            self.warnings.append(
                f"{printable(named[0])} is named as a folder of kohya's: with --kohya each of its photographs is used "
                f"{repeats} times an epoch, with the caption {printable(caption)!r} if it has no other"
            )

    def _reject(self, path: Path, reason: str, kind: str = "caption") -> None:
        self.rejections.append(Rejection(storable(str(path)), storable(reason), kind))

    def read(self, photo: Path) -> Caption:
        """Return what the sources say of a photo at or below the root.

        They are asked in this order: files beside it, NAME.jpg.txt before NAME.txt, then the same with .caption, .yaml,
        .yml, .json and .cls; the tables of its folder (metadata.jsonl, captions.jsonl, metadata.csv, metadata.parquet),
        then those of each folder above, up to the root; local.yaml and multiply.txt and the like in its folder;
        global.yaml in its folder, then in each folder above; a kohya folder's name; its own name. The captions, each
        setting and the credit are those of the first source that gives them; the tags of all are united. A name that is
        equal wins over one that differs in letter case or accents. An empty text is skipped with a warning.
        """
        folder = photo.parent
        entries = [*self._beside(photo)]
        for place, table in self._tables_for(folder):
            entry = table.get(storable(photo.relative_to(place).as_posix()))
            if entry is not None:
                entries.append(entry)
        entries += self._settings_of(folder)
        if self.kohya and (entry := kohya_entry(folder.name)):
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
        credit = next((entry.credit for entry in entries if entry.credit != NO_CREDIT), NO_CREDIT)
        return Caption(texts, first.source, tags[:MAX_TAGS], settings, credit, first.captioner)

    def _beside(self, photo: Path) -> Iterator[Entry]:
        """Yield what the files beside a photo say, the first to be heard first. Of texts, only one is read."""
        has_text = False
        for name in self._listing_or_empty(photo.parent).sidecars.get(photo.name, ()):
            path, suffix = photo.with_name(name), suffix_of(name)
            is_text = suffix in (".txt", ".caption", ".cls")
            if is_text and has_text:
                continue
            text = self._text(path, MAX_SIDECAR_BYTES)
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
                self._say_unused(path, unused)
        except UserError as error:
            self._reject(path, f"not used: {error}")
            return None
        if not entry.says_something:
            reason = NO_PICTURE[".json"] if suffix == ".json" else "it holds neither captions nor settings"
            self._reject(path, reason, "other" if suffix == ".json" else "caption")
            return None
        return entry

    def _say_unused(self, path: Path, keys: list[str]) -> None:
        new = [key for key in keys if key not in self._unused_keys]
        self._unused_keys.update(new)
        if new:
            self.warnings.append(f"{printable(path)} sets {printable(', '.join(new))}, which is not used here")

    def _settings_of(self, folder: Path) -> list[Entry]:
        """Return what a folder and those above it, up to the root, say of the photos in it, nearest first."""
        if folder not in self._own:
            self._own[folder] = own_entries(
                self._listing_or_empty(folder), lambda name: self._folder_entry(folder / name)
            )
        return self._own[folder] + self._inherited_by(folder)

    def _inherited_by(self, folder: Path) -> list[Entry]:
        for current in self._from_known(folder, self._inherited):
            own = inherited_entries(
                self._listing_or_empty(current), lambda name, place=current: self._folder_entry(place / name)
            )
            above = self._inherited[current.parent] if current != self.root else []
            self._inherited[current] = own + above
        return self._inherited[folder]

    def _folder_entry(self, path: Path) -> Entry | None:
        text = self._text(path, MAX_SIDECAR_BYTES)
        if text is None:
            return None
        try:
            entry, unused = entry_of_file(path.name, text)
        except UserError as error:
            self._reject(path, f"not used: {error}")
            return None
        self._say_unused(path, unused)
        return entry

    def _from_known(self, folder: Path, known: dict) -> Iterable[Path]:
        """Return the folders from the root down to this one that are not in `known`."""
        missing = []
        while folder not in known:
            missing.append(folder)
            if folder == self.root:
                break
            folder = folder.parent
        return reversed(missing)

    def mask_of(self, photo: Path) -> Path | None:
        """Return the loss mask that stands beside a photo, None if it has none."""
        name = self._listing_or_empty(photo.parent).masks.get(photo.name)
        return None if name is None else photo.with_name(name)

    def is_mask(self, path: Path) -> bool:
        """Return whether a picture is the loss mask of another one beside it."""
        return path.name in self._listing_or_empty(path.parent).masks.values()

    def _listing_or_empty(self, folder: Path) -> Listing:
        try:
            return self.listing(folder)
        except OSError:
            return self._listings.setdefault(folder, Listing())

    def _tables_for(self, folder: Path) -> list[tuple[Path, dict[str, Entry]]]:
        """Return the tables in a folder and in those above it, up to the root, each with its captions by file name."""
        for current in self._from_known(folder, self._tables):
            names = sorted(self._listing_or_empty(current).tables, key=lambda name: TABLE_NAMES.index(name.lower()))
            own = [(current, self._read_table(current / name)) for name in names]
            if current in self._packed:
                own.append((current, self._packed[current].entries))
            above = self._tables[current.parent] if current != self.root else []
            self._tables[current] = [(place, table) for place, table in own if table] + above
        return self._tables[folder]

    def _leads_out_said(self, path: Path) -> bool:
        if self.leads_out(path):
            self._reject(path, "a link out of this folder, which is not followed; copy the file it points to")
            return True
        return False

    def _text(self, path: Path, max_bytes: int) -> str | None:
        """Return a file's text, or None if it is too large or cannot be read. Adds a warning or a rejection then."""
        if self._leads_out_said(path):
            return None
        try:
            content = self._content(path, max_bytes)
        except UnsafeFile as error:
            self._reject(path, str(error).removeprefix(f"{path} is "))
            return None
        except OSError as error:
            self.warnings.append(f"{printable(path)} cannot be read: {error.strerror}")
            return None
        if isinstance(content, int):
            limit = f"{content:,} bytes are too many for captions (limit {max_bytes:,})"
            self.warnings.append(f"{printable(path)} was ignored: {limit}")
            return None
        text, note = decode_text(content)
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
        """Return whether a file is a link that ends outside of both the source and the folder that it was found in.

        The two differ if that folder is itself below a link, which the user made.
        """
        return is_link_out(path, path.parent) and is_link_out(path, self.root)

    def _find(self, folder: Path, name: str) -> str | None:
        """Return the name of a file below a folder as it is written there, None if there is no such file."""
        *above, last = name.split("/")
        found = folder
        for part in above:
            actual = self._listing_or_empty(found).find(part)
            if actual is None:
                return None
            found = found / actual
        actual = self._listing_or_empty(found).find(last)
        return None if actual is None else storable((found / actual).relative_to(folder).as_posix())

    def _rows(self, path: Path) -> Iterator[tuple[int, dict | UserError]]:
        """Yield (number, row or what is wrong with it) for the rows of a table, as far as it can be read."""
        suffix = suffix_of(path.name)
        if suffix != ".parquet":
            text = self._text(path, MAX_TABLE_BYTES) or ""
            yield from csv_rows(text) if suffix == ".csv" else json_rows(text)
        elif not self._leads_out_said(path):
            try:
                yield from ArrowFile(path, self._arrow).rows()
            except (UserError, OSError) as error:
                self._reject(path, str(error).removeprefix(f"{path} is "))

    def _read_table(self, path: Path) -> dict[str, Entry]:
        """Return a table's captions by the names of existing files, relative to its folder."""
        entries: dict[str, Entry] = {}
        shown = storable(str(path))
        num_bad = 0
        for number, row in self._rows(path):
            if number > MAX_TABLE_ROWS:
                reason = f"the rows from this one on, as a table may have {MAX_TABLE_ROWS:,}; split it by folder"
                self.rejections.append(Rejection(f"{shown}:{number}", reason, "row"))
                break
            try:
                if isinstance(row, UserError):
                    raise row
                found = self._name_in(row, path)
                entry = entry_of(row, _source_of(row, path.name))
                if not entry.says_something:
                    raise UserError("has neither 'text' nor 'caption'")
                if found in entries:
                    raise UserError(f"is a second row for {shortened(found)}; give one row a list of texts instead")
                entries[found] = entry
            except UserError as error:
                num_bad += 1
                if num_bad <= MAX_LISTED_ROWS:
                    self.rejections.append(Rejection(f"{shown}:{number}", storable(f"the row {error}"), "row"))
        num_more = num_bad - MAX_LISTED_ROWS
        if num_more > 0:
            reason = f"{num_more:,} more rows that cannot be used; only the first {MAX_LISTED_ROWS:,} are listed"
            self.rejections.append(Rejection(shown, reason, "row", num_more))
        return entries

    def _name_in(self, row: dict, table: Path) -> str:
        """Return the name of a row's photo, relative to its table's folder. Raises UserError if there is none."""
        written = name_in_row(row)
        # with backslashes as in the table, then as Windows means them
        names = dict.fromkeys((written, written.replace("\\", "/")))
        found = next(filter(None, (self._find(table.parent, normal_name(n, table.parent)) for n in names)), None)
        if found is None:
            raise UserError(f"names {shortened(written)}, which does not exist")
        return found


def _source_of(row: dict, table: str) -> str:
    origin = row.get("caption_source")
    return f"{table}: {collapse(origin)}" if isinstance(origin, str) and origin.strip() else table


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
