"""FolderLock: one holder at a time, named to whoever is refused; the lock ends when its process dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from safelight.data import lock as lock_module
from safelight.data.lock import LOCK_NAME, FolderLock, is_held
from safelight.errors import UserError

HOLDER = """
import sys
from safelight.data.lock import FolderLock
with FolderLock(sys.argv[1], "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/folder until its standard input is closed or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "folder")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_holder_is_named_and_a_killed_process_loses_its_lock(holder, tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(
        ValueError, match=rf"in use by process {holder.pid} on .* since 20\d\d-.* \(safelight .*\); do"
    ) as caught:
        FolderLock(folder, "name another", "do something")
    assert "\n" not in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    assert (folder / LOCK_NAME).exists(), "the killed process leaves its lock file"
    with FolderLock(folder, "") as lock:
        assert lock.note == ""
        assert json.loads((folder / LOCK_NAME).read_bytes())["pid"] == os.getpid()


def test_a_released_lock_leaves_no_files(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    for name in ("there", "new", "a/b"):
        with FolderLock(tmp_path / name, ""), pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            FolderLock(tmp_path / name, "")
        FolderLock(tmp_path / name, "").release()
    assert [path.name for path in tmp_path.iterdir()] == ["there", "a"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]
    lock = FolderLock(tmp_path / "new", "")
    (tmp_path / "new" / "work").touch()
    lock.release()
    lock.release()
    assert (tmp_path / "new" / "work").exists()


def test_many_threads_never_hold_the_lock_together(tmp_path):
    """Not even one that opened the lock file just before its holder deleted it."""
    num_holders, max_holders, num_acquired = [0], [0], [0]
    count = threading.Lock()

    def acquire_often():
        for _ in range(60):
            try:
                lock = FolderLock(tmp_path / "folder", "")
            except ValueError:
                continue
            with count:
                num_holders[0] += 1
                num_acquired[0] += 1
                max_holders[0] = max(max_holders[0], num_holders[0])
            with count:
                num_holders[0] -= 1
            lock.release()

    (tmp_path / "folder").mkdir()
    threads = [threading.Thread(target=acquire_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max_holders == [1]
    assert num_acquired[0] > 8


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{", b'{"pid": 1}', b'{"pid": {}, "host": 3}'])
def test_an_unreadable_lock_file_still_refuses_but_names_nobody(tmp_path, content):
    (tmp_path / LOCK_NAME).write_bytes(content)
    with open(tmp_path / LOCK_NAME, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by another process; wait"):
            FolderLock(tmp_path, "wait")
    FolderLock(tmp_path, "").release()


def test_a_lock_file_that_is_a_link_or_a_pipe_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / LOCK_NAME).symlink_to("precious")
    with pytest.raises(UserError, match=r"\.lock is a link, which is not followed here; delete it$"):
        FolderLock(tmp_path, "")
    (tmp_path / LOCK_NAME).unlink()
    os.mkfifo(tmp_path / LOCK_NAME)
    with pytest.raises(UserError, match=r"\.lock is not a regular file but a device or pipe; delete it$"):
        FolderLock(tmp_path, "")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", [LOCK_NAME, "images", "images/x.jpg", "cache/shards"])
def test_a_folder_with_a_link_that_leads_out_is_not_locked(tmp_path, name):
    """Whoever holds the lock writes and deletes in the folder."""
    (tmp_path / "home").mkdir()
    path = tmp_path / "folder" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "home")
    with pytest.raises(UserError, match=rf"{name} is a link to .*home, outside"):
        FolderLock(tmp_path / "folder", "")
    assert not list((tmp_path / "home").iterdir())


def test_the_text_of_a_lock_file_may_be_anything(tmp_path):
    holder = {"pid": "\x1b[2J", "host": "h", "started": "s", "command": "c"}
    for content in (b"[" * 100_000, json.dumps(holder).encode()):
        (tmp_path / LOCK_NAME).write_bytes(content)
        with open(tmp_path / LOCK_NAME, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="is in use by") as caught:
                FolderLock(tmp_path, "wait")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_note(tmp_path, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path, "") as lock:
        assert "without locks" in lock.note
        assert os.strerror(number) in lock.note


@pytest.mark.parametrize(("number", "where"), [(errno.EROFS, "open"), (errno.EACCES, "open"), (errno.EROFS, "mkdir")])
def test_an_unwritable_folder_is_an_error_with_the_reason(tmp_path, monkeypatch, number, where):
    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock_module.os, where, fail)
    with pytest.raises(ValueError, match=rf"folder cannot be written \({os.strerror(number)}\); name another"):
        FolderLock(Path(tmp_path / "folder"), "name another")


@pytest.mark.parametrize("where", ["open", "mkdir"])
def test_a_full_disk_stays_an_error_of_the_disk(tmp_path, monkeypatch, where):
    """The command line then says to free some space; another folder on the same disk would not help."""

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock_module.os, where, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        FolderLock(Path(tmp_path / "folder"), "name another")
    assert caught.value.filename.startswith(str(tmp_path / "folder"))


def test_whether_a_lock_is_held_is_told_without_taking_it(tmp_path):
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    assert is_held(folder) is False
    folder.mkdir()
    with FolderLock(folder, ""):
        assert is_held(folder) is True
        copy.mkdir()
        shutil.copy(folder / ".lock", copy)
        text = (folder / ".lock").read_text()
    assert is_held(folder) is False
    # the process lives, but has no lock on this file
    assert is_held(copy) is False or not Path("/proc/locks").exists()
    for content, expected in (
        (text.replace(f'"pid": {os.getpid()}', '"pid": 99999999'), False),
        (text.replace(f'"pid": {os.getpid()}', f'"pid": {10**15}'), False),
        (text.replace(f'"pid": {os.getpid()}', '"pid": 0'), False),
        (text.replace(f'"pid": {os.getpid()}', '"pid": -1'), False),
        (text.replace(f'"host": "{socket.gethostname()}"', '"host": "another"'), None),
        ("", False),
        ("[1]", False),
        ('{"pid": "x", "host": 1}', False),
        ("\0" * 100, False),
    ):
        (folder / ".lock").write_text(content)
        assert is_held(folder) is expected, content
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(copy / ".lock")
    assert is_held(folder) is False
