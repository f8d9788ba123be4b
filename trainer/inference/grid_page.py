"""RUN/grids/NAME/index.html: a grid's pictures as large as a page can hold them, and links to their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safelight
from safelight.data.atomic import atomic_write_text
from safelight.text import counted
from safelight.trainer.inference.gallery import MAX_PROMPT_CHARS, PAGE_NAME, relative_url
from safelight.trainer.report import grids
from safelight.trainer.report.grid_record import Grid
from safelight.trainer.report.markup import Markup, join, prompt_markup, shorten, tag
from safelight.trainer.report.pictures import Work, embed_all
from safelight.trainer.report.theme import THEME, page

EDGES_PX = (1024, 768, 512, 384, 256, 192, 128, 96, 64)
BUDGET_BYTES = 24_000_000


def write_grid_page(folder: Path, run_name: str, grid: Grid, sheets: Sequence[str]) -> None:
    """Write the page: a table for each value of z. It can be sent alone. sheets: the contact sheets, to be linked."""
    pictures = embed_all([folder / cell.file for cell in grid.cells], EDGES_PX, BUDGET_BYTES, Work())
    places = [(cell.x, cell.y, cell.z) for cell in grid.cells]
    found = {place: picture for place, picture in zip(places, pictures, strict=True) if picture is not None}
    links = {place: relative_url(cell.file) for place, cell in zip(places, grid.cells, strict=True)}
    axes = [axis.name for axis in (grid.x, grid.y, grid.z) if axis]
    title = f"{run_name}: {' × '.join(axes)}"
    html = page(
        title,
        tag(
            "header",
            tag("h1", title),
            tag("p", prompt_markup(grid.prompt, "", MAX_PROMPT_CHARS), class_="sub") if grid.prompt else None,
            tag("p", _note(grid, axes, len(grid.cells) - len(found), sheets), class_="note"),
        ),
        tag(
            "main", tag("p", said) if (said := grids.what_to_see(grid)) else None, grids.grid_tables(grid, found, links)
        ),
        tag("footer", f"Written by Safelight {safelight.__version__}."),
        parts=(THEME, grids.PART),
    )
    atomic_write_text(folder / PAGE_NAME, html)


def _note(grid: Grid, axes: Sequence[str], num_left_out: int, sheets: Sequence[str]) -> Markup:
    noise = "Pictures with the same seed" if "seed" in axes else "All pictures"
    fixed = ", ".join(f"{name} {shorten(value, 120)}" for name, value in grid.fixed)
    note = f"{fixed}. {noise} start from the same noise."
    if num_left_out:
        note += f" {counted(num_left_out, 'picture')} are left out here, for there are too many for a page."
    first, *others = (tag("a", sheet, href=relative_url(sheet)) for sheet in sheets)
    each = [join(", " if number else "; one each: ", link) for number, link in enumerate(others)]
    return join(note, " All tables in one picture: ", first, each, ".")
