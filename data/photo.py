"""The record of one photo, as it stands in a line of a dataset's manifest."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath

from safelight.errors import UserError
from safelight.kernels.philox import SAMPLE_ID_BITS
from safelight.text import storable
from safelight.untrusted import kind_of

# a larger size is a mistake in the manifest, and might not fit a float
MAX_SIDE_PX = 1_000_000
# of `Photo.fingerprint`
FINGERPRINT_BYTES = 35
MAX_TAGS = 1000
MAX_CAPTIONS = 1000
MAX_TAG_WEIGHT = 1000.0
MAX_REPEATS = 10_000.0
MAX_LOSS_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag of a photo. weight: how likely the tag is drawn before the others, in proportion; 0 is never drawn."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PhotoSettings:
    """How a photo is trained on, where that differs from others; None means as the run's config says.

    repeats: uses per epoch; the fraction of 2.5 is one more use in half of the epochs. caption_dropout: probability
    that the caption is replaced by the empty one. flip_p: probability that a variant is mirrored. loss_scale: what the
    photo's loss is multiplied by. shuffle_tags: whether tags are shuffled. keep_tags: how many of the first tags stay
    in front. batch_id: photos of one id share no batch with others. class_image: the photo shows the class, not what is
    to be learned (trainer/models/class_photos.py).
    """

    repeats: float = 1.0
    caption_dropout: float | None = None
    flip_p: float | None = None
    loss_scale: float = 1.0
    shuffle_tags: bool | None = None
    keep_tags: int | None = None
    batch_id: str = ""
    class_image: bool = False


USUAL_SETTINGS = PhotoSettings()


@dataclass(frozen=True, slots=True)
class Credit:
    """Who took a photo. page: the web page to link to; either may be empty."""

    photographer: str = ""
    page: str = ""


NO_CREDIT = Credit()


@dataclass(frozen=True, slots=True)
class Quality:
    """Measured on the stored picture. sharpness: variance of the Laplacian of luma, 0 to 255, at a fixed size.

    brightness: mean luma, 0 to 1. dark, light: fractions of pixels that are black or white beyond recovery.
    """

    sharpness: float
    brightness: float
    dark: float
    light: float


@dataclass(frozen=True, slots=True)
class Photo:
    """One stored photo.

    file: path inside the dataset folder, with forward slashes. sha256: hash of the stored file. width, height: px of
    the upright image. captions: one or more variants, white space collapsed. source: where the photo came from.
    caption_source: what its captions were read from. origin_sha256, content_sha256: hashes of the original file and of
    its decoded pixels, by which a later `safelight prepare` recognizes the photo; empty if unknown. fingerprint: by
    which near-copies are found (near_copies.py); empty in datasets prepared before it was stored. group: the sha256 of
    the first of several near-copies, the same for all of them, or empty; `split_validation` keeps them together.
    tags: weighted tags that go with every caption, in the order they were written. mask, mask_sha256: path of the loss
    mask inside the dataset folder, and its hash; empty without one. captioner, tagger: model and options that wrote
    the captions, and the tags; empty if a person did.
    """

    file: str
    sha256: str
    width: int
    height: int
    captions: tuple[str, ...]
    source: str
    caption_source: str
    origin_sha256: str = ""
    content_sha256: str = ""
    fingerprint: str = ""
    group: str = ""
    tags: tuple[Tag, ...] = ()
    settings: PhotoSettings = USUAL_SETTINGS
    credit: Credit = NO_CREDIT
    quality: Quality | None = None
    mask: str = ""
    mask_sha256: str = ""
    captioner: str = ""
    tagger: str = ""

    @property
    def sample_id(self) -> int:
        """The 56-bit id that keys every random draw of this photo: the first 56 bits of its file's SHA-256."""
        return id_of(self.sha256)


def id_of(sha256: str) -> int:
    """Return the sample id of the photo whose file has this hash."""
    return int(sha256[: SAMPLE_ID_BITS // 4], 16)


_REQUIRED = ("file", "sha256", "width", "height", "captions", "source")
_NUMBERS = ("width", "height")
_OBJECTS = ("tags", "settings", "credit", "quality")
# written into every line, as before the others were added; the others only where they say something
_ALWAYS = (*_REQUIRED, "caption_source", "origin_sha256", "content_sha256", "fingerprint", "group")
_TYPES = {field.name: str for field in fields(Photo)}
_TYPES |= {"captions": list} | dict.fromkeys(_NUMBERS, int) | dict.fromkeys(_OBJECTS, dict)
_PATTERNS = {
    "sha256": re.compile(r"[0-9a-f]{64}"),
    # of what `safelight prepare` computes, besides sha256; empty if it did not
    "fingerprint": re.compile(rf"([0-9a-f]{{{2 * FINGERPRINT_BYTES}}})?"),
    "group": re.compile(r"([0-9a-f]{64})?"),
    "mask_sha256": re.compile(r"([0-9a-f]{64})?"),
}
# lowest and highest value of each number
_BOUNDS = {
    "repeats": (0, MAX_REPEATS),
    "caption_dropout": (0, 1),
    "flip_p": (0, 1),
    "loss_scale": (0, MAX_LOSS_SCALE),
    "keep_tags": (0, MAX_TAGS),
    "sharpness": (0, 1e9),
    "brightness": (0, 1),
    "dark": (0, 1),
    "light": (0, 1),
}


def is_inside(file: str) -> bool:
    """Return whether a path of a manifest names a file inside the dataset folder."""
    path = PurePosixPath(file)
    return not (path.is_absolute() or ".." in path.parts or not path.name or "\0" in file)


def photo_of_row(row: object) -> Photo:
    """Return the photo of a manifest line's JSON value. Raises UserError saying what is wrong with the line."""
    if not isinstance(row, dict):
        raise UserError(f"is {kind_of(row)}, not an object")
    row = {name: value for name, value in row.items() if name in _TYPES}
    if isinstance(row.get("captions"), list) and len(row["captions"]) > MAX_CAPTIONS:
        raise UserError(f"has {len(row['captions']):,} captions (limit {MAX_CAPTIONS:,})")
    for name in dict.fromkeys((*_REQUIRED, *row)):
        kind = _TYPES[name]
        if not isinstance(row.get(name), kind) or isinstance(row.get(name), bool):
            raise UserError(f"{name!r} is {row.get(name)!r:.80}, not a {kind.__name__}")
        for text in row[name] if kind is list else [row[name]] if kind is str else []:
            _check_text(name, text)
    # a manifest may come from a stranger: it must not refer to files outside the dataset
    for name in ("file", "mask"):
        if (row.get(name) or name == "file") and not is_inside(row[name]):
            raise UserError(f"{name} {row[name]!r:.80} is not a path inside the dataset folder")
    if not _PATTERNS["sha256"].fullmatch(row["sha256"]):
        raise UserError(f"sha256 {row['sha256']!r:.80} is not 64 lower-case hex digits")
    for name, pattern in _PATTERNS.items():
        if not pattern.fullmatch(row.get(name, "")) and name != "sha256":
            raise UserError(f"{name} {row[name]!r:.80} is not what `safelight prepare` writes")
    if bool(row.get("mask")) != bool(row.get("mask_sha256")):
        raise UserError("mask and mask_sha256 belong together; one of them is missing")
    if min(row["width"], row["height"]) < 1:
        raise UserError(f"size {row['width']} x {row['height']} px is not positive")
    if max(row["width"], row["height"]) > MAX_SIDE_PX:
        raise UserError(f"size {row['width']} x {row['height']} px is over the limit of {MAX_SIDE_PX:,} px a side")
    if not row["captions"]:
        raise UserError("captions [] is not a list of one or more texts")
    row |= {"captions": tuple(row["captions"]), "tags": tags_of(row.get("tags", {}))}
    for name, kind in (("settings", PhotoSettings), ("credit", Credit), ("quality", Quality)):
        if name in row:
            row[name] = _record(kind, f"{name}.", row[name])
    return Photo(**{"caption_source": "", **row})


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str) or storable(text) != text:
        raise UserError(f"{name!r} holds {text!r:.80}, which is not a text that UTF-8 can hold")


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} {value!r:.80} is not a number from {low:g} to {high:g}")
    return value


def tags_of(weights: dict) -> tuple[Tag, ...]:
    """Return the tags of an object that maps each to its weight. Raises UserError saying what is wrong with it."""
    if len(weights) > MAX_TAGS:
        raise UserError(f"has {len(weights):,} tags (limit {MAX_TAGS:,})")
    for name in weights:
        _check_text("tags", name)
        if not name.strip():
            raise UserError("tags has an empty name")
    return tuple(Tag(name, float(_number(f"tag {name!r:.80}", w, 0, MAX_TAG_WEIGHT))) for name, w in weights.items())


def _record(kind: type, before: str, row: dict):
    """Return a record of `kind` from its JSON object. Raises UserError if a value is missing, wrong or out of range.

    before: what stands before a value's name in messages.
    """
    values = {}
    for field in fields(kind):
        if field.name not in row:
            continue
        value = row[field.name]
        if field.name in _BOUNDS:
            value = _number(f"{before}{field.name}", value, *_BOUNDS[field.name])
            if field.type.startswith("int") and value != int(value):
                raise UserError(f"{before}{field.name} {value!r:.80} is not a whole number")
        elif field.type.startswith("bool"):
            if not isinstance(value, bool):
                raise UserError(f"{before}{field.name} {value!r:.80} is not true or false")
        else:
            _check_text(f"{before}{field.name}", value)
        values[field.name] = value
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{before.strip('. ')} {row!r:.80} lacks a value") from error


def settings_of(values: dict) -> PhotoSettings:
    """Return the settings that a file or row gives, by their names. Raises UserError if a value is wrong."""
    return _record(PhotoSettings, "its ", values)


def row_of_photo(photo: Photo) -> dict:
    """Return a photo as the JSON object of its manifest line; values that say nothing are left out."""
    row = {name: getattr(photo, name) for name in _ALWAYS}
    if photo.tags:
        row["tags"] = {tag.name: tag.weight for tag in photo.tags}
    for name, default in (("settings", USUAL_SETTINGS), ("credit", NO_CREDIT)):
        values, usual = asdict(getattr(photo, name)), asdict(default)
        if changed := {key: value for key, value in values.items() if value != usual[key]}:
            row[name] = changed
    if photo.quality is not None:
        row["quality"] = asdict(photo.quality)
    for name in ("mask", "mask_sha256", "captioner", "tagger"):
        if getattr(photo, name):
            row[name] = getattr(photo, name)
    return row
