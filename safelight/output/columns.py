"""Text in lines that fit the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping

MOST_COLUMNS = 100


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, MOST_COLUMNS)


def fill(text: str) -> str:
    """Return a text in lines that fit the terminal."""
    return textwrap.fill(text, _columns(), break_on_hyphens=False)


def wrap_help(text: str) -> str:
    """Return a help text with its usage and description in lines that fit the terminal, as its boxes do already."""
    columns, lines = shutil.get_terminal_size().columns, []
    for line in text.splitlines():
        if len(line) > columns and line[0].isalpha():
            line = fill(line)
        # an option without a default may end in a line that holds nothing
        if line.strip("│ ") or not line:
            lines.append(line)
    return "\n".join(lines)


def listed(texts: Mapping[str, str]) -> str:
    """Return names and what they mean in two columns that fit the terminal."""
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
