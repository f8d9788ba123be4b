"""A run folder with links that lead out: sample, compare and export refuse it, a log is not written through one."""

import os
from pathlib import Path

import pytest

from safelight import library_log
from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import to_toml
from safelight.trainer.inference.draw import open_run, validation_captions
from safelight.trainer.inference.export import export
from safelight.trainer.run_log.environment import MEMORY_PLAN, recorded
from safelight.trainer.run_log.terminal import Terminal


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(Config()))
    return folder


@pytest.mark.parametrize("name", ["checkpoints", "compare", "images", "compare/base-000.png"])
def test_links_that_lead_out_are_refused_before_anything_is_drawn_or_exported(run, tmp_path, name):
    (tmp_path / "thesis").mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(tmp_path / "thesis")
    for act in (lambda: open_run(run), lambda: export(run, tmp_path / "out.safetensors")):
        with pytest.raises(UserError, match=rf"{name} is a link to .*thesis, outside"):
            act()
    assert list((tmp_path / "thesis").iterdir()) == []
    assert not (tmp_path / "out.safetensors").exists()


def test_links_inside_a_run_folder_are_fine(run):
    (run / "more").mkdir()
    (run / "images").symlink_to("more")
    open_run(run)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_messages_of_libraries_are_appended_to_a_regular_file_only(run, tmp_path, kind):
    outside = tmp_path / "outside"
    if kind == "pipe":
        os.mkfifo(run / library_log.FILE_NAME)
    else:
        (run / library_log.FILE_NAME).symlink_to(outside)
    if kind == "link":
        outside.write_text("precious")
    library_log.capture()
    try:
        with library_log.written_to(run):
            library_log._keep("a warning")
        # an earlier test's libraries may warn here too
        assert "a warning" in library_log.lines()
    finally:
        library_log.release()
    assert outside.exists() == (kind == "link")
    assert kind != "link" or outside.read_text() == "precious"


@pytest.mark.parametrize("text", ["[]", '{"validation": {}, "train": 3}', '{"validation": [1]}', "[" * 100_000, "{}"])
def test_a_damaged_split_is_named(run, text):
    (run / "split.json").write_text(text)
    with pytest.raises(UserError, match=r"split\.json is damaged .*; set sample\.prompts in"):
        validation_captions(open_run(run))


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"memory_plan": [1]}', "\xff", '{"a": 1e999}'])
def test_a_damaged_environment_is_said_to_be_unreadable(run, text):
    (run / "environment.json").write_text(text, encoding="latin-1")
    assert recorded(run, MEMORY_PLAN) == {"unreadable": str(run / "environment.json")}


def test_the_terminal_gets_no_escape_sequences(capsys):
    terminal = Terminal()
    terminal.say("a name \x1b]0;title\x07 and a line\n")
    terminal.update("training", 1, 2, "loss \x1b[31m")
    terminal.pause()
    assert "\x1b" not in capsys.readouterr().err
