"""A bug of ours looks like one: two lines on the terminal, exit 1, and a file with all that is needed to find it."""

from __future__ import annotations

import errno
import logging
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import safelight.trainer.config.presets as presets
from safelight import __version__, bug_report, library_log
from safelight.errors import UserError
from tests.called import call
from tests.small_base import small_base

TWO_LINES = (
    r"safelight (?P<command>\w+): this is a bug in Safelight, not a mistake of yours: (?P<what>.+)\n"
    r"The details are in (?P<file>.+); please open an issue on the project's page and attach that file\.\n"
)


def failing(error: BaseException):
    """Return a function that fails as a bug in it would, whatever it is called with."""

    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, without the library messages that earlier tests of this process have left."""
    library_log.release()
    monkeypatch.chdir(tmp_path)


def test_a_key_error_is_two_lines_and_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(presets, "preset", failing(KeyError("no_such_key")))
    called = call("init", "tiny", "-o", "my run.toml", may_fail=True)
    assert called.status == 1
    assert called.out == ""
    shown = re.fullmatch(TWO_LINES, called.err)
    assert shown, called.err
    assert shown["command"] == "init"
    assert shown["what"] == "KeyError: 'no_such_key'"
    assert re.fullmatch(r"error-\d{8}-\d{6}\.log", shown["file"])
    assert [path.name for path in tmp_path.iterdir()] == [shown["file"]]
    head, trace, messages = (tmp_path / shown["file"]).read_text().split("\n\n")
    facts = dict(line.split(": ", 1) for line in head.splitlines())
    assert facts["command"] == "safelight init tiny -o 'my run.toml'"
    assert facts["safelight"] == __version__
    assert facts["torch"] == torch.__version__
    assert facts["python"].startswith("{}.{}.{}".format(*sys.version_info))
    assert facts["platform"]
    assert trace.startswith("Traceback (most recent call last):")
    assert "in fail\n" in trace
    assert trace.splitlines()[-1] == "KeyError: 'no_such_key'"
    assert messages == "What libraries logged and warned of:\nnone\n"


def test_a_value_error_of_python_is_no_mistake_of_the_user(monkeypatch):
    def unequal(name):
        return list(zip((1, 2), (1,), strict=True))

    monkeypatch.setattr(presets, "preset", unequal)
    called = call("init", "tiny", may_fail=True)
    assert called.status == 1
    assert re.fullmatch(TWO_LINES, called.err)["what"].startswith("ValueError: zip() argument 2 is shorter")
    assert "strict=True" in called.report()


def test_a_value_error_of_a_library_is_no_mistake_of_the_user(monkeypatch):
    monkeypatch.setattr(presets, "preset", lambda name: torch.nn.Conv2d(3, 4, 1, groups=2))
    called = call("init", "tiny", may_fail=True)
    assert called.status == 1
    assert "ValueError: in_channels must be divisible by groups" in called.report()


def test_what_a_person_sees_in_a_shell(tmp_path):
    """In a process of its own. Only the first line of a message is shown on the terminal."""
    code = (
        "import safelight.trainer.config.presets as presets, sys\n"
        "def preset(name):\n    raise RuntimeError('first\\nsecond')\n"
        "presets.preset = preset\nfrom safelight.__main__ import main\nsys.exit(main(['init', 'tiny']))"
    )
    root = Path(bug_report.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    shown = re.fullmatch(TWO_LINES, result.stderr)
    assert shown["what"] == "RuntimeError: first"
    assert "RuntimeError: first\nsecond\n" in (tmp_path / shown["file"]).read_text()


def test_two_bugs_of_one_second_leave_two_files(tmp_path):
    files = {bug_report.write(KeyError(number), ["init"]) for number in range(3)}
    assert len(files) == 3
    assert all(path.parent == tmp_path for path in files)


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    """The file goes to the temporary folder; where that is full too, the traceback goes to the terminal."""
    monkeypatch.setattr(presets, "preset", failing(KeyError("x")))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    real, refused = bug_report._write, [tmp_path]

    def write(folder, text):
        if folder in refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return real(folder, text)

    monkeypatch.setattr(bug_report, "_write", write)
    called = call("init", "tiny", may_fail=True)
    assert called.status == 1
    (file,) = temporary.iterdir()
    assert f"The details are in temporary/{file.name};" in called.err
    refused.append(temporary)
    called = call("init", "tiny", may_fail=True)
    assert called.status == 1
    assert called.err.startswith("Traceback (most recent call last):")
    assert "KeyError: 'x'\nsafelight init: this is a bug, and its report cannot be written: " in called.err


def test_the_developer_can_have_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("SAFELIGHT_TRACEBACK", "1")
    for error in (KeyError("a bug"), UserError("a mistake")):
        monkeypatch.setattr(presets, "preset", failing(error))
        with pytest.raises(type(error)):
            call("init", "tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("name another folder"), "name another folder"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device; free some disk space"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
        (SafetensorError("header too large"), "header too large"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "the GPU's memory is full; lower train.batch_size"),
        (MemoryError(), "the computer's memory is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "the computer's memory is full"),
        (RuntimeError("can't start new thread"), "the computer's memory is full"),
        (RuntimeError("could not create a primitive"), "the computer's memory is full"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA has no memory left, on the GPU or in"),
        (sqlite3.OperationalError("database or disk is full"), "the cache's index: database or disk is full"),
        (sqlite3.DatabaseError("malformed"), "the cache's index: malformed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_user_or_the_machine_can_mend_is_one_line(error, line, monkeypatch, tmp_path):
    monkeypatch.setattr(presets, "preset", failing(error))
    called = call("init", "tiny")
    assert called.status == 2
    assert called.err.startswith(f"safelight init: {line}")
    assert called.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [sqlite3.ProgrammingError("closed"), sqlite3.IntegrityError("twice"), OSError("no number")]
)
def test_what_nobody_but_us_can_mend_is_a_bug(error, monkeypatch):
    monkeypatch.setattr(presets, "preset", failing(error))
    called = call("init", "tiny", may_fail=True)
    assert called.status == 1
    assert type(error).__name__ in called.report()


def test_what_libraries_say_is_in_the_report_and_not_on_the_terminal(monkeypatch):
    logger = logging.getLogger("some.library")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.propagate = False

    def preset(name):
        for _ in range(3):
            logger.warning("weights of %s are missing", "unet")
        logger.info("not worth keeping")
        logger.warning("%d arguments", "wrong")
        warnings.warn("this is slow", UserWarning, stacklevel=1)
        warnings.warn("renamed in version 9", DeprecationWarning, stacklevel=1)
        raise KeyError("x")

    monkeypatch.setattr(presets, "preset", preset)
    try:
        called = call("init", "tiny", may_fail=True)
    finally:
        logger.handlers.clear()
        logger.propagate = True
    assert re.fullmatch(TWO_LINES, called.err)
    kept = called.report().split("What libraries logged and warned of:\n")[1].splitlines()
    assert kept[0] == "WARNING some.library: weights of unet are missing (x3)"
    assert kept[1].startswith("WARNING some.library: %d arguments (")
    assert re.fullmatch(r"UserWarning .*test_bug_report\.py:\d+: this is slow", kept[2])
    assert len(kept) == 3


def test_the_last_messages_are_kept_each_once():
    library_log.capture()
    try:
        for number in range(library_log.MAX_MESSAGES + 5):
            logging.getLogger("noisy").error("message %d", number)
        assert len(library_log.lines()) == library_log.MAX_MESSAGES
        assert library_log.lines()[0] == "ERROR noisy: message 5"
        logging.getLogger("noisy").error("x" * 100_000)
        assert len(library_log.lines()[-1]) < 5_000
    finally:
        library_log.release()
    assert library_log.lines() == []


def test_release_puts_everything_back(caplog):
    before = (logging.Logger.callHandlers, threading.excepthook, warnings.showwarning, list(warnings.filters))
    library_log.capture()
    assert logging.Logger.callHandlers is not before[0]
    library_log.release()
    assert (logging.Logger.callHandlers, threading.excepthook, warnings.showwarning, list(warnings.filters)) == before
    logging.getLogger("heard").warning("again")
    assert "again" in caplog.text


TOML = """
[run]
dir = "{place}/run"
device = "cpu"
[model]
base = "{base}"
[data]
path = "{dataset}"
resolution = 64
[train]
batch_size = 4
max_steps = 2
[validate]
every_epochs = 0
[sample]
every_epochs = 0
[save]
every_steps = 1
[log]
tensorboard = false
every_steps = 1
"""


@pytest.fixture
def train(tmp_path, tiny_dataset):
    """A function that trains a small run and returns what a person sees."""
    (tmp_path / "run.toml").write_text(TOML.format(place=tmp_path, dataset=tiny_dataset, base=small_base()))
    return lambda **options: call("train", tmp_path / "run.toml", "--resume", **options)


def test_a_run_keeps_what_libraries_say_and_its_bugs(train, tmp_path, monkeypatch):
    import safelight.trainer.train as training

    run, real = tmp_path / "run", training.train_step

    def bug(*args, **kwargs):
        logging.getLogger("some.library").warning("in a step")
        raise KeyError("a bug in a step")

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", bug)
        called = train(may_fail=True)
    assert called.status == 1
    last = re.search(TWO_LINES, called.err)
    assert last["what"] == "KeyError: 'a bug in a step'"
    assert Path(last["file"]).parent == Path("run")
    assert "WARNING some.library: in a step" in called.report()
    log = (run / "libraries.log").read_text().splitlines()
    assert re.fullmatch(rf"# [\d-]+ [\d:]+, process {os.getpid()}", log[0])
    assert log[-1] == "WARNING some.library: in a step"

    def step(*args, **kwargs):
        warnings.warn("for every step the same", stacklevel=1)
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", step)
    assert train().status == 0
    more = (run / "libraries.log").read_text().splitlines()
    assert more[: len(log)] == log
    assert sum(line.endswith("for every step the same") for line in more) == 1


@pytest.mark.parametrize("thread", ["save-checkpoint", "load-batch"])
def test_a_bug_in_a_thread_arrives_too(thread, train, monkeypatch):
    """Both threads hand what they met to the one that trains."""
    import safelight.data.batches as batches
    import safelight.trainer.checkpoint.saver as saver

    def bug(*args, **kwargs):
        raise IndexError(f"a bug in {threading.current_thread().name}")

    if thread == "load-batch":
        monkeypatch.setattr(batches, "load_batch", bug)
    else:
        monkeypatch.setattr(saver, "save_checkpoint", bug)
    called = train(may_fail=True)
    assert called.status == 1
    assert re.search(TWO_LINES, called.err)["what"].startswith(f"IndexError: a bug in {thread}")
    assert "in bug\n" in called.report()


def test_a_run_that_is_refused_is_left_as_it_was(train, tmp_path):
    assert train().status == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert call("train", tmp_path / "run.toml").status == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_failed_save_is_not_lost_behind_another_error(train, tmp_path, monkeypatch):
    """The terminal has a line about it, libraries.log the traceback."""
    import safelight.trainer.checkpoint.saver as saver
    import safelight.trainer.train as training

    real, steps = training.train_step, []

    def step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(saver, "save_checkpoint", failing(IndexError("a bug")))
    monkeypatch.setattr(saver.Saver, "check", lambda self: None)
    called = train()
    assert called.status == 2
    called.line("the checkpoint of step 1 could not be saved: a bug")
    log = (tmp_path / "run" / "libraries.log").read_text()
    assert "WARNING safelight.trainer.checkpoint.saver: the checkpoint of step 1 could not be saved\nTraceback" in log
    assert log.rstrip().endswith("IndexError: a bug")
