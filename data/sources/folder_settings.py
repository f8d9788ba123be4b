"""What a folder says of the photos in it: EveryDream's files with settings, and kohya's folder names."""

from __future__ import annotations

import re
from pathlib import Path

from safelight.data.photo import MAX_REPEATS, settings_of
from safelight.data.sources.entry import KEYS, Entry, entry_of, setting
from safelight.data.sources.listing import GLOBAL_NAMES, LOCAL_NAMES, SETTING_OF_FILE
from safelight.data.sources.source_tree import MAX_SIDECAR_BYTES, SourceTree
from safelight.errors import UserError
from safelight.text import collapse, shortened
from safelight.untrusted import UnsafeFile, kind_of, parse_yaml

KOHYA_SOURCE = "kohya folder name"
_KOHYA_NAME = re.compile(r"(\d{1,9})_(.+)", re.DOTALL)
# folders that cameras make, such as 100_PANA, and years are numbered alike
_LOOKS_LIKE_KOHYA = re.compile(r"[1-9]\d?_(?![A-Z0-9_]{4}$).*[^\W\d].*", re.DOTALL)


def entry_of_file(name: str, text: str) -> tuple[Entry, list[str]]:
    """Return (the entry of a settings file, its keys that are not used). Raises UserError with what is wrong."""
    key = SETTING_OF_FILE.get(name.lower())
    if key is None:
        return entry_of_yaml(text, name)
    value = text.strip()
    if key == "shuffle_tags" and not value:
        # EveryDream's file need not say anything
        value = "true"
    settings = {key: setting(key, value)}
    settings_of(settings)
    return Entry(name, settings=settings), []


def entry_of_yaml(text: str, source: str) -> tuple[Entry, list[str]]:
    """Return (the entry of a YAML text, its keys that are not used). Raises UserError with what is wrong."""
    try:
        row = parse_yaml(text)
    except UnsafeFile as error:
        raise UserError(f"it is not valid YAML: {error}") from None
    if row is None:
        return Entry(source), []
    if not isinstance(row, dict):
        raise UserError(f"it holds {kind_of(row)}, not names and values")
    inner = row["caption"] if isinstance(row.get("caption"), dict) else {}
    return entry_of(row, source), [shortened(str(key), 40) for key in {**row, **inner} if key not in KEYS]


def kohya_entry(folder_name: str) -> Entry | None:
    """Return what a folder name like `10_my dog` says: 10 repeats, and the caption of photos that have none."""
    match = _KOHYA_NAME.fullmatch(folder_name)
    if match is None:
        return None
    repeats = min(float(match[1]), MAX_REPEATS)
    return Entry(KOHYA_SOURCE, (collapse(match[2]),), settings={"repeats": repeats}, is_typed=True)


def kohya_doubt(folder_name: str) -> str:
    """Return why the number of a folder is not read as repeats, or not as it stands; "" if it is, or there is none."""
    number, mark, caption = folder_name.partition("_")
    if not mark or re.fullmatch(r"\d+", number) is None:
        return ""
    if not caption:
        return "no caption follows the number, so that it is not read; name it as in 10_my dog"
    if kohya_entry(folder_name) is None:
        return f"the number is far over the limit of {MAX_REPEATS:,.0f} repeats, and is not read"
    is_over = int(number) > MAX_REPEATS
    return f"the number is over the limit of {MAX_REPEATS:,.0f} repeats, and is read as that" if is_over else ""


def looks_like_kohya(folder_names: list[str]) -> bool:
    """Return whether these names are likely kohya's, and not numbers of chapters, cameras or years."""
    matches = [_LOOKS_LIKE_KOHYA.fullmatch(name) for name in folder_names]
    numbers = sorted(int(name.split("_")[0]) for name, match in zip(folder_names, matches, strict=True) if match)
    is_numbered = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return bool(matches) and all(matches) and not is_numbered


class FolderSettings:
    """Reads each file with settings of a folder once, when it is first needed."""

    def __init__(self, tree: SourceTree):
        self._tree = tree
        # of each folder, what it says of the photos in it alone, and of those in it and below with those above it
        self._own: dict[Path, list[Entry]] = {}
        self._inherited: dict[Path, list[Entry]] = {}

    def entries_of(self, folder: Path) -> list[Entry]:
        """Return what a folder and those above it, up to the root, say of the photos in it, nearest first."""
        if folder not in self._own:
            # local.yaml before the files of one setting
            own = [*self._read(folder, LOCAL_NAMES), *self._read(folder, tuple(SETTING_OF_FILE))]
            self._own[folder] = own
        for current in self._tree.from_known(folder, self._inherited):
            above = self._inherited[current.parent] if current != self._tree.root else []
            self._inherited[current] = self._read(current, GLOBAL_NAMES) + above
        return self._own[folder] + self._inherited[folder]

    def _read(self, folder: Path, names: tuple[str, ...]) -> list[Entry]:
        """Return what the files of these names in a folder say."""
        listing = self._tree.listing_or_empty(folder)
        found = [self._entry(folder / name) for name in listing.settings if name.lower() in names]
        return [entry for entry in found if entry is not None]

    def _entry(self, path: Path) -> Entry | None:
        text = self._tree.text(path, MAX_SIDECAR_BYTES)
        if text is None:
            return None
        try:
            entry, unused = entry_of_file(path.name, text)
        except UserError as error:
            self._tree.reject(path, f"not used: {error}")
            return None
        self._tree.say_unused(path, unused)
        return entry
