"""The contact sheets of a grid: its labelled tables of pictures, all in one PNG, and each in one."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw

from safelight.data.atomic import atomic_write_bytes
from safelight.trainer.inference.contact_sheet import (
    FADED,
    GAP_PX,
    INK,
    MARGIN_PX,
    MAX_SHEET_PIXELS,
    MAX_SHEET_SIDE_PX,
    PAPER,
    label_font,
    legible,
    line_px,
    read_picture,
    wrapped,
)
from safelight.trainer.report.grid_record import Grid, GridAxis

# the longest side of a picture: the largest at which everything fits
EDGES_PX = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16)
# smaller pictures are enlarged towards it, by whole numbers so that their pixels stay sharp
SMALL_EDGE_PX = 160
MAX_HEAD_LINES, MAX_PROMPT_LINES, MAX_SETTINGS_LINES = 3, 3, 2
MAX_SIDE_PX = 200
MIN_WIDTH_PX = 480
# of width to height, which a sheet comes near
ASPECT = 1.4
# axes whose names add nothing to their values
SELF_EXPLAINING = ("checkpoint", "sampler", "prompt", "replace")


def write_grid_sheets(folder: Path, grid: Grid, size: tuple[int, int]) -> list[str]:
    """Write sheet.png with all tables, and if there are several sheet-1.png, sheet-2.png, ... with one each.

    size: (width, height) of the pictures, px. Returns the names.
    """
    num = len(grid.z.labels) if grid.z else 1
    sheets = {"sheet.png": list(range(num))} | {f"sheet-{z + 1}.png": [z] for z in range(num) if num > 1}
    for name, tables in sheets.items():
        layouts = [_Layout(grid, tables, _cell(size, edge)) for edge in EDGES_PX]
        layout = next((layout for layout in layouts if layout.fits), layouts[-1])
        buffer = io.BytesIO()
        _draw(folder, layout).save(buffer, "PNG")
        atomic_write_bytes(folder / name, buffer.getvalue())
    return list(sheets)


def labels_of(axis: GridAxis | None) -> list[str]:
    """Return labels of an axis's values that are understood without its name; one empty label for no axis."""
    if axis is None:
        return [""]
    name = "" if axis.name in SELF_EXPLAINING else f"{axis.name} "
    return [legible(f"{name}{label}") for label in axis.labels]


def _cell(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Return the size at which pictures are shown whose longest side is at most `edge`."""
    longest = max(size)
    scale = edge / longest if longest > edge else max(1, min(edge, SMALL_EDGE_PX) // longest)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@dataclass(frozen=True)
class _Layout:
    """Where things are on a sheet, in px. tables: the values of z shown. cell: width and height of a picture."""

    grid: Grid
    tables: Sequence[int]
    cell: tuple[int, int]

    @cached_property
    def heads(self) -> list[list[str]]:
        """The lines above each column."""
        return [wrapped(label, self.cell[0], label_font(), MAX_HEAD_LINES) for label in labels_of(self.grid.x)]

    @cached_property
    def sides(self) -> list[list[str]]:
        """The lines beside each row."""
        most = max(1, self.cell[1] // line_px())
        return [wrapped(label, MAX_SIDE_PX, label_font(), most) for label in labels_of(self.grid.y)]

    @cached_property
    def side_width(self) -> int:
        widths = [label_font().getlength(line) for lines in self.sides for line in lines]
        return math.ceil(max(widths)) + GAP_PX if widths else 0

    @cached_property
    def title_height(self) -> int:
        return line_px() + GAP_PX if self.grid.z else 0

    @cached_property
    def head_height(self) -> int:
        return self.title_height + max(map(len, self.heads)) * line_px()

    @cached_property
    def table(self) -> tuple[int, int]:
        """Width and height of a table."""
        width, height = (side + GAP_PX for side in self.cell)
        return self.side_width + len(self.heads) * width, self.head_height + len(self.sides) * height

    @cached_property
    def across(self) -> int:
        """How many tables stand beside each other."""
        width, height = (side + MARGIN_PX for side in self.table)

        def distance(across: int) -> float:
            return abs(math.log(across * width / (-(-len(self.tables) // across) * height) / ASPECT))

        return min(range(1, len(self.tables) + 1), key=distance)

    @cached_property
    def width(self) -> int:
        return max(MIN_WIDTH_PX, MARGIN_PX + self.across * (self.table[0] + MARGIN_PX))

    @cached_property
    def top(self) -> list[tuple[str, str]]:
        """The lines (text, colour) that tell what all pictures share."""
        font, width = label_font(), self.width - 2 * MARGIN_PX
        settings = legible(", ".join(f"{name} {value}" for name, value in self.grid.fixed))
        lines = [(line, INK) for line in wrapped(legible(self.grid.prompt), width, font, MAX_PROMPT_LINES)]
        return lines + [(line, FADED) for line in wrapped(settings, width, font, MAX_SETTINGS_LINES)]

    @cached_property
    def top_height(self) -> int:
        return len(self.top) * line_px() + MARGIN_PX if self.top else 0

    @cached_property
    def height(self) -> int:
        down = -(-len(self.tables) // self.across)
        return MARGIN_PX + self.top_height + down * (self.table[1] + MARGIN_PX)

    @property
    def fits(self) -> bool:
        return max(self.width, self.height) <= MAX_SHEET_SIDE_PX and self.width * self.height <= MAX_SHEET_PIXELS


def _draw(folder: Path, layout: _Layout) -> Image.Image:
    sheet = Image.new("RGB", (layout.width, layout.height), PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN_PX, MARGIN_PX), layout.top)
    files = {(cell.x, cell.y, cell.z): cell.file for cell in layout.grid.cells}
    for number, z in enumerate(layout.tables):
        down, across = divmod(number, layout.across)
        left = MARGIN_PX + across * (layout.table[0] + MARGIN_PX)
        top = MARGIN_PX + layout.top_height + down * (layout.table[1] + MARGIN_PX)
        pictures = {(x, y): folder / file for (x, y, of), file in files.items() if of == z}
        _draw_table(sheet, pen, layout, z, (left, top), pictures)
    return sheet


def _draw_table(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    layout: _Layout,
    z: int,
    corner: tuple[int, int],
    pictures: Mapping[tuple[int, int], Path],
) -> None:
    left, top = corner
    font, line = label_font(), line_px()
    if layout.grid.z:
        _write(pen, corner, [(wrapped(labels_of(layout.grid.z)[z], layout.table[0], font, 1)[0], INK)])
    first = left + layout.side_width, top + layout.head_height
    for x, lines in enumerate(layout.heads):
        # the last line stands right above its pictures
        place = first[0] + x * (layout.cell[0] + GAP_PX), first[1] - len(lines) * line
        _write(pen, place, [(text, INK) for text in lines])
    for y, lines in enumerate(layout.sides):
        middle = first[1] + y * (layout.cell[1] + GAP_PX) + (layout.cell[1] - len(lines) * line) // 2
        _write(pen, (left, middle), [(text, INK) for text in lines])
    for (x, y), path in pictures.items():
        place = first[0] + x * (layout.cell[0] + GAP_PX), first[1] + y * (layout.cell[1] + GAP_PX)
        picture = read_picture(path, layout.cell)
        if picture is None:
            pen.rectangle((*place, place[0] + layout.cell[0] - 1, place[1] + layout.cell[1] - 1), outline=FADED)
        else:
            sheet.paste(picture, place)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[tuple[str, str]]) -> None:
    """Draw lines of text (text, colour) below each other."""
    for number, (text, colour) in enumerate(lines):
        pen.text((place[0], place[1] + number * line_px()), text, colour, label_font())
