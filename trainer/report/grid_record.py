"""RUN/grids/NAME/index.json: pictures over every combination of two or three settings, from the same noise.

`safelight grid` writes it with its pictures and sheet.png beside it; the report reads it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from safelight.trainer.report.comparison import FileName, Record, Text

MAX_AXIS_VALUES = 200
MAX_CELLS = 5000
MAX_FIXED = 40

Label = Annotated[str, Field(max_length=400)]
Place = Annotated[int, Field(ge=0, lt=MAX_AXIS_VALUES)]


class GridAxis(Record):
    """What changes along x, y or z. name: of the setting, as on the command line. labels: of its values, in order."""

    name: Annotated[str, Field(max_length=60)]
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=MAX_AXIS_VALUES)]


class GridCell(Record):
    """A picture. x, y, z: places of its values on the axes, 0 on an axis that the grid lacks."""

    x: Place
    y: Place = 0
    z: Place = 0
    file: FileName


class Grid(Record):
    """A grid. z: one table of x and y for each of its values.

    prompt: of every picture, '' if it is an axis. fixed: the other settings (name, value), of every picture.
    sheet: the labelled contact sheet of all pictures.
    """

    x: GridAxis
    y: GridAxis | None = None
    z: GridAxis | None = None
    prompt: Text = ""
    fixed: Annotated[tuple[tuple[Annotated[str, Field(max_length=60)], Label], ...], Field(max_length=MAX_FIXED)] = ()
    cells: Annotated[tuple[GridCell, ...], Field(max_length=MAX_CELLS)]
    sheet: FileName = ""
