"""Files that appear whole or not at all: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut; nothing to do where folders cannot be opened."""
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a path's name into errors of the system that name no file: a failed write does not say of what."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def atomic_write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Replace `path` by a file holding `data`; its folder is made. A reader or a crash sees the old file or the new.

    sync: False where the caller syncs file and folder itself, before anything refers to the file: until then a power cut
    may leave it empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # process and thread in the name: two writers of one path must not share a temporary file
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` by a UTF-8 file holding `text`, newlines as given."""
    atomic_write_bytes(path, text.encode("utf-8"))
