"""Contact sheets: all pictures of a comparison in one PNG, under labels."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from safelight.data.atomic import atomic_write_bytes
from safelight.data.images import RejectedImage, decode
from safelight.text import printable
from safelight.untrusted import UnsafeFile, read_bytes

# the longest side of a picture on the sheet; the largest at which everything fits one sheet
EDGES_PX = (512, 384, 256, 192, 160)
MAX_SHEET_PIXELS = 16_000_000
MAX_SHEET_SIDE_PX = 16_000
MAX_FILE_BYTES = 2**26
GAP_PX, MARGIN_PX = 8, 24
FONT_PX = 15
MAX_LABEL_LINES = 2
# fonts of Linux, macOS and Windows
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
# as in the report
PAPER, INK, FADED = "#fbfaf8", "#1c1a19", "#6b645f"


@dataclass(frozen=True)
class SheetRow:
    """A row of pictures. label: the text above it. pictures: their files, None for a place left empty."""

    label: str
    pictures: tuple[Path | None, ...]


@dataclass(frozen=True)
class _Layout:
    """Sizes in px. strips: blocks of rows beside each other, each with all columns; per_strip: rows in each."""

    cell: tuple[int, int]
    head: int
    label: int
    num_columns: int
    strips: int
    per_strip: int

    @property
    def row(self) -> int:
        return self.label + self.cell[1] + 2 * GAP_PX

    @property
    def strip(self) -> int:
        return self.num_columns * (self.cell[0] + GAP_PX) + MARGIN_PX

    @property
    def size(self) -> tuple[int, int]:
        return MARGIN_PX + self.strips * self.strip, 2 * MARGIN_PX + self.head + self.per_strip * self.row

    @property
    def fits(self) -> bool:
        width, height = self.size
        return max(width, height) <= MAX_SHEET_SIDE_PX and width * height <= MAX_SHEET_PIXELS


def write_sheets(
    folder: Path, stem: str, columns: Sequence[str], rows: Sequence[SheetRow], size: tuple[int, int]
) -> list[str]:
    """Write the rows as STEM.png, or as STEM-1.png, STEM-2.png, ... if one has no room for all; return the names.

    columns: the label of each column; a line break begins its second line. size: (width, height) of the pictures, px.
    """
    num_head_lines = max(len(label.split("\n")) for label in columns)
    layouts = [_layout(size, edge, num_head_lines, len(columns), len(rows)) for edge in EDGES_PX]
    layout = next((layout for layout in layouts if layout.fits), None)
    if layout is None:
        layout, num = _largest_part(size, num_head_lines, len(columns), len(rows))
        parts = [rows[start : start + num] for start in range(0, len(rows), num)]
    else:
        parts = [rows]
    names = [f"{stem}.png"] if len(parts) == 1 else [f"{stem}-{number + 1}.png" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        buffer = io.BytesIO()
        _draw(layout, columns, part).save(buffer, "PNG")
        atomic_write_bytes(folder / name, buffer.getvalue())
    return names


def _layout(size: tuple[int, int], edge: int, num_head_lines: int, num_columns: int, num_rows: int) -> _Layout:
    """Return the layout of a sheet whose pictures have this longest side, about as wide as it is high."""
    line, longest = line_px(), max(size)
    # small pictures are enlarged by whole numbers, so that their pixels stay sharp
    scale = max(1, EDGES_PX[-1] // longest) if longest <= edge else edge / longest
    cell = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    one = _Layout(cell, num_head_lines * line + GAP_PX, MAX_LABEL_LINES * line, num_columns, 1, num_rows)
    strips = max(1, min(num_rows, round(math.sqrt(num_rows * one.row / one.strip))))
    return _Layout(cell, one.head, one.label, num_columns, strips, -(-num_rows // strips))


def _largest_part(size: tuple[int, int], num_head_lines: int, num_columns: int, num_rows: int) -> tuple[_Layout, int]:
    """Return the layout with the smallest pictures that holds the most rows, and how many; at least one."""
    low, high = 1, num_rows
    while low < high:
        middle = (low + high + 1) // 2
        fits = _layout(size, EDGES_PX[-1], num_head_lines, num_columns, middle).fits
        low, high = (middle, high) if fits else (low, middle - 1)
    return _layout(size, EDGES_PX[-1], num_head_lines, num_columns, low), low


def _draw(layout: _Layout, columns: Sequence[str], rows: Sequence[SheetRow]) -> Image.Image:
    used = -(-len(rows) // layout.per_strip)
    sheet = Image.new("RGB", (MARGIN_PX + used * layout.strip, layout.size[1]), PAPER)
    pen, font, line = ImageDraw.Draw(sheet), label_font(), line_px()
    across = layout.cell[0] + GAP_PX
    for strip in range(used):
        left, top = MARGIN_PX + strip * layout.strip, MARGIN_PX
        for number, label in enumerate(columns):
            for place, text in enumerate(label.split("\n")):
                text = cut_text(legible(text), layout.cell[0], font)
                pen.text((left + number * across, top + place * line), text, INK if place == 0 else FADED, font)
        for number, row in enumerate(rows[strip * layout.per_strip : (strip + 1) * layout.per_strip]):
            y = MARGIN_PX + layout.head + number * layout.row
            texts = wrapped(legible(row.label), layout.num_columns * across - GAP_PX, font, MAX_LABEL_LINES)
            for place, text in enumerate(texts):
                # the last line stands right above its pictures
                y_text = y + (MAX_LABEL_LINES - len(texts) + place) * line
                pen.text((left, y_text), text, INK, font)
            for column, path in enumerate(row.pictures):
                if path is None:
                    continue
                picture = read_picture(path, layout.cell)
                place = (left + column * across, y + layout.label + GAP_PX // 2)
                if picture is None:
                    corner = (place[0] + layout.cell[0] - 1, place[1] + layout.cell[1] - 1)
                    pen.rectangle((*place, *corner), outline=FADED)
                else:
                    sheet.paste(picture, place)
    return sheet


def read_picture(path: Path, cell: tuple[int, int]) -> Image.Image | None:
    """Return a picture at the size of its place, None if it cannot be read."""
    try:
        image = decode(read_bytes(path, MAX_FILE_BYTES)).image
    except (RejectedImage, UnsafeFile, OSError):
        return None
    if image.width >= cell[0]:
        return image.resize(cell, Image.Resampling.LANCZOS) if image.size != cell else image
    return image.resize(cell, Image.Resampling.NEAREST)


@functools.cache
def label_font() -> ImageFont.FreeTypeFont:
    """Return one of the system's fonts that have letters with accents, else Pillow's own, which has none."""
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, FONT_PX)
    return ImageFont.load_default(FONT_PX)


def legible(text: str) -> str:
    """Return a text as a label can show it: escaped, and without accents where the font lacks their letters."""
    return "".join(char if _has_glyph(char) else _plain(char) for char in printable(text))


@functools.cache
def _has_glyph(char: str) -> bool:
    # no font has a glyph for this one
    missing = label_font().getmask("\U0010ffff")
    mask = label_font().getmask(char)
    return char.isspace() or mask.size != missing.size or bytes(mask) != bytes(missing)


def _plain(char: str) -> str:
    """Return a letter without its accents, or the character itself."""
    base = [part for part in unicodedata.normalize("NFKD", char) if not unicodedata.combining(part)]
    return "".join(base) or char


def line_px() -> int:
    return round(FONT_PX * 1.35)


def cut_text(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Return the text, shortened by an ellipsis if it is wider than so many px."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(f"{text[:middle]}…") <= width else (low, middle - 1)
    return f"{text[:low].rstrip()}…"


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, max_lines: int) -> list[str]:
    """Return the lines of a text, at most max_lines; the last is shortened if there are more."""
    lines, words = [], text.split()
    while words and len(lines) < max_lines - 1:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        lines.append(cut_text(" ".join(words[:taken]), width, font))
        words = words[taken:]
    return [*lines, cut_text(" ".join(words), width, font)] if words else lines
