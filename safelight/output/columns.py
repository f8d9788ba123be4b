"""Wraps text to the width of the terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping

from safelight.text import printable

MAX_COLUMNS = 100


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, MAX_COLUMNS)


def fill(text: str) -> str:
    """Return a text wrapped to the terminal's width, at most MAX_COLUMNS. Non-printable characters are escaped."""
    return textwrap.fill(printable(text), _columns(), break_on_hyphens=False)


def hanging(text: str) -> list[str]:
    """Return a text as lines of the terminal's width, all but the first indented; long words (paths) stay whole."""
    # the last column stays empty, because some terminals wrap as soon as it is written
    width = shutil.get_terminal_size().columns - 1
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def wrap_help(text: str) -> str:
    """Return a help text with its usage and description wrapped; its boxes fit already."""
    columns, lines = shutil.get_terminal_size().columns, []
    for line in text.splitlines():
        if len(line) > columns and line.startswith("usage: "):
            line = _fill_usage(line)
        elif len(line) > columns and line[0].isalpha():
            line = fill(line)
        # drop the blank line that may follow an option without a default
        if line.strip("│ ") or not line:
            lines.append(line)
    return "\n".join(lines)


def _fill_usage(line: str) -> str:
    """Return a usage line wrapped and indented; what is in brackets stays together."""
    kept = re.sub(r"\[[^]]*\]", lambda match: match[0].replace(" ", "\xa0"), line)
    lines = textwrap.wrap(kept, _columns(), subsequent_indent=" " * 7, break_on_hyphens=False, break_long_words=False)
    return "\n".join(lines).replace("\xa0", " ")


def listed(texts: Mapping[str, str]) -> str:
    """Return names and their descriptions in two columns, wrapped to the terminal's width."""
    width = max(map(len, texts)) + 4
    return "\n".join(
        textwrap.fill(
            text,
            _columns(),
            initial_indent=f"  {name}".ljust(width),
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
        for name, text in texts.items()
    )
