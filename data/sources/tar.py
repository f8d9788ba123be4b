"""WebDataset's tars: pictures and their captions as members, key.jpg beside key.txt. Nothing is extracted to disk.

Python's tarfile reads the headers; the names in them are only keys here.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from safelight.data.sources.caption import MAX_LISTED_ROWS, Rejection
from safelight.text import storable
from safelight.untrusted import UnsafeFile, open_regular

MAX_MEMBERS = 1_000_000
# path and attributes of one member; tarfile reads them at once
MAX_HEADER_BYTES = 2**14
MAX_NAME_CHARACTERS = 1024
# folders in folders, each of which is a path here
MAX_PARTS = 32


class _Headers:
    """A file for tarfile, which never reads more than a header at once."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise UnsafeFile(f"a header has {size:,} bytes, over the limit of {MAX_HEADER_BYTES:,}")
        return self._file.read(size)


class Tar:
    """A tar file as a folder of its regular members; see `Packed`.

    Raises UnsafeFile if it is no tar, OSErrors as open does. Of one that is damaged further on, it has the members
    before.
    """

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        self.folders: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}
        self.rejections: list[Rejection] = []
        self.is_complete = True
        # of each member, its place in the file and its size
        self._members: dict[str, tuple[int, int]] = {}
        self._num_bad = 0
        with open_regular(path) as file:
            try:
                self._read_headers(file)
            # tarfile raises many kinds for damaged headers
            except Exception as error:
                if isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
                    raise
                if not self._members:
                    raise UnsafeFile(f"not a tar that can be read: {error or type(error).__name__}") from None
                self.is_complete = False
                reason = f"damaged after {len(self._members):,} files, which are used: {error or type(error).__name__}"
                self.rejections.append(Rejection(storable(str(path)), storable(reason), "other"))
        num_more = self._num_bad - MAX_LISTED_ROWS
        if num_more > 0:
            reason = f"{num_more:,} more members that cannot be used; only the first {MAX_LISTED_ROWS:,} are listed"
            self.rejections.append(Rejection(storable(str(path)), reason, "other", num_more))

    def _read_headers(self, file: BinaryIO) -> None:
        num_bytes = os.fstat(file.fileno()).st_size
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            offset = -1
            num = 0
            while (member := tar.next()) is not None:
                # tarfile keeps them all
                tar.members.clear()
                num += 1
                if member.size < 0 or tar.offset <= offset:
                    raise UnsafeFile("a member has a negative size")
                if num > MAX_MEMBERS:
                    raise UnsafeFile(f"it has more than {MAX_MEMBERS:,} members; split it")
                offset = tar.offset
                if member.isdir():
                    continue
                reason = self._reason_against(member)
                if reason is None and member.offset_data + member.size > num_bytes:
                    raise UnsafeFile(f"{member.name} is cut off")
                if reason is None:
                    self._add(member)
                else:
                    self._num_bad += 1
                    if self._num_bad <= MAX_LISTED_ROWS:
                        self.rejections.append(
                            Rejection(storable(f"{self.path}/{member.name}"), f"not read: {reason}", "other")
                        )
            # tarfile takes a damaged header for the end, and a missing end as well
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise UnsafeFile("a header is damaged, or the end is missing")

    def _reason_against(self, member: tarfile.TarInfo) -> str | None:
        """Return why a member is not used, None if it is."""
        parts = member.name.removeprefix("./").split("/")
        if not member.isreg() or member.issparse():
            kind = "a link" if member.issym() or member.islnk() else "no regular file"
            return f"it is {kind} in the archive"
        if len(member.name) > MAX_NAME_CHARACTERS or len(parts) > MAX_PARTS:
            return "its name is too long"
        if not all(parts) or ".." in parts or "." in parts or "\0" in member.name:
            return "its name leads out of the archive, or is none"
        if "/".join(parts) in self._members:
            return "another member has its name"
        return None

    def _add(self, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./")
        self._members[name] = member.offset_data, member.size
        folder, _, file = name.rpartition("/")
        self._add_folder(folder)
        self.folders[folder][1].append(file)

    def _add_folder(self, folder: str) -> None:
        """Make a folder known, with those above it."""
        if folder not in self.folders:
            above, _, last = folder.rpartition("/")
            self._add_folder(above)
            self.folders[above][0].append(last)
            self.folders[folder] = [], []

    def size_of(self, name: str) -> int:
        return self._members[name][1]

    def read(self, name: str) -> bytes:
        offset, size = self._members[name]
        with open_regular(self.path) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise UnsafeFile(f"{self.path} has been cut")
        return content
