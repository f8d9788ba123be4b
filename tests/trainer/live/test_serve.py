"""The live report's server: who is refused, what it shows, and what happens while the run's files change."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from safelight.data.lock import FolderLock
from safelight.errors import UserError
from safelight.trainer.live import live_page, runs_below
from safelight.trainer.live.followed_run import FollowedRun
from safelight.trainer.live.live_page import CSP
from safelight.trainer.live.runs_below import MAX_DEPTH, find_runs
from safelight.trainer.live.serve import PORT, open_server
from tests.called import call
from tests.trainer.live.client import Client, serving
from tests.trainer.report.conftest import metrics_lines, write_json, write_metrics
from tests.trainer.report.hostile_run import HOSTILE

NUM_STEPS = 110
SECRET = "the content of a file outside"


def make_run(folder: Path, num_epochs: int = 2, title: str = "", planned: int = 2) -> Path:
    """Return a run without pictures, which is rendered in milliseconds."""
    folder.mkdir(parents=True)
    titled = f"[run]\ntitle = {json.dumps(title)}\n" if title else ""
    (folder / "config.toml").write_text(f"{titled}[train]\nepochs = {planned}\n")
    write_metrics(folder, metrics_lines(num_epochs))
    write_json(folder / "model.json", {"base": "runwayml/stable-diffusion-v1-5"})
    return folder


def log(run: Path, step: int, epoch: float) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        line = {"kind": "train", "step": step, "epoch": epoch, "stage": 0, "loss": 0.12345, "lr": 1e-6, "time": 1.7e9}
        file.write(json.dumps(line) + "\n")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Files are looked at, and pages rendered, whenever somebody asks."""
    for name in ("LOOK_EVERY_S", "MIN_PAUSE_S", "PAUSE_PER_RENDERING"):
        monkeypatch.setattr(live_page, name, 0)


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def wait_for(ask, is_so) -> object:
    """Return the first answer of which `is_so` holds; a rendering that it causes takes a while."""
    for _ in range(200):
        if is_so(answer := ask()):
            return answer
        time.sleep(0.02)
    raise AssertionError(answer)


def test_the_address_opens_the_report(run):
    with serving(run) as client:
        assert re.fullmatch(rf"http://127\.0\.0\.1:{client.server.server_port}/[\w-]{{32}}/", client.server.address)
        page = client.ask()
        assert page.status == 200
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "<title>run · Safelight</title>" in page.text
        assert 'data-part="loss"' in page.text
        assert client.server.socket.getsockname()[0] == "127.0.0.1"
    # another server has another secret
    with serving(run) as other:
        assert other.token != client.token
        assert other.ask(token=client.token).status == 403


def test_an_address_without_its_last_slash_leads_to_the_page(run, tmp_path, capfd):
    with serving(run) as client:
        for target in (f"/{client.token}", f"/{client.token}?x=//example.org"):
            moved = client.raw(target)
            assert (moved.status, moved.headers["Location"], moved.body) == (307, f"/{client.token}/", b"")
            assert moved.headers["Referrer-Policy"] == "no-referrer"
        assert client.raw(f"/{client.token[:-1]}").status == 403
        assert client.ask("runs/example.org").status == 404
        # a link that a header could be made of
        assert client.ask("runs/x%0d%0aSet-Cookie:%20a=b").status == 404
    with serving(run.parent) as client:
        key = re.search(r'href="runs/([0-9a-f]{12})/"', client.ask().text)[1]
        moved = client.ask(f"runs/{key}")
        assert (moved.status, moved.headers["Location"]) == (307, f"/{client.token}/runs/{key}/")
        assert client.raw(moved.headers["Location"]).status == 200
        assert client.ask("runs/0123456789ab").status == 404
        assert client.token not in "".join(capfd.readouterr())


def test_every_answer_carries_the_strict_headers(run):
    with serving(run) as client:
        for answer in (
            client.ask(),
            client.ask("version"),
            client.raw("/"),
            client.ask("nothing"),
            client.ask(method="PUT"),
        ):
            assert answer.headers["Content-Security-Policy"] == f"{CSP}; frame-ancestors 'none'"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Server"] is None
            assert answer.headers["Set-Cookie"] is None
        assert CSP.startswith("default-src 'none'; img-src data:; connect-src 'self'; style-src 'sha256-")
        assert "unsafe" not in CSP
        meta = re.search(r'Content-Security-Policy" content="([^"]*)"', client.ask().text)[1]
        assert meta.replace("&#x27;", "'") == CSP


def test_without_the_secret_every_path_is_refused_alike(run):
    with serving(run) as client:
        token = client.token
        targets = [
            "/",
            "",
            "*",
            "/version",
            "/favicon.ico",
            f"/{token[:-1]}/",
            f"/{token}x/",
            f"/{token.lower()}/",
        ]
        targets += [
            f"/?{token}",
            f"/x/{token}/",
            "/%00/",
            f"/{token[:16]}%2F/",
            f"http://127.0.0.1/{token}/",
            "/../run/",
        ]
        for target in targets:
            refused = client.raw(target or "/")
            assert (refused.status, refused.body) == (403, b"forbidden\n"), target
        with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=10) as connection:
            connection.sendall(b"GET /\xe9\xff/ HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert connection.makefile("rb").read().endswith(b"\r\n\r\nforbidden\n")
        assert client.ask().status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8017",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "",
        "127.0.0.1:x",
        "0.0.0.0",
        "[::]",
    ],
)
def test_another_host_is_refused_with_the_secret_too(run, host):
    """A page of another site whose name was made to point here sends its own name."""
    with serving(run) as client:
        assert (client.ask(host=host).status, client.ask(host=host).body) == (403, b"forbidden\n")


def test_a_forwarded_port_is_no_other_host(run):
    with serving(run) as client:
        for host in ("localhost:9000", "127.0.0.1:1", "LOCALHOST", "[::1]:8017"):
            assert client.ask(host=host).status == 200


def test_it_is_read_only(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")} | {run: run.stat().st_mtime_ns}
    with serving(run) as client:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"):
            refused = client.ask(method=method)
            assert (refused.status, refused.body) == (405, b"not allowed\n")
            assert refused.headers["Allow"] == "GET, HEAD"
        head = client.ask(method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert int(head.headers["Content-Length"]) > 10_000
        client.ask()
    assert {path: path.stat().st_mtime_ns for path in (*run.rglob("*"), run)} == before


def test_what_is_not_http_gets_one_line_without_an_echo(run):
    with serving(run) as client:
        for sent in (
            b"\x16\x03\x01 hello\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET " + b"x" * 70_000 + b"\r\n\r\n",
            b"<script>\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=10) as connection:
                connection.sendall(sent)
                answer = connection.makefile("rb").read()
            assert answer.endswith(b"not allowed\n")
            assert b"Python" not in answer
            assert b"hello" not in answer
            assert b"<script>" not in answer
        assert client.ask().status == 200


def test_no_path_leads_to_a_file(run, tmp_path):
    (tmp_path / "outside.json").write_text(SECRET)
    (run / "compare").symlink_to(tmp_path)
    (tmp_path / "index.json").write_text(SECRET)
    with serving(run) as client:
        for path in (
            *("../outside.json", "..%2foutside.json", "%2e%2e/outside.json", "config.toml", "./", "//etc/passwd"),
            *(
                "part/../../outside.json",
                "part/%2e%2e",
                "part/config.toml",
                "part/",
                "part/loss/x",
                "version/",
                "report.html",
            ),
            *("runs/", "runs/x/", "runs/../../../etc/passwd", "..\\outside.json", "part/\0", "file:///etc/passwd"),
        ):
            answer = client.raw(f"/{client.token}/{path}".replace("\0", "%00"))
            assert answer.status in (403, 404), path
            assert SECRET not in answer.text
        assert SECRET not in client.ask().text


def test_what_changed_is_told_and_only_that_is_sent_again(run):
    with serving(run) as client:
        first = client.ask("version").json
        assert client.ask("version").json["parts"] == first["parts"]
        log(run, NUM_STEPS + 5, 2.0909)
        second = wait_for(lambda: client.ask("version").json, lambda now: now["parts"] != first["parts"])
        assert [key for key, _ in second["parts"]] == [key for key, _ in first["parts"]]
        changed = {key for key, digest in second["parts"] if [key, digest] not in first["parts"]}
        assert {"header", "loss"} <= changed
        assert not {"parameters", "data", "footer"} & changed
        part = client.ask("part/loss").json
        assert ["loss", part["digest"]] in second["parts"]
        assert "0.12345" in part["html"].replace("&quot;", '"')
        assert second["changed"] >= first["changed"]
        assert abs(second["now"] - time.time()) < 5
        assert client.ask("part/nothing").status == 404


def test_a_new_section_appears(run):
    with serving(run) as client:
        keys = [key for key, _ in client.ask("version").json["parts"]]
        assert "grids" not in keys
        grid = {
            "x": {"name": "cfg", "labels": ["3"]},
            "y": {"name": "steps", "labels": ["9"]},
            "z": None,
            "prompt": "a boat",
        }
        cell = {"x": 0, "y": 0, "z": 0, "file": "0.png"}
        write_json(run / "grids" / "one" / "index.json", {**grid, "fixed": [], "cells": [cell], "sheet": ""})
        now = wait_for(lambda: client.ask("version").json, lambda now: len(now["parts"]) > len(keys))
        assert {key for key, _ in now["parts"]} - set(keys) == {"grids"}


def test_a_rendering_keeps_nobody_waiting(run, monkeypatch):
    may_go_on, read, num_read = threading.Event(), FollowedRun.read, []
    may_go_on.set()

    def slowly(self):
        num_read.append(1)
        assert may_go_on.wait(20)
        return read(self)

    monkeypatch.setattr(FollowedRun, "read", slowly)
    with serving(run) as client:
        first = client.ask("version").json
        may_go_on.clear()
        log(run, NUM_STEPS + 5, 2.1)
        start = time.monotonic()
        for _ in range(3):
            assert client.ask("version").json["parts"] == first["parts"]
            assert client.ask().status == 200
        assert time.monotonic() - start < 5
        may_go_on.set()
        wait_for(lambda: client.ask("version").json, lambda now: now["parts"] != first["parts"])
    # the first, and one more whatever the number of requests
    assert len(num_read) == 2


def test_a_page_is_not_rendered_more_often_than_every_few_seconds(run, monkeypatch):
    monkeypatch.setattr(live_page, "MIN_PAUSE_S", 1000.0)
    with serving(run) as client:
        first = client.ask("version").json
        log(run, NUM_STEPS + 5, 2.1)
        time.sleep(0.1)
        assert client.ask("version").json["parts"] == first["parts"]
        client.server._first._next_look = 0.0
        wait_for(lambda: client.ask("version").json, lambda now: now["parts"] != first["parts"])


def test_two_clients_at_once_see_the_same(run):
    with serving(run) as client, ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(lambda _: client.ask().text, range(8)))
        assert set(pages) == {pages[0]}
        stopped = threading.Event()

        def train() -> None:
            step = NUM_STEPS
            while not stopped.is_set():
                step += 1
                log(run, step, step / 55)
                time.sleep(0.005)

        training = threading.Thread(target=train)
        training.start()
        answers = list(
            pool.map(lambda i: client.ask(("", "version", "part/loss", "part/header")[i % 4]).status, range(24))
        )
        stopped.set()
        training.join()
        assert set(answers) == {200}


def test_idle_connections_do_not_shut_others_out_for_ever(run, monkeypatch):
    from safelight.trainer.live import serve

    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(serve._Handler, "timeout", 0.3)
    with serving(run) as client:
        idle = [socket.create_connection(("127.0.0.1", client.server.server_port)) for _ in range(3)]

        def status() -> int:
            try:
                return client.ask("version").status
            except OSError:
                return 0

        assert wait_for(status, lambda code: code == 200)
        for connection in idle:
            connection.close()


def test_a_run_that_is_deleted_meanwhile_is_said_and_its_last_state_stays(run):
    with serving(run) as client:
        assert client.ask("version").json["says"].startswith("Finished, ")
        shutil.rmtree(run)
        gone = wait_for(lambda: client.ask("version").json, lambda now: not now["says"].startswith("Finished, "))
        assert gone["says"] == f"{run} is no longer there; this page shows the last state"
        page = client.ask()
        assert page.status == 200
        assert "is no longer there; this page shows the last state" in page.text
        make_run(run)
        wait_for(lambda: client.ask("version").json, lambda now: now["says"].startswith("Finished, "))


def test_an_error_that_nobody_expects_ends_the_server_and_is_raised(run, monkeypatch):
    def broken(self):
        raise ZeroDivisionError

    monkeypatch.setattr(FollowedRun, "read", broken)
    with pytest.raises(ZeroDivisionError), serving(run) as client:
        assert client.ask().status == 404


def state(run: Path) -> str:
    """Return what is said of a run, with the time at which it ended as WHEN."""
    now = FollowedRun(run).read().state()
    return re.sub(r", 20\d\d-\d\d-\d\d \d\d:\d\d$", ", WHEN", f"{now.kind}: {now.says}")


def test_what_goes_on_is_told_by_the_lock_and_the_log(tmp_path):
    finished, short = make_run(tmp_path / "finished"), make_run(tmp_path / "short", planned=5)
    assert state(finished) == "finished: Finished, WHEN"
    assert state(short) == "killed: Ended before its time, at epoch 2 of 5, WHEN"
    assert "The run was ended before its time, at epoch 2 of 5." in FollowedRun(short).read().content.header
    with FolderLock(short, "") as lock:
        assert state(short) == "running: Training goes on: epoch 2 of 5, step 110"
        assert "Training goes on: it has come to epoch 2 of 5." in FollowedRun(short).read().content.header
        assert lock.folder == short
    with FolderLock(finished, ""):
        assert state(finished) == "running: Trained 2 of 2 epochs; the last pictures are being drawn"
    with (short / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 110, "event": "stopped", "detail": "", "time": 1.7e9}) + "\n")
    assert state(short) == "stopped: Stopped at epoch 2 of 5, WHEN"
    new = make_run(tmp_path / "new", planned=5)
    (new / "metrics.jsonl").unlink()
    assert state(new) == "unknown: Not training; no step was logged"
    with FolderLock(new, ""):
        assert state(new) == "running: Training starts: no step logged yet"


def test_a_run_on_another_computer_counts_as_going_on_while_its_log_is_young(tmp_path):
    run = make_run(tmp_path / "run", planned=5)
    holder = {"pid": 1, "host": "another", "started": "", "command": ""}
    (run / ".lock").write_text(json.dumps(holder))
    assert state(run).startswith("running: ")
    for path in run.iterdir():
        os.utime(path, (1.7e9, 1.7e9))
    assert state(run).startswith("killed: ")


def test_the_runs_below_a_folder_are_found_and_links_are_not_followed(tmp_path):
    root, outside = tmp_path / "root", make_run(tmp_path / "outside" / "run")
    for name in ("b", "a/one", "a/b/c/d"):
        make_run(root / name)
    make_run(root / "b" / "inside-a-run")
    make_run(root / ".hidden" / "run")
    make_run(root / "/".join("abcdefgh"[:MAX_DEPTH]) / "too-deep")
    (root / "link").symlink_to(outside)
    (root / "links").symlink_to(outside.parent)
    (root / "dataset").mkdir()
    (root / "dataset" / "manifest.jsonl").touch()
    (root / "settings").mkdir()
    (root / "settings" / "config.toml").touch()
    assert [run.name for run in find_runs(root)] == ["a/b/c/d", "a/one", "b"]


def rows(client: Client) -> list[str]:
    return re.findall(r"<tr><th scope=\"row\">.*?</tr>", client.ask("part/runs").json["html"])


def test_a_folder_of_runs_lists_them_with_links_to_their_pages(tmp_path):
    root = tmp_path / "root"
    make_run(root / "one", planned=5)
    make_run(root / "deep" / "two", title="The second")
    with serving(root) as client:
        assert [run.key for run in find_runs(root)] == re.findall(r'runs/(\w+)/"', "".join(sorted(rows(client))))[::-1]
        assert client.ask("version").json["says"] == "2 runs, 0 training"
        keys = {run.name: run.key for run in find_runs(root)}
        page = client.ask(f"runs/{keys['deep/two']}/")
        assert "<title>The second · Safelight</title>" in page.text
        assert '<a href="../../">All runs</a>' in page.text
        assert (
            client.ask(f"runs/{keys['one']}/version")
            .json["says"]
            .startswith("Ended before its time, at epoch 2 of 5, ")
        )
        assert client.ask(f"runs/{keys['one']}/part/loss").status == 200
        for path in (
            "runs/",
            "runs/one/",
            "runs/../",
            f"runs/{keys['one']}/x",
            "runs//",
            "runs/0/version",
        ):
            assert client.ask(path).status == 404
        one = next(row for row in rows(client) if keys["one"] in row)
        assert ">ended early<" in one
        assert ">2 of 5<" in one
        assert ">110<" in one
        with FolderLock(root / "one", ""):
            wait_for(lambda: client.ask("version").json["says"], lambda says: says == "2 runs, 1 training")
            # the one that is training comes first
            wait_for(lambda: rows(client)[0], lambda row: keys["one"] in row and ">training<" in row)
        # one that is new, and one that is gone
        make_run(root / "three")
        wait_for(lambda: len(rows(client)), lambda num: num == 3)
        shutil.rmtree(root / "deep")
        wait_for(lambda: len(rows(client)), lambda num: num == 2)


def test_only_some_pages_are_kept(tmp_path, monkeypatch):
    from safelight.trainer.live import serve

    monkeypatch.setattr(serve, "MAX_PAGES", 2)
    for name in ("one", "two", "three"):
        make_run(tmp_path / name)
    keys = [run.key for run in find_runs(tmp_path)]
    with serving(tmp_path) as client:
        for key in (*keys, keys[1], keys[0]):
            assert client.ask(f"runs/{key}/version").status == 200
        assert list(client.server._pages) == [keys[1], keys[0]]


def test_a_run_that_is_replaced_by_a_link_is_not_shown(tmp_path):
    root = tmp_path / "root"
    run = make_run(root / "run")
    make_run(tmp_path / "outside", title=SECRET)
    key = find_runs(root)[0].key
    shutil.rmtree(run)
    run.symlink_to(tmp_path / "outside")
    with serving(root) as client:
        assert client.ask(f"runs/{key}/").status == 404
        assert SECRET not in client.ask().text


def test_names_that_hold_scripts_are_text(tmp_path):
    root = tmp_path / "<img src=x onerror=alert(1)>"
    make_run(root / "<script>alert(2)<" / "\"onclick='x' \u202eturned", title=HOSTILE[:150])
    make_run(root / os.fsdecode(b"\xff\xfe not utf-8"))
    make_run(root / "with ? and # and %2e%2e")
    with serving(root) as client:
        pages = [client.ask().text, client.ask("part/runs").text]
        pages += [client.ask(f"runs/{run.key}/").text for run in find_runs(root)]
        assert len(pages) == 5
        for text in pages:
            assert "<img src=x" not in text
            assert "<script>alert" not in text
            assert text.count("<script>") <= 1
            assert "onclick='x'" not in text
            assert "\u202e" not in text


def test_a_folder_without_runs_says_so(tmp_path):
    with serving(tmp_path) as client:
        assert client.ask("version").json["says"] == "No run yet"
        assert "No run lies in this folder yet" in client.ask().text


def test_a_run_is_read_again_only_when_its_files_change(tmp_path, monkeypatch):
    num_read = []
    read = runs_below.read_run_folder
    monkeypatch.setattr(runs_below, "read_run_folder", lambda run: num_read.append(run.name) or read(run))
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    with serving(tmp_path) as client:
        client.ask()
        assert sorted(num_read) == ["first", "second"]
        log(second, NUM_STEPS + 1, 2.1)
        wait_for(lambda: client.ask("part/runs").text, lambda text: ">111<" in text)
        assert sorted(num_read) == ["first", "second", "second"]
        assert first.is_dir()


def test_a_port_that_is_taken(run):
    with open_server(run, 0) as server, pytest.raises(UserError, match=f"port {server.server_port} cannot be used"):
        open_server(run, server.server_port)
    for port in (-1, 65536):
        with pytest.raises(UserError, match=f"--port {port} is not a port"):
            open_server(run, port)
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", PORT))
            taken.listen()
        except OSError:
            pytest.skip("something else has the usual port")
        with open_server(run, None) as server:
            assert server.server_port != PORT


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["RUN", "--port", "80x"], "--port 80x is not a whole number"),
        (["RUN", "--port", "8000"], "--port is for --serve"),
        (["RUN", "RUN", "--serve"], "--serve takes one folder"),
        (["RUN", "--serve", "-o", "x.html"], "-o is for the page about several runs"),
        (["nothing", "--serve"], "nothing is not a run folder: it has no config.toml"),
        (["RUN", "--serve", "--port", "70000"], "--port 70000 is not a port"),
        (["", "--serve"], "RUN is empty"),
    ],
)
def test_mistakes_on_the_command_line(run, words, part, monkeypatch):
    monkeypatch.chdir(run.parent)
    call("report", *(str(run) if word == "RUN" else word for word in words)).assert_refused("report", part)
