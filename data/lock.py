"""Lock a folder for one process, or for all that share it: FOLDER/.lock names the holder.

The lock is flock's, not the presence of the file, and the system releases it when the process ends, so a file left
behind by kill -9 or a power cut locks nobody out. Over NFS, Linux turns flock into the server's locks, which hold
between machines.
"""

from __future__ import annotations

import contextlib
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
from safelight.untrusted import UnsafeFile, check_links, open_regular, open_to_write, parse_json, read_bytes

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


class NoLocks(Exception):
    """This system or file system has no locks; the message says which."""


def lock_file(path: Path, shared: bool = False) -> BinaryIO | None:
    """Return a file, created if needed, with a lock on it that closing it ends; None if another holder excludes it.

    Never waits. The file is the one that has this path now, even if a previous holder deleted the file meanwhile.
    Raises NoLocks, UnsafeFile for a link or anything but a regular file, and OSErrors as open does.
    """
    try:
        import fcntl
    except ImportError:
        raise NoLocks("this system has no file locks") from None
    while True:
        # not truncated: until the lock is ours, its text belongs to the holder
        try:
            file = open_to_write(path, buffering=0)
        except UnsafeFile as error:
            # a link's message says so already
            advice = "" if str(error).endswith("delete it") else "; delete it"
            raise UnsafeFile(f"{error}{advice}") from None
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in _NO_LOCKS:
                raise NoLocks(f"{path.parent} is on a file system without locks ({error.strerror})") from None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            return None
        if _is_in_place(file, path):
            return file
        # the previous holder deleted the file after we opened it and before we locked it
        file.close()


def unlock_file(file: BinaryIO, path: Path) -> None:
    """Release the lock of `lock_file`, and delete the file unless others share the lock."""
    import fcntl

    with contextlib.suppress(OSError):
        # succeeds for the only holder. A process that has opened the file meanwhile notices in _is_in_place
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    file.close()


def _is_in_place(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


class FolderLock:
    """A lock on a folder, which is created if needed. Never waits. A context manager, released on exit.

    advice: what the user should do if the lock is refused; ends the error message. advice_if_held: the same if another
    process holds the lock; None: `advice`. shared: excludes only those whose lock is not shared; where it cannot be
    written, on a read-only or full disk, such a lock does nothing. note: a warning to show to the user if this system
    or file system has no locks, else empty.
    Raises UserError naming the holder if another process, or another lock of this process, excludes it; if the
    folder cannot be written (OSError if the disk is full); and if anything in it is a link that leads out, as whoever
    locks a folder writes to it.
    """

    def __init__(self, folder: Path, advice: str, advice_if_held: str | None = None, shared: bool = False):
        self.folder, self.note = Path(folder), ""
        if "\0" in str(folder):
            raise UserError(f"{printable(self.folder)} is not a valid path, it contains a NUL character; {advice}")
        self._path = self.folder / LOCK_NAME
        self._is_new_folder = not os.path.exists(self.folder)
        self._file: BinaryIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_links(self.folder)
            self._take(advice if advice_if_held is None else advice_if_held, shared)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{printable(self.folder)} is a file or its path leads through one; {advice}") from None
        except OSError as error:
            if shared:
                # reading needs no lock where nobody can write, and an exclusive lock is refused there
                self.note = f"{self._path} cannot be written ({error.strerror})"
                return
            if error.errno in _DISK_FULL:
                # another folder on the same disk does not help; the command line says what does
                error.filename = error.filename or str(self._path)
                raise
            raise UserError(f"{printable(self.folder)} cannot be written ({error.strerror}); {advice}") from error

    def _take(self, advice_if_held: str, shared: bool) -> None:
        try:
            file = lock_file(self._path, shared)
        except NoLocks as error:
            self.note = f"{error}: make sure that no other process writes to {self.folder}"
            return
        if file is None:
            try:
                with open_regular(self._path, follow_links=False) as held:
                    holder = _describe(held.read(100_000))
            except OSError:
                # released meanwhile
                holder = "another process"
            raise UserError(f"{printable(self.folder)} is in use by {holder}; {advice_if_held}")
        self._file = file
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": _command(),
        }
        # of those who share a lock, the last one is named
        self._text = json.dumps(holder).encode() + b"\n"
        file.truncate(0)
        file.write(self._text)

    def release(self) -> None:
        """Release the lock, and delete its file unless others share it. Can be called twice.

        If the lock created the folder and the folder is still empty, it is removed too.
        """
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.seek(0)
            if self._file.read(100_000) == self._text:
                # those who share the lock are not this process
                self._file.truncate(0)
        unlock_file(self._file, self._path)
        self._file = None
        if self._is_new_folder:
            with contextlib.suppress(OSError):
                # fails if it is not empty
                self.folder.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception) -> None:
        self.release()


def is_held(folder: Path) -> bool | None:
    """Return whether a process holds the folder's lock that is not shared; None if this computer cannot tell.

    Asks without taking the lock, which would refuse a process that starts at this moment: the process that the lock
    file names must be alive and, where the system lists locks, hold this one. So a file that a killed process left
    behind counts as nothing, and neither does a copy of the folder.
    """
    try:
        with open_regular(folder / LOCK_NAME, follow_links=False) as file:
            inode = os.fstat(file.fileno()).st_ino
            holder = parse_json(file.read(100_000))
        pid, host = int(holder["pid"]), holder["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if host != socket.gethostname():
        return None
    if pid < 1:
        return False
    if os.name != "posix":
        # elsewhere there are no such locks, and os.kill would end the process
        return None
    try:
        # sends no signal
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    try:
        locks = read_bytes(Path("/proc/locks")).decode("ascii", "replace").splitlines()
    except OSError:
        return True
    # 4: FLOCK  ADVISORY  WRITE 3714 fe:00:2196657 0 EOF
    return any(
        words[4] == str(pid) and words[5].endswith(f":{inode}") for line in locks if len(words := line.split()) == 8
    )
