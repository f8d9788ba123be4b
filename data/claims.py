"""Who of several processes, on one machine or several, does which part of filling a cache.

A claim is a lock on one byte of the file CACHE/.claims, whose place is a hash of the part's name: POSIX record locks,
which end with their process however that ends, and which NFS has between machines. Claims save work and guard nothing:
without locks, and where two parts meet in one byte, rows are encoded twice and stored once.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO

from safelight.errors import UserError
from safelight.untrusted import UnsafeFile, open_to_write

CLAIMS_NAME = ".claims"
POLL_S = 0.2
# others that have written nothing for so long hang or hold no lock that ends; their rows are encoded here as well
STALLED_S = 600.0


class Claims:
    """The claims of this process on parts of the work in a folder. A context manager, which gives all of them up."""

    def __init__(self, folder: Path):
        self._file: BinaryIO | None = None
        try:
            self._file = open_to_write(folder / CLAIMS_NAME, buffering=0)
        except UnsafeFile as error:
            # a link's message says so already
            raise UnsafeFile(f"{str(error).removesuffix('; delete it')}; delete it") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{folder} cannot be written ({error.strerror}); make it writable, or copy the dataset elsewhere"
            ) from error

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def take(self, name: str) -> bool:
        """Claim a part unless another process has; return whether this process works on it. Never waits."""
        return self._lock(name, is_taken=True)

    def give_up(self, name: str) -> None:
        """End the claim on a part."""
        self._lock(name, is_taken=False)

    def _lock(self, name: str, is_taken: bool) -> bool:
        try:
            import fcntl
        except ImportError:
            return True
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB if is_taken else fcntl.LOCK_UN, 1, place, os.SEEK_SET)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            # no locks on this file system
            return True
        return True


class Patience:
    """Waits for the work of other processes; is_over once none of it has come for STALLED_S."""

    def __init__(self):
        self.is_over = False
        self._num_left, self._changed = -1, 0.0

    def wait(self, num_left: int) -> None:
        """Wait a moment. num_left: rows or files that others have claimed and not written."""
        if num_left != self._num_left:
            self._num_left, self._changed = num_left, time.monotonic()
        self.is_over = time.monotonic() - self._changed > STALLED_S
        time.sleep(POLL_S)
