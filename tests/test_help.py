"""--help of every command fits the terminal and gives an explanation and a default for every option."""

import contextlib
import io
import re

import pytest

from safelight.__main__ import COMMANDS, main
from safelight.bench.command_line import COMMANDS as BENCHMARKS

WORDS = ([], ["bench"], *([name] for name in COMMANDS if name != "bench"), *(["bench", name] for name in BENCHMARKS))
BOX = "│"


class Terminal(io.StringIO):
    encoding = "utf-8"


def output_of(*argv: str) -> tuple[int, str]:
    out = Terminal()
    with contextlib.redirect_stdout(out):
        try:
            status = main(list(argv))
        except SystemExit as end:
            status = end.code
    return status, out.getvalue()


def options(text: str) -> dict[str, str]:
    """Return the explanation of each option and argument in a help text."""
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
        status, text = output_of(*words, "--help")
        assert status == 0
        assert [line for line in text.splitlines() if len(line) > columns] == []
        assert [line for line in text.splitlines() if line and not line.strip(f"{BOX} ")] == []
    assert "(default: )" not in text
    assert "''" not in text
    found = options(text)
    assert found or words in ([], ["bench"])
    for name, text in found.items():
        meaning = re.sub(r"\((default|required).*", "", text).strip()
        assert len(meaning) > 4, f"{name} is not explained: {text!r}"
        assert not re.search(r"default: (True|False)\)", text) or "." in name, f"{name} is a flag: {text!r}"


@pytest.mark.parametrize("words", ["train", "bench", "bench step", "init"])
def test_help_of_a_command_is_its_help(words):
    assert output_of("help", *words.split()) == output_of(*words.split(), "--help")
    assert output_of("help") == output_of("--help")


def test_help_of_an_unknown_command_is_an_error(capsys):
    assert main(["help", "trian"]) == 2
    assert capsys.readouterr().err == "safelight: 'trian' is not a command; did you mean train?\n"
