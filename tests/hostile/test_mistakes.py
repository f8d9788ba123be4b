"""Every mistake in mistakes.py gives one line and exit status 2, and changes no file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight.data.prepare.ingest import ingest


@pytest.fixture
def place(tmp_path) -> Path:
    rng = np.random.default_rng(4)
    for folder, names in (("photos", ("a", "b")), ("before", ("c",))):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / folder / f"{name}.png")
    ingest([tmp_path / "before"], tmp_path / "dataset")
    (tmp_path / "run.toml").write_text(
        f'[run]\ndir = "{tmp_path}/run"\ndevice = "cpu"\n[data]\npath = "{tmp_path}/dataset"\nresolution = 64\n'
        'upscale = "always"\n'
    )
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Return path -> SHA-256 of every file below a folder; a folder has the value "folder"."""
    digests = {}
    for at, dirs, files in os.walk(folder):
        digests |= {os.path.relpath(os.path.join(at, name), folder): "folder" for name in dirs}
        for name in files:
            path = Path(at, name)
            digests[os.path.relpath(path, folder)] = hashlib.sha256(
                os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
            ).hexdigest()
    return digests


# the list of rejected files, and cache rows, which are valid even if the command fails
MAY_APPEAR = ("dataset/rejected.jsonl", "dataset/cache")


def test_is_refused_and_changes_nothing(mistake, place, call, monkeypatch):
    # a model that does not exist must not be looked up on the network
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = mistake.words(place)
    before = contents(place)
    called = call(*words)
    called.assert_refused(words[0], mistake.says)
    after = contents(place)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert not [name for name in changed if not name.startswith(MAY_APPEAR)]
    assert all(after.get(name) == digest for name, digest in before.items() if name != "dataset/rejected.jsonl")
