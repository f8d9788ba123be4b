"""`safelight prepare unsplash:...` as a user meets it, and killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from safelight.data.manifest import read_manifest
from safelight.data.sources.download import ALSO_FROM
from tests.called import call
from tests.data.photo_server import PhotoServer, jpeg
from tests.data.test_unsplash import photo_id, row, write_table


@pytest.fixture
def server(monkeypatch):
    server = PhotoServer()
    monkeypatch.setenv(ALSO_FROM, server.address)
    yield server
    server.close()


def table_of(folder, server, num, size=(160, 120)):
    """Return a table of invented photographs that the server serves."""
    rows = []
    for number in range(num):
        server.add(f"/photo-{number}", jpeg(number, *size))
        rows.append(row(number, photo_image_url=server.url(f"/photo-{number}")))
    return write_table(folder / "photos.tsv000", rows)


def test_the_command(tmp_path, server):
    table = table_of(tmp_path, server, 20)
    dataset = tmp_path / "dataset"
    options = ["--limit", 6, "--width", 1200, "--seed", 1, "--where", "camera ~ canon", "--captions", "ai"]
    called = call("prepare", f"unsplash:{table}", *options, "-o", dataset)
    assert called.status == 0
    assert f"6 photographs in {dataset} (6 copied unchanged" in called.out
    assert "download 6/6  " in called.err
    assert " MB/s" in called.err
    assert all("w=1200" in path for path, _ in server.requests)
    as_json = json.loads(call("prepare", f"unsplash:{table}", *options, "-o", dataset, "--json").out)
    assert (as_json["photos"], as_json["rejected"]) == (6, [])
    assert len(server.requests) == 6


def test_ids_that_begin_with_a_dash_are_no_options(tmp_path, server):
    """All of them, in one dataset: as file names, as captions' keys and as sources."""
    rows = [row(number, photo_image_url=server.add(f"/{number}", jpeg(number, 160, 120))) for number in range(0, 30, 3)]
    assert all(one["photo_id"].startswith("-") for one in rows)
    table = write_table(tmp_path / "photos.tsv000", rows)
    called = call("prepare", f"unsplash:{table}", "--captions", "ai", "-o", tmp_path / "dataset")
    assert called.status == 0
    photos = read_manifest(tmp_path / "dataset")
    assert {photo.source for photo in photos} == {f"unsplash/{photo_id(number)}.jpg" for number in range(0, 30, 3)}
    assert not any(photo.file.startswith("images/-") for photo in photos)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--limit", "5"], "--limit is for an Unsplash table; give one as unsplash:photos.tsv000"),
        (["photos", "--captions", "ai"], "--captions is for an Unsplash table"),
        (["unsplash:nothing.tsv000"], "unsplash:nothing.tsv000 names no file; give the table of the Unsplash Lite"),
        (["unsplash:TABLE", "--where", "photo_with > 3"], "there is no column photo_with; did you mean photo_width?"),
        (["unsplash:TABLE", "--where", "photo_width"], "photo_width is compared with nothing"),
        (["unsplash:TABLE", "--limit", "0"], "--limit 0 is outside 1 to"),
        (["unsplash:TABLE", "--captions", "all"], "invalid choice"),
        (["unsplash:TABLE"], "none of 2 photographs can be downloaded; the first is http://127.0.0.1:9/"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "photos.tsv000", [row(n, photo_image_url=f"http://127.0.0.1:9/{n}") for n in range(2)])
    words = [word.replace("TABLE", "photos.tsv000") for word in words]
    refused = call("prepare", *words, "-o", tmp_path / "dataset")
    refused.assert_refused("prepare", message)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path, server):
    """Killed while the server drips; in the end the dataset is the one of a call that nobody disturbed."""
    num, size = 24, (640, 480)
    table = table_of(tmp_path, server, num, size)

    def drip(handler, num_requests):
        """Send the file in pieces, so that a kill always finds some in the middle."""
        path = handler.path.partition("?")[0]
        content = server.files[path]
        etag = f'"{path}"'
        start = 0
        if handler.headers.get("If-Range") == etag:
            start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if start else 200)
        sent = {"Content-Type": "image/jpeg", "ETag": etag, "Content-Length": str(len(content) - start)}
        if start:
            sent["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for name, value in sent.items():
            handler.send_header(name, value)
        handler.end_headers()
        for place in range(start, len(content), 1000):
            handler.wfile.write(content[place : min(place + 1000, len(content))])
            handler.wfile.flush()
            time.sleep(0.05)
            pieces.append(path)

    pieces: list[str] = []
    server.behaviours.update({f"/photo-{number}": drip for number in range(num)})
    dataset = tmp_path / "dataset"
    command = [
        sys.executable,
        "-m",
        "safelight",
        "prepare",
        f"unsplash:{table}",
        "--limit",
        str(num),
        "-o",
        str(dataset),
    ]
    downloads = dataset / "downloads" / "unsplash"
    num_pieces_of_all = sum(-(-len(content) // 1000) for content in server.files.values())
    for kill_after in (0.15, 0.4, 0.7):
        process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
        while len(pieces) < kill_after * num_pieces_of_all:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # a file under its own name is whole
        for path in downloads.glob("*.jpg"):
            assert path.read_bytes() in server.files.values()
    there = {path.name for path in downloads.glob("*.jpg")}
    assert 0 < len(there) < num
    num_before = len(server.requests)
    assert subprocess.run(command, env=os.environ, stderr=subprocess.DEVNULL).returncode == 0
    assert len(server.requests) - num_before == num - len(there)
    ranges = [headers["Range"] for _, headers in server.requests if "Range" in headers]
    assert len(ranges) > 3
    # three kills lost little of what had been sent
    assert len(pieces) < 1.3 * num_pieces_of_all
    assert sorted(path.name for path in downloads.iterdir() if path.name.startswith(".")) == [".asked.json"]
    undisturbed = tmp_path / "undisturbed"
    server.behaviours.clear()
    assert call("prepare", f"unsplash:{table}", "--limit", num, "-o", undisturbed).status == 0
    assert read_manifest(dataset) == read_manifest(undisturbed)


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_and_the_next_call_goes_on(tmp_path, server):
    table = table_of(tmp_path, server, 8)
    for number in range(4):
        server.add(f"/photo-{number}", lambda handler, num: time.sleep(60) if num == 1 else handler.send_file(b""))
    dataset = tmp_path / "dataset"
    command = [sys.executable, "-m", "safelight", "prepare", f"unsplash:{table}", "-o", str(dataset)]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True)
    while len(list((dataset / "downloads" / "unsplash").glob("*.jpg")) if dataset.exists() else []) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert time.monotonic() - start < 8
    assert process.stderr.read().endswith("interrupted\n")
    server.behaviours.clear()
    assert call("prepare", f"unsplash:{table}", "-o", dataset).status == 0
    assert len(read_manifest(dataset)) == 8
