"""What one file, or one row of a table, says of a photo: captions, tags, settings and credit.

By our names, or by those of other trainers.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from safelight.data.photo import MAX_TAGS, NO_CREDIT, Credit, PhotoSettings, Tag, settings_of, tags_of
from safelight.data.sources.tag_text import united
from safelight.errors import UserError
from safelight.text import collapse, shortened

# EveryDream calls the caption main_prompt
TEXT_KEYS = ("text", "caption", "main_prompt")
# EveryDream's names of settings, and ours
# and kohya's is_reg
SETTING_OF_KEY = {"multiply": "repeats", "cond_dropout": "caption_dropout", "is_reg": "class_image"}
SETTING_OF_KEY |= {field.name: field.name for field in fields(PhotoSettings)}
CREDIT_KEYS = tuple(field.name for field in fields(Credit))
KEYS = (*TEXT_KEYS, "tags", *SETTING_OF_KEY, *CREDIT_KEYS, "credit", "captioner")
_YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


# shared: a table has as many entries as photos
_NO_SETTINGS: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Entry:
    """What one source says of a photo; what it does not say is empty.

    source: shown to the user. texts: caption variants. settings: by the names of PhotoSettings. is_typed: the texts are
    as a person types them, so that tags may stand in them.
    """

    source: str
    texts: tuple[str, ...] = ()
    tags: tuple[Tag, ...] = ()
    settings: Mapping[str, object] = field(default_factory=lambda: _NO_SETTINGS)
    credit: Credit = NO_CREDIT
    captioner: str = ""
    is_typed: bool = False

    @property
    def says_something(self) -> bool:
        return bool(self.texts or self.tags or self.settings) or self.credit != NO_CREDIT


def entry_of(row: dict, source: str) -> Entry:
    """Return what a row of a table, or a YAML or JSON file, says. Raises UserError with what is wrong with it.

    Its keys are in KEYS; others are ignored, and so are values of None. EveryDream also writes all of it below
    `caption`.
    """
    if isinstance(row.get("caption"), dict):
        row = {**row, "caption": None, **row["caption"]}
    row = {key: row[key] for key in KEYS if row.get(key) is not None}
    settings = {SETTING_OF_KEY[key]: setting(SETTING_OF_KEY[key], row[key]) for key in SETTING_OF_KEY if key in row}
    if settings:
        settings_of(settings)
    credit = _credit(row)
    key = next((key for key in TEXT_KEYS if key in row), None)
    tags = _tags(row["tags"]) if "tags" in row else ()
    # a row that says whose the photo is, or has tags, may say that nobody has captioned it
    is_empty = key is not None and row[key] == "" and (tags or credit != NO_CREDIT)
    texts = () if key is None else ("",) if is_empty else _texts(row[key])
    return Entry(
        source,
        texts,
        tags,
        settings or _NO_SETTINGS,
        credit,
        _text("captioner", row.get("captioner", "")),
        is_typed=key != "main_prompt" and not tags,
    )


def _credit(row: dict) -> Credit:
    """Return whose photo a row describes: an object of what may also stand in the row itself, a name or a page's
    address. Other forms are left aside: they are no reason to lose a caption."""
    credit = row.get("credit")
    if isinstance(credit, str):
        is_page = credit.startswith(("http://", "https://"))
        credit = {"page" if is_page else "photographer": credit}
    given = credit if isinstance(credit, dict) else {}
    texts = {key: row.get(key, given.get(key)) for key in CREDIT_KEYS}
    found = {key: collapse(text) for key, text in texts.items() if isinstance(text, str)}
    return Credit(**found) if found else NO_CREDIT


def _text(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"its {name} {reprlib.repr(value)} is not a text")
    return collapse(str(value))


def _texts(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"its text {reprlib.repr(value)} is neither a string nor a list of strings")
    # repeats are removed, or training would draw them more often; a dict keeps the order
    texts = tuple(dict.fromkeys(collapse(text) for text in texts if text.strip()))
    if not texts:
        raise UserError("its text is empty")
    return texts


def setting(name: str, value: object) -> object:
    """Return the value of a setting, also if it is written as a text. Raises UserError if it is none."""
    if name == "batch_id":
        return _text(name, value)
    if isinstance(value, str):
        word = value.strip().lower()
        if name in ("shuffle_tags", "class_image"):
            value = _YES_NO.get(word, value)
        else:
            try:
                value = float(word)
            except ValueError:
                raise UserError(f"its {name} {shortened(value, 40)!r} is not a number") from None
    # 2 is written as 2.0 in tables
    if name == "keep_tags" and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value


def _tags(value: object) -> tuple[Tag, ...]:
    """Return the tags of an object that maps each to its weight, or of a list of names and of {tag, weight}."""
    if isinstance(value, dict):
        pairs: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list):
        pairs = [_pair(item) for item in value]
    else:
        raise UserError(f"its tags {reprlib.repr(value)} are neither a list nor an object of weights")
    weights: dict[str, object] = {}
    for name, weight in pairs:
        if text := _text("tag", name):
            weights.setdefault(text, 1.0 if weight is None else weight)
    if len(weights) > MAX_TAGS:
        raise UserError(f"it has {len(weights):,} tags (limit {MAX_TAGS:,})")
    return united(tags_of(weights))


def _pair(item: object) -> tuple[object, object]:
    if not isinstance(item, dict):
        return item, None
    return item.get("tag", item.get("name")), item.get("weight")
