"""Prints a command's results: lines, tables and JSON. Whatever comes from files is shown escaped.

Names and captions may come from somebody else's dataset or run. A control character among them could move the cursor,
retitle the window or hide text, so none reaches the terminal, and rich's markup in them is not interpreted.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

from safelight.text import printable

# width of a table printed to a file or a pipe
PIPED_WIDTH = 160


def print_line(text: object) -> None:
    """Print one line on stdout."""
    print(printable(str(text)), flush=True)


def json_text(value: object, indent: int | None = None) -> str:
    """Return a value as JSON in which every character is printable, except line breaks between its parts.

    JSON escapes only the first 32 control characters, but terminals also obey some of the others.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub(r"[^\n]", lambda match: match[0] if match[0].isprintable() else _escaped(match[0]), text)


def _escaped(char: str) -> str:
    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    print(json_text(value, indent=1))


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple]) -> None:
    """Print a title and rows: the first column left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    # not as the table's own title, which would be wrapped to the table's width
    console.print(printable(title), style="bold", markup=False, soft_wrap=True)
    console.print(table)


def say_loading(message: str = "loading libraries and model") -> None:
    """Tell someone at a terminal why nothing happens while libraries and models load."""
    if sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)


def say_next(suggestion: str) -> None:
    """Suggest the next command, on stderr: stdout holds results, which other programs may read."""
    print(printable(f"next: {suggestion}"), file=sys.stderr)


def command_to_train(file: Path) -> str:
    """Return the command that trains with a settings file, or goes on with a run folder."""
    return f"safelight train {shlex.quote(str(file))}{' --resume' if file.is_dir() else ''}"
