"""What a source says of a photo, and what of a source is not used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from safelight.data.photo import NO_CREDIT, USUAL_SETTINGS, Credit, PhotoSettings, Tag
from safelight.text import collapse

# of each table or packed file; of further ones only the number is kept
MAX_LISTED_ROWS = 1000
# `Caption.source` of a caption that nobody wrote
FILE_NAME = "file name"
# names that cameras, phones and programs give to pictures, with their numbers
_CAMERA_NAME = re.compile(
    r"(img|dsc[nf]?|dscf|cimg|imag|mvi|pxl|gopr?|dji|sam|wp|p|screenshot|image|photo|picture|untitled)?[\d\s.()-]*",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Caption:
    """The captions of one photo, and what else its source says of it.

    texts: one or more variants. source: where they were found, shown to the user. tags, settings, credit, captioner: as
    in `Photo`.
    """

    texts: tuple[str, ...]
    source: str
    tags: tuple[Tag, ...] = ()
    settings: PhotoSettings = USUAL_SETTINGS
    credit: Credit = NO_CREDIT
    captioner: str = ""

    @property
    def is_written(self) -> bool:
        """Whether somebody wrote it: it is neither a file's name nor empty."""
        return self.source != FILE_NAME and any(self.texts)


@dataclass(frozen=True, slots=True)
class Rejection:
    """Something that is not used. path: of a file or folder; for a row of a caption table, `table.jsonl:LINE`.

    reason: why, shown to the user. kind: what it is; "other" is a file that cannot be a photo, such as a table. num:
    how many it stands for.
    """

    path: str
    reason: str
    kind: Literal["photo", "duplicate", "other", "caption", "row"] = "photo"
    num: int = 1


def is_camera_name(caption: str) -> bool:
    """Return whether a caption is a camera's file name, such as IMG or DSC01234: the model would learn it as a word."""
    return _CAMERA_NAME.fullmatch(caption) is not None


def caption_of_name(stem: str) -> str:
    """Return the caption that a file's stem gives: the part before its first `_`, hyphens kept."""
    return collapse(stem.split("_", 1)[0])
