"""From a table of photographs to a captioned, tagged and verified cache, killed on the way: docs/data.md's commands."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safelight.data.manifest import read_manifest
from safelight.data.sources.download import ALSO_FROM
from safelight.trainer.tiny.scenes import draw, random_scene
from tests.called import call
from tests.data.photo_server import PhotoServer
from tests.data.test_unsplash import row, write_table

NUM_PHOTOS = 500
# without it the dataset is not tagged
SHARED = Path(os.environ.get("SAFELIGHT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
DETECTOR = SHARED / "weights" / "yolox_nano" / "yolox_nano.onnx"


@pytest.fixture
def server(monkeypatch):
    server = PhotoServer()
    monkeypatch.setenv(ALSO_FROM, server.address)
    yield server
    server.close()


def table_of_scenes(folder: Path, server: PhotoServer) -> Path:
    """Return a table of NUM_PHOTOS scenes of the tiny world, which the server serves."""
    rows = []
    for number in range(NUM_PHOTOS):
        path = folder / "scene.jpg"
        draw(random_scene(31, number)).resize((192, 192)).save(path, quality=90)
        rows.append(row(number, photo_image_url=server.add(f"/{number}", path.read_bytes())))
        path.unlink()
    return write_table(folder / "photos.tsv000", rows)


def killed(words: list, is_midway) -> None:
    """Run a command and kill it once is_midway() returns True. It must not have ended by then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "safelight", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        deadline = time.monotonic() + 600
        while not is_midway():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_500_rows_become_a_verified_cache_although_each_command_is_killed(tmp_path, server, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = table_of_scenes(tmp_path, server)
    dataset = tmp_path / "datasets" / "unsplash"
    prepare = ["prepare", f"unsplash:{table}", "--limit", NUM_PHOTOS, "--width", 1600, "--seed", 1, "-o", dataset]
    killed(prepare, lambda: len(server.requests) > NUM_PHOTOS // 3)
    assert call(*prepare).status == 0
    photos = read_manifest(dataset)
    assert len(photos) == NUM_PHOTOS
    # nothing that had arrived was fetched again, but what was on its way
    assert len(server.requests) < NUM_PHOTOS + 20
    assert all(photo.credit.photographer for photo in photos)

    caption = ["caption", dataset, "--model", "tiny", "--num-beams", 1, "--suffix", ", unsplash photography"]
    killed(caption, lambda: any(path.stat().st_size > 2000 for path in (dataset / "captions").glob("*")))
    again = call(*caption, "--json")
    assert again.status == 0
    made = json.loads(again.out)
    photos = read_manifest(dataset)
    assert all(photo.captions[0].endswith(", unsplash photography") and photo.captioner for photo in photos)
    # what the killed call had written was taken up
    assert made["from_journal"] > 0
    assert made["generated"] + made["from_journal"] == NUM_PHOTOS

    if DETECTOR.is_file() and importlib.util.find_spec("onnxruntime"):
        tagged = call("caption", dataset, "--tags-from-detector", DETECTOR, "--json")
        assert tagged.status == 0, tagged.err
        assert json.loads(tagged.out)["looked_at"] == NUM_PHOTOS
        assert [photo.captions for photo in read_manifest(dataset)] == [photo.captions for photo in photos]

    call("init", "tiny", "-o", "run.toml")
    cache = ["cache", "run.toml", "--data.path", dataset]
    killed(cache, lambda: sum(p.stat().st_size for p in (dataset / "cache").rglob("posterior-*")) > 1_000_000)
    assert call(*cache).status == 0
    verified = call(*cache, "--verify", "--json")
    assert verified.status == 0, verified.err
    assert call(*cache, "--gc", "--dry-run", "--json").status == 0
