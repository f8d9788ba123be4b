"""`safelight export --push`, against a hub on this computer: what is uploaded, what is asked, and what may fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from safelight.__main__ import main
from tests.trainer.inference.stub_hub import TOKEN, StubHub, serving

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def hub(monkeypatch):
    with serving(StubHub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # a connection that is closed is not tried again for long
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        yield hub


def export(run: Path, out: Path, *words: str) -> int:
    return main(["export", str(run), "-o", str(out), *words])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_folder_is_uploaded_whole_to_a_new_private_repository(tiny_run, tmp_path):
    """As a user does: in a process of its own, with HF_ENDPOINT."""
    with serving(StubHub()) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        words = ["export", str(tiny_run), "-o", str(tmp_path / "mine"), "--push", "me/mine", "--yes"]
        done = subprocess.run(
            [sys.executable, "-m", "safelight", *words], env=environment, cwd=ROOT, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert hub.repos["me/mine"] == files_of(tmp_path / "mine")
    assert {"README.md", "model_index.json", "unet/config.json"} <= hub.repos["me/mine"].keys()
    assert hub.private == {"me/mine"}
    lines = done.stdout.splitlines()
    shown = next(line for line in lines if line.startswith("upload to me/mine, as me, visible to you alone: "))
    assert f": {len(hub.repos['me/mine'])} files, " in shown
    assert any("no photograph of the dataset; no picture" in line for line in lines)
    assert lines[-1] == f"uploaded: {hub.url}/me/mine"


def test_a_single_file_is_uploaded_with_its_card(hub, tiny_run, tmp_path, capsys):
    assert export(tiny_run, tmp_path / "mine.safetensors", "--push", "me/mine", "--public", "--yes") == 0
    assert hub.repos["me/mine"].keys() == {"mine.safetensors", "README.md"}
    assert hub.repos["me/mine"]["README.md"] == (tmp_path / "mine.md").read_bytes()
    assert hub.private == set()
    assert "visible to everybody" in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["n", "", "y"])
def test_it_asks_before_it_uploads(hub, tiny_run, tmp_path, monkeypatch, capsys, answer):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine") == 0
    out = capsys.readouterr().out
    assert bool(hub.repos) == (answer == "y")
    assert ("nothing was uploaded" in out) == (answer != "y")
    assert (tmp_path / "mine" / "README.md").is_file()


def test_without_a_terminal_it_needs_to_be_told(hub, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine") == 2
    assert "there is no terminal to answer on; add --yes" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("mine", "is not USER/REPO"), ("../mine", "is not USER/REPO"), ("me/mi ne", "is not USER/REPO")],
)
def test_a_name_that_is_none_is_refused(hub, tiny_run, tmp_path, capsys, name, message):
    assert export(tiny_run, tmp_path / "mine", "--push", name, "--yes") == 2
    assert message in capsys.readouterr().err
    assert hub.asked == []


def test_what_this_computer_can_tell_is_told_before_the_run_is_read_and_the_hub_is_asked(
    hub, tiny_run, tmp_path, monkeypatch, capsys
):
    """In the order of what they cost: the terminal, the name, the library, the token; the place; then the hub."""
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    out = tmp_path / "mine"
    out.mkdir()
    words = ["--push", "mine", "--weights", "ema"]

    def refused() -> str:
        assert export(tiny_run, out, *words) == 2
        assert hub.asked == []
        return capsys.readouterr().err

    assert "add --yes" in refused()
    words.append("--yes")
    assert "is not USER/REPO" in refused()
    words[1] = "me/mine"
    error = refused()
    assert "--push needs a newer huggingface_hub, or one that can be imported" in error
    assert "loading" not in error
    monkeypatch.undo()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token" in refused()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "already exists" in refused()


def test_a_refused_token_is_found_out_before_the_export(hub, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine", "--yes") == 2
    error = capsys.readouterr().err
    assert "the hub refuses the token" in error
    assert error.rstrip().endswith("nothing was exported or uploaded")
    assert "hf_wrong" not in error
    assert not (tmp_path / "mine").exists()


def test_no_token_is_said(hub, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine", "--yes") == 2
    assert "there is no token for the hub; run `hf auth login`" in capsys.readouterr().err
    assert hub.asked == []


def test_a_name_that_exists_needs_a_word(hub, tiny_run, tmp_path, capsys):
    hub.repos["me/mine"] = {"kept.txt": b"kept"}
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine", "--yes") == 2
    assert "me/mine exists already; name another, or add --push-existing" in capsys.readouterr().err
    assert hub.repos["me/mine"] == {"kept.txt": b"kept"}
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine", "--yes", "--push-existing") == 0
    assert hub.repos["me/mine"] == {"kept.txt": b"kept", **files_of(tmp_path / "mine")}


@pytest.mark.slow
def test_a_network_that_fails_in_the_upload_loses_nothing(hub, tiny_run, tmp_path, capsys):
    hub.fails_at = "/commit/"
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine", "--yes") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'mine'} is complete and stays; try the upload again with --push-existing --force" in error
    assert hub.repos["me/mine"] == {}
    before = files_of(tmp_path / "mine")
    assert "model_index.json" in before
    hub.fails_at = "nowhere"
    words = ["--push", "me/mine", "--yes", "--push-existing", "--force"]
    assert export(tiny_run, tmp_path / "mine", *words) == 0
    assert hub.repos["me/mine"] == files_of(tmp_path / "mine")


def test_a_hub_that_is_not_there_is_said(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine", "--yes") == 2
    error = capsys.readouterr().err
    assert "nothing was exported or uploaded" in error
    assert error.count("\n") == 1


def test_a_token_that_may_not_write_is_said(hub, tiny_run, tmp_path, capsys):
    hub.status = 403
    assert export(tiny_run, tmp_path / "mine", "--push", "me/mine", "--yes") == 2
    assert "the token may not do this: make one that may write" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--public", "--yes", "--push-existing"])
def test_words_about_an_upload_need_one(tiny_run, tmp_path, capsys, word):
    assert export(tiny_run, tmp_path / "mine", word) == 2
    assert f"{word} is for --push USER/REPO" in capsys.readouterr().err
