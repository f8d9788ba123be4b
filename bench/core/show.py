"""Print benchmark results as a plain table or as JSON."""

from __future__ import annotations

import json
import sys

# width of a table printed to a file or a pipe
PIPED_WIDTH = 160


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple]) -> None:
    """Print a title and rows: the first column left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(table)
