"""The dataset's readers survive any damage: no crash, no hang, nothing written outside, only errors to be fixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from safelight.data.cache import Cache
from safelight.data.prepare.ingest import ingest

SCRIPT = Path(__file__).with_name("fuzz.py")
# a file system in memory if there is one: each input is written and synced
PLACE = "/dev/shm" if os.path.isdir("/dev/shm") else None


@pytest.fixture
def folder(make_noise):
    """`good`: a dataset of three photos and a cache of twelve rows. Beside it a file that must not change."""
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        folder = Path(name)
        (folder / "source").mkdir()
        for i in range(3):
            make_noise(i).save(folder / "source" / f"photo {i}_{i}.png")
        ingest([folder / "source"], folder / "good")
        for file in (folder / "source").iterdir():
            file.unlink()
        (folder / "source").rmdir()
        with Cache(folder / "good" / "cache") as cache:
            cache.append("text", [f"{i:064x}" for i in range(12)], np.arange(72.0).reshape(12, 2, 3))
            cache.note_photos({"images/a.jpg": ("0" * 64, 1, 2)})
        (folder / "manifest.jsonl").write_bytes((folder / "good" / "manifest.jsonl").read_bytes())
        (folder / "precious").write_text("precious")
        yield folder


def fuzz(target: str, folder: Path, first: int, num: int) -> dict:
    command = [sys.executable, str(SCRIPT), target, str(folder), str(first), str(num)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["index", "shard", "manifest"])
def test_ten_thousand_damaged_inputs(folder, target):
    ends = fuzz(target, folder, 1000, 10_000)
    print(target, ends)
    assert set(ends) <= {"well", "UserError", "UnsafeFile", "CorruptRow"}
    # neither harmless throughout nor refused throughout
    assert min(ends["well"], 10_000 - ends["well"]) > 500
