"""Two processes in one folder: the second is refused with a line that names the first, and nothing is lost.

Only a cache is shared: several processes fill and read it (tests/data/test_filling.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.small_base import small_base

HOLDER = """
import sys
from safelight.data.lock import FolderLock
with FolderLock(sys.argv[1], "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """A function that starts a process which locks a folder, as `train` and `prepare` do."""
    processes = []

    def start(folder) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), "train", "run.toml"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def place(tiny_dataset, tmp_path):
    """A folder with four photographs and a config."""
    (tmp_path / "photos").mkdir()
    for path in sorted((tiny_dataset.parent / "photos").glob("*.png"))[:4]:
        shutil.copy(path, tmp_path / "photos")
    (tmp_path / "run.toml").write_text(
        f'[run]\ndir = "{tmp_path}/run"\ndevice = "cpu"\n[model]\nbase = "{small_base()}"\n'
        f'[data]\npath = "{tmp_path}/dataset"\nresolution = 64\n'
        'upscale = "always"\n'
        "[train]\nmax_steps = 1\n[validate]\nevery_epochs = 0\n[sample]\nevery_epochs = 0\n[log]\ntensorboard = false\n"
    )
    return tmp_path


def test_a_second_command_is_refused_with_the_name_of_the_first(place, call, hold):
    """prepare, cache and train while their folder is locked; once the holder is killed, they succeed."""
    for words, folder, fix in (
        (
            ("prepare", place / "photos", "-o", place / "dataset"),
            place / "dataset",
            "choose another dataset folder with -o",
        ),
        (("cache", place / "run.toml"), place / "dataset" / "cache", "then run this again"),
        (("train", place / "run.toml"), place / "run", "name another --run.dir"),
    ):
        holder = hold(folder)
        called = call(*words)
        called.assert_refused(words[0], f"{folder} is in use by process {holder.pid} on ")
        assert called.err.rstrip().endswith(fix)
        assert "train run.toml); wait until it " in called.err
        holder.kill()
        holder.wait()
        assert call(*words).status == 0
    assert not list(place.rglob(".lock")), "a released lock leaves no file"
    # a lock that is not shared is held while rows are deleted, so that no reader may come
    holder = hold(place / "dataset" / "cache")
    called = call("train", place / "run.toml", "--run.dir", place / "another")
    called.assert_refused("train", f"cache is in use by process {holder.pid} on ")


def test_a_run_holds_its_folder_while_it_trains(place, call, monkeypatch):
    """A second `train` is started in the middle of the first one's loop."""
    from safelight.trainer import train as train_module

    assert call("prepare", place / "photos", "-o", place / "dataset").status == 0
    refused = []

    def step_and_ask(*args, original=train_module.train_step, **options):
        refused.append(call("train", place / "run.toml", "--resume"))
        return original(*args, **options)

    monkeypatch.setattr(train_module, "train_step", step_and_ask)
    assert call("train", place / "run.toml").status == 0
    (second,) = refused
    second.assert_refused("train", f"run is in use by process {os.getpid()} on ")
