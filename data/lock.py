"""One process at a time in a folder: FOLDER/.lock names its holder, and the system lets it go when that process ends.

flock, not the file's presence: what a kill -9 or a power cut leaves behind locks nobody out.
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

from safelight.data.text import printable
from safelight.errors import UserError

LOCK_NAME = ".lock"
# what file systems without locks answer; some network folders are such
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def _command() -> str:
    return shlex.join(["safelight", *sys.argv[1:]])


def _describe(text: bytes) -> str:
    """Return who holds a lock, by the holder's own record; it may be read while being written."""
    try:
        record = json.loads(text)
        return printable(f"process {record['pid']} on {record['host']} since {record['started']} ({record['command']})")
    except (ValueError, KeyError, TypeError):
        return "another process"


class FolderLock:
    """A lock on a folder, taken at once or refused. As a context it is released at the end.

    note: why nothing could be locked, for the reader; empty where the lock is held. The folder is made.
    Raises UserError naming the holder if another process, or another lock of this one, has it, and for a folder that
    cannot be written. advice: what to do then.
    """

    def __init__(self, folder: Path, advice: str):
        self.folder, self.note = Path(folder), ""
        if "\0" in str(folder):
            raise UserError(f"{printable(self.folder)} is no path, it holds a NUL character; {advice}")
        self._path = self.folder / LOCK_NAME
        self._is_new_folder = not os.path.exists(self.folder)
        self._file: BinaryIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take(advice)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{printable(self.folder)} is a file or lies below one; {advice}") from None
        except OSError as error:
            raise UserError(f"{printable(self.folder)} cannot be written ({error.strerror}); {advice}") from error

    def _take(self, advice: str) -> None:
        try:
            import fcntl
        except ImportError:
            self.note = f"this system has no file locks: take care that no second process writes to {self.folder}"
            return
        while True:
            # not truncated on opening: until the lock is ours, what stands in it is the holder's
            file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    file.close()
                    self.note = (
                        f"{self.folder} is on a file system without locks ({error.strerror}): "
                        "take care that no second process writes there"
                    )
                    return
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    file.close()
                    raise
                holder = _describe(file.read(100_000))
                file.close()
                raise UserError(f"{printable(self.folder)} is in use by {holder}; {advice}") from None
            if self._is_in_place(file):
                break
            # its holder deleted it between our opening and locking it
            file.close()
        self._file = file
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": _command(),
        }
        file.truncate(0)
        file.write(json.dumps(record).encode() + b"\n")

    def _is_in_place(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go and delete the lock file, and the folder if it was made for nothing; again is no error."""
        if self._file is None:
            return
        # deleted while it is ours: whoever opened it meanwhile finds out by _is_in_place
        self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        if self._is_new_folder:
            try:
                self.folder.rmdir()
            except OSError:
                # something stands in it
                pass

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception) -> None:
        self.release()
