"""What a user sees of a run's progress in a terminal, narrow or dumb, in a file and in a notebook cell."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

from safelight.trainer.run_log import terminal
from safelight.trainer.run_log.terminal import Terminal, format_clock
from safelight.trainer.train import train

NOTE = "loss 0.1234  128.3 img/s  11.7 GiB"
CONTROL = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")
QUICK = {"sample": {"every_epochs": 0}, "validate": {"every_epochs": 0}, "log": {"every_steps": 1}}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Nothing of the developer's own terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES", *Terminal.NOTEBOOK_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Screen:
    """A pseudo-terminal of some columns, and all that was written to it."""

    def __init__(self, columns: int):
        self.columns, self.written = columns, b""
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(self.theirs, "w", encoding="utf-8")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Linux says EIO where the other end is closed, others an empty read
        try:
            while some := os.read(self.ours, 65536):
                self.written += some
        except OSError:
            pass

    def close(self) -> str:
        """Return all that was written, once nobody has the terminal open."""
        if not self.stream.closed:
            self.stream.close()
            self._reader.join()
            os.close(self.ours)
        return self.written.decode()

    def frames(self) -> list[str]:
        """Return every line as it was drawn, redrawn ones again; none may have been wrapped or moved upwards from."""
        text = self.written.decode()
        assert set(CONTROL.findall(text)) <= {"\x1b[2K", "\x1b[?25l", "\x1b[?25h"} | set(
            re.findall(r"\x1b\[[\d;]*m", text)
        )
        lines = [line for line in re.split(r"[\r\n]+", CONTROL.sub("", text)) if line]
        assert max(map(len, lines)) < self.columns
        return lines


@pytest.fixture
def screen(monkeypatch, request) -> Iterator[Screen]:
    """A terminal of 80 columns, or as many as the test asks for."""
    screen = Screen(getattr(request, "param", 80))
    # rich asks the process's own streams for their size
    monkeypatch.setenv("COLUMNS", str(screen.columns))
    yield screen
    screen.close()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, turned by hand."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def drive(stream: TextIO, clock: list[float], steps: range, total: int, seconds: float) -> None:
    """Train, as far as a terminal can tell, with this stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        terminal = Terminal()
        for step in steps:
            clock[0] += seconds
            terminal.update("training", step, total, NOTE)
        terminal.pause()


@pytest.mark.long
def test_train_into_a_file_and_resumed_in_a_terminal(small_config, capsys):
    """The command itself in 80 columns, stdout in a pipe: one line that starts where the run had stopped."""
    config = small_config(train={"max_steps": 4, "batch_size": 1}, data={"variants": 1}, **QUICK)
    train(config)
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert "\r" not in printed
    # four steps take no ten seconds: the line that says it began, and the last
    lines = re.findall(
        r"^training (\d)/4  (first step|loss \d\.\d{4}  [\d.]+ img/s  \d+\.\d GiB)$", printed, re.MULTILINE
    )
    assert [step for step, _ in lines] == ["0", "4"], printed
    assert lines[0][1] == "first step"

    screen = Screen(80)
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "safelight",
            "train",
            f"{config.run.dir}/config.toml",
            "--resume",
            "--train.max-steps",
            "9",
        ],
        stdin=screen.stream,
        stderr=screen.stream,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    text = screen.close()
    assert process.returncode == 0, text
    assert process.stdout.splitlines()[0].startswith("trained 9 steps; report: ")
    assert "\x1b[1A" not in text
    bars = [line for line in re.split(r"[\r\n]+", CONTROL.sub("", text)) if line.startswith("training ")]
    form = r"training [━╸╺]{6,20} (\d)/9  (first step|(\d+:\d\d left  )?loss \d\.\d{4}  [\d.]+ img/s  \d+\.\d GiB)"
    assert [bar for bar in bars if not re.fullmatch(form, bar)] == []
    assert max(map(len, bars)) < 80
    # drawn four times a second: not every step is seen, the last always
    steps = [int(re.fullmatch(form, bar)[1]) for bar in bars]
    assert steps == sorted(steps)
    assert steps[0] == 4
    assert steps[-1] == 9
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize("screen", [80, 60, 40, 20, 9, 2], indirect=True)
def test_the_bar_is_one_line_of_whatever_width(screen, clock):
    drive(screen.stream, clock, range(5010, 6001, 10), 120_000, 30)
    screen.close()
    last = screen.frames()[-1]
    # 11 400 groups of ten steps, half a minute each
    assert (
        last
        == {
            80: "training ━━━━━━━ 6000/120000  3 d 23 h left  loss 0.1234  128.3 img/s  11.7 GiB",
            60: "training ╸━━━━━━━━━ 6000/120000  3 d 23 h left  loss 0.1234",
            40: "training 6000/120000  3 d 23 h left",
            20: "training 6000/12000",
            9: "training",
            2: "t",
        }[screen.columns]
    )


def test_the_time_left_of_a_resumed_run(clock):
    terminal = Terminal()
    terminal.update("training", 5010, 6000, NOTE)
    assert terminal._phase.parts()[1] == "loss 0.1234"
    clock[0] += 20
    terminal.update("training", 5020, 6000, NOTE)
    # 98 times ten steps in 20 s: the 5,000 before it began are not its speed
    assert terminal._phase.parts() == ["training 5020/6000", "32:40 left", *NOTE.split("  ")]
    # between two reports it goes down by itself, and never below nothing
    clock[0] += 60
    assert terminal._phase.parts()[1] == "31:40 left"
    clock[0] += 10_000
    assert terminal._phase.parts()[1] == "0:00 left"
    terminal.update("training", 6000, 6000, NOTE)
    assert terminal._phase.parts() == ["training 6000/6000", *NOTE.split("  ")]
    terminal.pause()


def test_no_color_is_no_colour(screen, clock, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    drive(screen.stream, clock, range(1, 40), 40, 1)
    text = screen.close()
    assert not re.search(r"\x1b\[[\d;]*m", text)
    assert screen.frames()[-1].startswith("training ━━━━━━━━━")


def test_a_terminal_with_colour_has_some(screen, clock):
    drive(screen.stream, clock, range(1, 40), 40, 1)
    assert re.search(r"\x1b\[[\d;]*m", screen.close())


@pytest.mark.parametrize(
    "variable", [("TERM", "dumb"), ("COLAB_RELEASE_TAG", "release-colab"), ("JPY_PARENT_PID", "12")]
)
def test_where_lines_stay_there_is_one_in_ten_seconds(screen, clock, monkeypatch, variable):
    """A dumb terminal; and a notebook's `!safelight train`, whose stderr says that it is a terminal."""
    monkeypatch.setenv(*variable)
    drive(screen.stream, clock, range(1, 1001), 1000, 0.25)
    text = screen.close()
    assert CONTROL.findall(text) == []
    lines = text.splitlines()
    # 250 s, the first at once and the last however soon
    assert len(lines) == 26
    assert lines[0] == f"training 1/1000  {NOTE}"
    assert lines[1] == "training 41/1000  4:00 left  loss 0.1234  128.3 img/s  11.7 GiB"
    assert lines[-1] == f"training 1000/1000  {NOTE}"


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_file_stays_a_file_whatever_rich_believes(clock, monkeypatch, variable):
    import rich.console

    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    stream = io.StringIO()
    drive(stream, clock, range(1, 101), 100, 0.25)
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 4


def test_phases_follow_each_other_and_words_go_above(screen, clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen.stream)
    terminal = Terminal()
    terminal.update("captions", 3, 3)
    terminal.update("latents [bold]", 1, 2)
    terminal.say("a line of ours [bold]")
    terminal.update("latents [bold]", 2, 2)
    terminal.pause()
    screen.close()
    lines = screen.frames()
    kept = [line for line, after in zip(lines, [*lines[1:], ""], strict=True) if line[:8] != after[:8]]
    assert [re.sub(" ━+", "", line) for line in kept] == [
        "captions 3/3",
        "latents [bold]╺ 1/2".replace("╺", "╺━━━━━━━━━"),
        "a line of ours [bold]",
        "latents [bold] 2/2",
    ]


def test_a_failure_gives_the_cursor_back(screen, monkeypatch):
    registered = []
    monkeypatch.setattr(sys, "stderr", screen.stream)
    monkeypatch.setattr(terminal.atexit, "register", registered.append)
    Terminal().update("photos", 1, 2)
    (at_the_end,) = registered
    at_the_end()
    text = screen.close()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0:00"), (7.4, "0:07"), (724, "12:04"), (3723, "1:02:03"), (172_799, "47:59:59"), (180_000, "2 d 2 h")],
)
def test_clocks(seconds, text):
    assert format_clock(seconds) == text


@pytest.mark.parametrize("make", [pty.openpty, os.pipe])
def test_a_closed_terminal_ends_nothing(monkeypatch, make):
    """As after a lost ssh connection, or when the reader of a pipe has ended."""
    reader, writer = make()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with pytest.raises(OSError, match=r"Broken pipe|Input/output error"):
        print("unguarded", file=stream, flush=True)
    monkeypatch.setattr(sys, "stderr", stream)
    shown = Terminal()
    shown.say("a line")
    shown.is_live = True
    shown.update("training", 1, 9, NOTE)
    shown.update("training", 9, 9, NOTE)
    shown.pause()
    shown.say("saved")
    with contextlib.suppress(OSError):
        stream.close()
