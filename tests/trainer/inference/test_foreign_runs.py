"""A run folder with links that lead out: sample, compare and export refuse it, a log is not written through one."""

import json
import os
import shutil
from pathlib import Path

import pytest

from safelight import library_log
from safelight.errors import UserError
from safelight.trainer.checkpoint import files
from safelight.trainer.checkpoint.files import folder_of
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import load_config, to_toml
from safelight.trainer.inference.compare import compare
from safelight.trainer.inference.compared_prompts import Prompt, held_out_prompts
from safelight.trainer.inference.draw import OpenRun, next_number, open_run
from safelight.trainer.inference.export import export
from safelight.trainer.inference.gallery import file_name
from safelight.trainer.inference.which_checkpoint import pick_step
from safelight.trainer.loading.resolve import check_early, resolve_run
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
        held_out_prompts(open_run(run))


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"memory_plan": [1]}', "\xff", '{"a": 1e999}'])
def test_a_damaged_environment_is_said_to_be_unreadable(run, text):
    (run / "environment.json").write_text(text, encoding="latin-1")
    assert recorded(run, MEMORY_PLAN) == {"unreadable": str(run / "environment.json")}


@pytest.mark.parametrize("planted", ["999999999", "1000000000", "999999999999", "9" * 200, "002"])
def test_a_planted_number_makes_no_image_overwrite_another(tmp_path, planted):
    stem, drawn = "step8-seed1", []
    (tmp_path / f"{stem}-{planted}.png").touch()
    for _ in range(4):
        first = next_number(tmp_path, stem, 2)
        drawn += [file_name(stem, number, "a barn") for number in (first, first + 1)]
        for name in drawn[-2:]:
            (tmp_path / name).touch(exist_ok=False)
    assert len(set(drawn)) == 8
    assert max(map(len, drawn)) < 40


@pytest.mark.parametrize("name", ["²", "٣", "9" * 5000, "7.0", "-7", "", "00000000000000000007"])
def test_a_checkpoint_is_named_by_digits_that_int_takes(tiny_run, name):
    if name.endswith("7") and name.startswith("0"):
        assert pick_step(tiny_run, name) == 7
        return
    with pytest.raises(UserError, match=r"is not in .*; use last, best, base or one of 7"):
        pick_step(tiny_run, name)


def test_a_checkpoint_far_larger_than_its_model_is_refused_before_it_is_hashed(tiny_run, tmp_path, monkeypatch):
    run = Path(shutil.copytree(tiny_run, tmp_path / "copy"))
    header = json.dumps({"a": {"dtype": "U8", "shape": [2**30], "data_offsets": [0, 2**30]}}).encode()
    path = folder_of(run, 7) / "state.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2**30)
    monkeypatch.setattr(files, "_digest", lambda path: pytest.fail("hashed"))
    monkeypatch.setattr(Identity, "difference", lambda *_, **__: None)
    for act in (
        lambda: open_run(run).unet(7),
        lambda: export(run, tmp_path / "out"),
        lambda: check_early(resolve_run(load_config(run / "config.toml"), run, 7)),
    ):
        with pytest.raises(UserError, match="for this model; start again from step 0"):
            act()


@pytest.mark.parametrize("name", ["report.html", "compare/index.html", "compare/index.json", "compare/base-000-x.png"])
def test_a_folder_in_the_place_of_a_comparisons_file_is_refused_before_anything_is_drawn(
    tiny_run, tmp_path, name, monkeypatch
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "copy"))
    (run / name).mkdir(parents=True)
    monkeypatch.setattr(OpenRun, "unet", lambda *_: pytest.fail("drawn"))
    opened = open_run(run)
    with pytest.raises(UserError, match=f"{name} is a folder where the run keeps a file; move it away"):
        compare(opened, [7], [Prompt("a barn")])


def test_the_terminal_gets_no_escape_sequences(capsys):
    terminal = Terminal()
    terminal.say("a name \x1b]0;title\x07 and a line\n")
    terminal.update("training", 1, 2, "loss \x1b[31m")
    terminal.pause()
    assert "\x1b" not in capsys.readouterr().err
