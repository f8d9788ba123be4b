"""Files that hold pictures, as a folder does: archives, and tables with pictures in them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

from safelight.data.sources.caption import Rejection
from safelight.data.sources.entry import Entry


class Packed(Protocol):
    """An opened file that holds pictures; names in it have forward slashes.

    folders: of each folder in it ("" is the file itself), the folders and files there. entries: what its own table
    says, by name. rejections: what in it is not used. is_complete: all of it could be read.
    """

    folders: dict[str, tuple[list[str], list[str]]]
    entries: dict[str, Entry]
    rejections: list[Rejection]
    is_complete: bool

    @abstractmethod
    def size_of(self, name: str) -> int:
        """Return the size of a file in bytes."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises UserError or OSError if they cannot be read; safe in threads."""


@dataclass(frozen=True)
class PackedPicture:
    """A file in a packed file."""

    packed: Packed
    name: str

    @property
    def size(self) -> int:
        return self.packed.size_of(self.name)

    def read(self) -> bytes:
        return self.packed.read(self.name)
