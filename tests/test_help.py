"""What every command says of itself: within the terminal's width, an explanation and a default for every option."""

import contextlib
import io
import re

import pytest

from safelight.__main__ import COMMANDS, main
from safelight.bench.command_line import COMMANDS as BENCHMARKS

# those without options of their own
WORDS = ([], ["bench"], *([name] for name in COMMANDS if name != "bench"), *(["bench", name] for name in BENCHMARKS))
BOX = "│"


class Terminal(io.StringIO):
    encoding = "utf-8"


def said(*argv: str) -> tuple[int, str]:
    out = Terminal()
    with contextlib.redirect_stdout(out):
        try:
            status = main(list(argv))
        except SystemExit as end:
            status = end.code
    return status, out.getvalue()


def options(text: str) -> dict[str, str]:
    """Return what is said of each option and argument of a help text."""
    found, name = {}, ""
    for line in text.splitlines():
        if not line.startswith(BOX) or "─" in line:
            continue
        line = line.strip(f"{BOX} ")
        start = re.match(r"(-{1,2}[\w.-]+(?:,? ?[^ ]+)*?|[A-Z][A-Z.]+)(?:  +(.*)|$)", line)
        if start and not line.startswith("("):
            name = start[1]
            found[name] = start[2] or ""
        elif name:
            found[name] = f"{found[name]} {line}".strip()
    return found


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_help_fits_and_explains(words, monkeypatch):
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        status, text = said(*words, "--help")
        assert status == 0
        assert [line for line in text.splitlines() if len(line) > columns] == []
        assert [line for line in text.splitlines() if line and not line.strip(f"{BOX} ")] == []
    assert "(default: )" not in text
    assert "''" not in text
    found = options(text)
    assert found or words in ([], ["bench"])
    for name, told in found.items():
        meaning = re.sub(r"\((default|required).*", "", told).strip()
        assert len(meaning) > 4, f"{name} is not explained: {told!r}"
        assert not re.search(r"default: (True|False)\)", told) or "." in name, f"{name} is a flag: {told!r}"


@pytest.mark.parametrize("words", ["train", "bench", "bench step", "init"])
def test_help_of_a_command_is_its_help(words):
    assert said("help", *words.split()) == said(*words.split(), "--help")
    assert said("help") == said("--help")


def test_help_of_no_command_is_a_mistake(capsys):
    assert main(["help", "trian"]) == 2
    assert capsys.readouterr().err == "safelight: 'trian' is not a command; did you mean train?\n"
