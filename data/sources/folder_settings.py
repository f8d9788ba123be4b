"""What a folder says of the photos in it: EveryDream's files with settings, and kohya's folder names."""

from __future__ import annotations

import re
from collections.abc import Callable

from safelight.data.photo import MAX_REPEATS, settings_of
from safelight.data.sources.entry import KEYS, Entry, entry_of, setting
from safelight.data.sources.listing import GLOBAL_NAMES, LOCAL_NAMES, SETTING_OF_FILE, Listing
from safelight.errors import UserError
from safelight.text import collapse, shortened
from safelight.untrusted import UnsafeFile, parse_yaml

KOHYA_SOURCE = "kohya folder name"
_KOHYA_NAME = re.compile(r"(\d{1,9})_(.+)", re.DOTALL)
# folders that cameras make, such as 100_PANA, and years are numbered alike
_LOOKS_LIKE_KOHYA = re.compile(r"[1-9]\d?_(?![A-Z0-9_]{4}$).*[^\W\d].*", re.DOTALL)


def own_entries(listing: Listing, read: Callable[[str], Entry | None]) -> list[Entry]:
    """Return what is said of the photos in one folder alone, the first to be heard at the front.

    read: returns the entry of a settings file, or None if it cannot be used.
    """
    local = [name for name in listing.settings if name.lower() in LOCAL_NAMES]
    single = [name for name in listing.settings if name.lower() in SETTING_OF_FILE]
    return [entry for entry in map(read, [*local, *single]) if entry is not None]


def inherited_entries(listing: Listing, read: Callable[[str], Entry | None]) -> list[Entry]:
    """Return what a folder says of the photos in it and in all folders below."""
    names = [name for name in listing.settings if name.lower() in GLOBAL_NAMES]
    return [entry for entry in map(read, names) if entry is not None]


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
        raise UserError(f"is not valid YAML: {error}") from None
    if row is None:
        return Entry(source), []
    if not isinstance(row, dict):
        raise UserError(f"holds a {type(row).__name__}, not names and values")
    inner = row["caption"] if isinstance(row.get("caption"), dict) else {}
    return entry_of(row, source), [shortened(str(key), 40) for key in {**row, **inner} if key not in KEYS]


def kohya_entry(folder_name: str) -> Entry | None:
    """Return what a folder name like `10_my dog` says: 10 repeats, and the caption of photos that have none."""
    match = _KOHYA_NAME.fullmatch(folder_name)
    if match is None:
        return None
    repeats = min(float(match[1]), MAX_REPEATS)
    return Entry(KOHYA_SOURCE, (collapse(match[2]),), settings={"repeats": repeats}, is_typed=True)


def looks_like_kohya(folder_names: list[str]) -> bool:
    """Return whether these names are likely kohya's, and not numbers of chapters, cameras or years."""
    matches = [_LOOKS_LIKE_KOHYA.fullmatch(name) for name in folder_names]
    numbers = sorted(int(name.split("_")[0]) for name, match in zip(folder_names, matches, strict=True) if match)
    is_numbered = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return bool(matches) and all(matches) and not is_numbered
