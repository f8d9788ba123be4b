"""The x/y/z grids that `safelight grid` drew: a table of pictures for each value of z, to be enlarged."""

from __future__ import annotations

from collections.abc import Mapping

from safelight.text import counted
from safelight.trainer.report.grid_record import Grid, GridAxis, GridCell
from safelight.trainer.report.markup import Markup, details, join, prompt_markup, shorten, tag
from safelight.trainer.report.pictures import Picture, embed_all
from safelight.trainer.report.records import SavedGrid
from safelight.trainer.report.run_reader import RunFolder, inside
from safelight.trainer.report.theme import Part, asset

PART = Part(asset("grids.css"))
TITLE = "Grids over settings"
MAX_GRIDS = 6
MAX_CELLS = 240
EDGES_PX = (768, 512, 384, 256, 192, 128)
BUDGET_BYTES = 6_000_000
# axis -> what to look for along it
LOOK_FOR = {
    "cfg": "more cfg gives the prompt more weight; look for where colours turn hard and contours glow",
    "steps": "look for the fewest steps after which pictures hardly change",
    "checkpoint": "look for when the subject appears, and for what later checkpoints spoil",
    "sampler": "samplers that agree have converged; look for one that stays rough",
    "seed": "look for what stays alike: a model that draws every seed alike has learnt single pictures",
}
# of a cell on x, y and z
Place = tuple[int, int, int]


def grids_section(run: RunFolder) -> Markup | None:
    """Return the grids of a run, the first open; None if it has none."""
    heading = tag("h2", TITLE)
    shown = [saved for saved in run.grids if saved.grid.cells][:MAX_GRIDS]
    if not shown:
        return None
    tables = [_one(run, saved, BUDGET_BYTES // len(shown), MAX_CELLS // len(shown)) for saved in shown]
    bodies = [
        join(tag("h3", _title(saved)), body) if index == 0 else details(_title(saved), body)
        for index, (saved, body) in enumerate(zip(shown, tables, strict=True))
    ]
    more = len(run.grids) - len(shown)
    note = tag("p", f"{counted(more, 'more grid')} in the run's grids folder.", class_="note") if more > 0 else None
    return tag("section", heading, bodies, note, id="grids")


def _title(saved: SavedGrid) -> str:
    axes = " × ".join(shorten(axis.name, 60) for axis in _axes(saved.grid))
    return f"{shorten(saved.name, 80)}: {axes}"


def _axes(grid: Grid) -> list[GridAxis]:
    return [axis for axis in (grid.x, grid.y, grid.z) if axis]


def _one(run: RunFolder, saved: SavedGrid, budget_bytes: int, max_cells: int) -> Markup:
    grid = saved.grid
    cells = sorted({(c.z, c.y, c.x): c for c in grid.cells if _is_on(grid, c)}.values(), key=lambda c: (c.z, c.y, c.x))
    shown = cells[:max_cells]
    files = [inside(run.path, saved.folder, cell.file) for cell in shown]
    pictures = embed_all(files, EDGES_PX, budget_bytes, run.work)
    found = {(c.x, c.y, c.z): picture for c, picture in zip(shown, pictures, strict=True) if picture}
    fixed = [f"{shorten(name, 60)} {shorten(value, 120)}" for name, value in grid.fixed]
    missing = len(cells) - len(found)
    notes = [", ".join(fixed)] if fixed else []
    if missing:
        are = "is" if missing == 1 else "are"
        notes.append(
            f"{missing:,} of {counted(len(cells), 'picture')} {are} not shown: missing, or too many for a page"
        )
    if grid.sheet:
        notes.append(f"all in full size: {saved.folder}/{shorten(grid.sheet, 120)}")
    return join(
        tag("p", prompt_markup(grid.prompt, "", 400)) if grid.prompt else None,
        tag("p", shorten("; ".join(notes), 1000), class_="note") if notes else None,
        tag("p", said) if (said := what_to_see(grid)) else None,
        grid_tables(grid, found),
    )


def what_to_see(grid: Grid) -> str:
    """Return what to look for in a grid, by its axes, in a sentence; "" if there is nothing to say of them."""
    places = (("across", grid.x), ("down", grid.y), ("from table to table", grid.z))
    said = [f"{where}, {LOOK_FOR[axis.name]}" for where, axis in places if axis and axis.name in LOOK_FOR]
    return f"{said[0][0].upper()}{'; '.join(said)[1:]}." if said else ""


def grid_tables(
    grid: Grid, pictures: Mapping[Place, Picture], links: Mapping[Place, str] | None = None
) -> list[Markup]:
    """Return a table for each value of z that has pictures. pictures, links: of each place (x, y, z); URLs of files."""
    return [_table(grid, z, pictures, links or {}) for z in sorted({z for _, _, z in pictures})]


def _is_on(grid: Grid, cell: GridCell) -> bool:
    """Whether a cell's places are on the axes."""
    return all(
        place < (len(axis.labels) if axis else 1)
        for place, axis in zip((cell.x, cell.y, cell.z), (grid.x, grid.y, grid.z), strict=True)
    )


def _table(grid: Grid, z: int, found: Mapping[Place, Picture], links: Mapping[Place, str]) -> Markup:
    columns = sorted({x for x, _, of in found if of == z})
    rows = sorted({y for _, y, of in found if of == z})
    corner = tag("td", class_="corner") if grid.y else None
    head = [tag("th", _label(grid.x, x, first=x == columns[0]), scope="col") for x in columns]
    body = []
    for y in rows:
        cells = []
        for x in columns:
            picture = found.get((x, y, z))
            if picture is None:
                cells.append(tag("td"))
                continue
            where = ", ".join(
                f"{shorten(axis.name, 60)} {shorten(axis.labels[place], 120)}"
                for axis, place in ((grid.x, x), (grid.y, y), (grid.z, z))
                if axis
            )
            # the prompt stands below an enlarged picture, if it is one for all
            label = where if grid.prompt else None
            image = tag("div", picture.img(where, data_label=label), data_zoom=shorten(grid.prompt, 400) or where)
            url = links.get((x, y, z))
            cells.append(tag("td", image, tag("a", "PNG", href=url, class_="meta") if url else None))
        side = tag("th", _label(grid.y, y, first=y == rows[0]), scope="row") if grid.y else None
        body.append(tag("tr", side, cells))
    caption = tag("p", _label(grid.z, z, first=True), class_="layer") if grid.z else None
    grid_table = tag("table", tag("thead", tag("tr", corner, head)), tag("tbody", body), class_="xyz")
    axes = " and ".join(shorten(axis.name, 60) for axis in (grid.x, grid.y) if axis)
    layer = f", {shorten(grid.z.name, 60)} {shorten(grid.z.labels[z], 120)}" if grid.z else ""
    name = f"grid of {axes}{layer}: {shorten(grid.prompt, 120)}"
    return join(caption, tag("div", grid_table, class_="scroll", tabindex="0", role="region", aria_label=name))


def _label(axis: GridAxis, place: int, first: bool) -> Markup:
    name = tag("span", shorten(axis.name, 60), " ", class_="meta") if first else None
    return join(name, shorten(axis.labels[place], 80))
