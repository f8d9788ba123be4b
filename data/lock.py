"""Lock a folder for one process: FOLDER/.lock names the holder, and the system releases it when that process ends.

The lock is flock's, not the presence of the file, so a file left behind by kill -9 or a power cut locks nobody out.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from safelight.errors import UserError
from safelight.text import printable
from safelight.untrusted import UnsafeFile, check_links, open_to_write, parse_json

LOCK_NAME = ".lock"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
# errors of file systems without locks, such as some network folders
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def _command() -> str:
    return shlex.join(["safelight", *sys.argv[1:]])


def _describe(text: bytes) -> str:
    """Return who holds the lock, from the lock file's text, which the holder may be writing at this moment."""
    try:
        holder = parse_json(text)
        return printable(f"process {holder['pid']} on {holder['host']} since {holder['started']} ({holder['command']})")
    except (ValueError, KeyError, TypeError):
        return "another process"


class FolderLock:
    """An exclusive lock on a folder, which is created if needed. Never waits. A context manager, released on exit.

    advice: what the user should do if the lock is refused; ends the error message. advice_if_held: the same if another
    process holds the lock; None: `advice`. note: a warning to show to the user
    if this system or file system has no locks, else empty.
    Raises UserError naming the holder if another process, or another lock of this process, holds the lock; if the
    folder cannot be written (OSError if the disk is full); and if anything in it is a link that leads out, as whoever
    locks a folder writes to it.
    """

    def __init__(self, folder: Path, advice: str, advice_if_held: str | None = None):
        self.folder, self.note = Path(folder), ""
        if "\0" in str(folder):
            raise UserError(f"{printable(self.folder)} is not a valid path, it contains a NUL character; {advice}")
        self._path = self.folder / LOCK_NAME
        self._is_new_folder = not os.path.exists(self.folder)
        self._file: BinaryIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_links(self.folder)
            self._take(advice if advice_if_held is None else advice_if_held)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{printable(self.folder)} is a file or its path leads through one; {advice}") from None
        except OSError as error:
            if error.errno in _DISK_FULL:
                # another folder on the same disk does not help; the command line says what does
                error.filename = error.filename or str(self._path)
                raise
            raise UserError(f"{printable(self.folder)} cannot be written ({error.strerror}); {advice}") from error

    def _take(self, advice_if_held: str) -> None:
        try:
            import fcntl
        except ImportError:
            self.note = f"this system has no file locks: make sure that no other process writes to {self.folder}"
            return
        while True:
            # not truncated: until the lock is ours, its text belongs to the holder
            try:
                file = open_to_write(self._path, buffering=0)
            except UnsafeFile as error:
                # a link's message says so already
                advice = "" if str(error).endswith("delete it") else "; delete it"
                raise UnsafeFile(f"{error}{advice}") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    file.close()
                    self.note = (
                        f"{self.folder} is on a file system without locks ({error.strerror}): "
                        "make sure that no other process writes there"
                    )
                    return
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    file.close()
                    raise
                holder = _describe(file.read(100_000))
                file.close()
                raise UserError(f"{printable(self.folder)} is in use by {holder}; {advice_if_held}") from None
            if self._is_in_place(file):
                break
            # the previous holder deleted the file after we opened it and before we locked it
            file.close()
        self._file = file
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": _command(),
        }
        file.truncate(0)
        file.write(json.dumps(holder).encode() + b"\n")

    def _is_in_place(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Delete the lock file and release the lock. Can be called twice.

        If the lock created the folder and the folder is still empty, it is removed too.
        """
        if self._file is None:
            return
        # deleted while we hold it: a process that opened it meanwhile notices in _is_in_place
        self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        if self._is_new_folder:
            try:
                self.folder.rmdir()
            except OSError:
                # not empty
                pass

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception) -> None:
        self.release()
