"""Atomic file writes: to a temporary file in the same folder, synced, then renamed into place; and deleting."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safelight.errors import UserError


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut; does nothing on systems that cannot open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with naming(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


def check_writable(folder: Path, advice: str) -> None:
    """Raise UserError if a folder, which is created if needed, takes no new file. advice: ends the message.

    Called before long work whose result is written there. A file is really created: permissions alone do not tell of
    read-only disks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # has no name where the system can do so, and is deleted when it is closed
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); {advice}") from None


def remove(path: Path) -> None:
    """Delete what has this name, if anything has: a file, a link but not what it leads to, or a folder and its content.

    Raises OSError if it cannot be deleted: what is written in its place could land somewhere else.
    """
    try:
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if is_folder:
        # follows no link inside
        shutil.rmtree(path)
    else:
        os.unlink(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError that names no file: a failed write, for one, does not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_writer(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when the block ends. Readers, also after a crash, see the old file or the new.

    If the block raises, `path` stays as it was. Creates the folder if needed. sync: pass False if the caller syncs file
    and folder itself before anything refers to the file; until then a power cut may leave it empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name includes process and thread: two writers of one path must not share a temporary file
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        # left by a killed process of the same number, or planted: "x" neither follows a link nor opens what is there
        temporary.unlink(missing_ok=True)
        with naming(path), open(temporary, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # the user knows the file by its own name
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        raise
    if sync:
        sync_folder(path.parent)


def atomic_write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Replace `path` by a file holding `data`, as `atomic_writer` does."""
    with atomic_writer(path, sync) as file:
        file.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` by a UTF-8 file holding `text`. Newlines are written unchanged."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace `path` by a UTF-8 file of these lines, each followed by a newline; holds one in memory at a time."""
    with atomic_writer(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
