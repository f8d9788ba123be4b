"""RUN/grids/NAME: pictures over every combination of the values of up to three settings, from the same noise.

Beside the pictures lie the record that the report reads (trainer/report/grid_record.py), a contact sheet of each table
and one of all, and a page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.distributed.together import together
from safelight.trainer.inference.draw import OpenRun
from safelight.trainer.inference.gallery import PAGE_NAME, slug
from safelight.trainer.inference.grid_page import write_grid_page
from safelight.trainer.inference.grid_plan import GridPlan
from safelight.trainer.inference.grid_sheet import write_grid_sheets
from safelight.trainer.inference.pictures import Progress, Request, Say, draw_missing, keys_of
from safelight.trainer.report.grid_record import Grid, GridCell
from safelight.trainer.run_log.doubts import doubt_about
from safelight.untrusted import check_kinds

FOLDER, RECORD_NAME = "grids", "index.json"
# of a picture's key in its name, so that a name tells one picture
KEY_CHARS = 12
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
_SHEET_NAME = re.compile(r"sheet(-[0-9]+)?\.png")


def draw_grid(
    run: OpenRun, plan: GridPlan, name: str = "", *, progress: Progress | None = None, say: Say | None = None
) -> Path:
    """Draw the pictures of a grid that are not there yet, write everything beside them and return the folder.

    name: of the folder in RUN/grids, by default the names of the axes. Cells whose pictures depend on the same values
    share one. Pictures of other grids with this name stay: they are there when their values come back.
    progress, say: as for `draw_missing`, whose errors are raised, and UserError for a name that is none.
    """
    name = name or "-".join(axis.name for axis in plan.axes)
    check_name(name)
    folder = run.run_dir / FOLDER / name
    check_kinds(run.run_dir, (FOLDER,), ("report.html",), "the run")
    check_kinds(run.run_dir / FOLDER, (name,), (), "the run")
    check_kinds(folder, (), [RECORD_NAME, PAGE_NAME, *(path.name for path in folder.glob("*.png"))], "the run")
    run.check_writable(f"{FOLDER}/{name}")
    requests = [cell.request for cell in plan.cells]
    files = [_file_name(*pair) for pair in zip(requests, keys_of(run, requests), strict=True)]
    wanted: dict[str, Request] = dict(zip(reversed(files), reversed(requests), strict=True))
    wanted = {file: wanted[file] for file in files}
    if say is not None:
        _say_before(run, plan, wanted, say)
    if not draw_missing(run, wanted, folder, progress=progress, say=say) and say is not None:
        say("all of them are there already: nothing was drawn")
    grid = Grid(
        **dict(zip("xyz", plan.axes, strict=False)),
        prompt=plan.prompt,
        fixed=plan.fixed,
        cells=tuple(
            GridCell(**dict(zip("xyz", cell.place, strict=True)), file=file)
            for cell, file in zip(plan.cells, files, strict=True)
        ),
        sheet="sheet.png",
    )
    with together(run.world):
        if run.world.is_main:
            settings = requests[0].settings
            _write_record(run, folder, grid, (settings.width, settings.height))
    return folder


def _write_record(run: OpenRun, folder: Path, grid: Grid, size: tuple[int, int]) -> None:
    """Write a grid's record, contact sheets and page. size: of its pictures, px."""
    sheets = write_grid_sheets(folder, grid, size)
    atomic_write_text(folder / RECORD_NAME, grid.model_dump_json(indent=1))
    write_grid_page(folder, run.name, grid, sheets)
    for path in folder.glob("sheet*.png"):
        if _SHEET_NAME.fullmatch(path.name) and path.name not in sheets:
            path.unlink()


def check_name(name: str) -> None:
    """Raise UserError if a grid cannot have this name."""
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r} names no folder in RUN/grids; use up to 80 letters, digits, '-', '_' and '.'")


def _file_name(request: Request, key: str) -> str:
    """Return the name of a picture, which tells its settings and differs from that of every other picture."""
    settings, step = request.settings, request.weights.step
    model = "base" if step is None else f"step{step}"
    parts = [model, settings.sampler, f"{settings.steps}steps", f"cfg{settings.cfg:g}", f"seed{settings.seed}"]
    return "-".join([*parts, *filter(None, [slug(request.prompt)]), key[:KEY_CHARS]]) + ".png"


def _say_before(run: OpenRun, plan: GridPlan, wanted: Mapping[str, Request], say: Say) -> None:
    """Say how large the grid is, and what may be wrong with its pictures."""
    sizes = " x ".join(f"{len(axis.labels)} ({axis.name})" for axis in plan.axes)
    num_equal = len(plan.cells) - len(wanted)
    equal = f"; {counted(num_equal, 'cell')} {'equals' if num_equal == 1 else 'equal'} others" if num_equal else ""
    cells, pictures = counted(len(plan.cells), "cell"), counted(len(wanted), "picture")
    say(f"{sizes}: {cells}, {pictures}{equal}")
    for step in dict.fromkeys(request.weights.step for request in wanted.values()):
        if step is not None and (doubt := doubt_about(run.run_dir, step)):
            say(f"note: {doubt}")
    by_negative: dict[str, list[str]] = {}
    for request in wanted.values():
        by_negative.setdefault(request.negative, []).append(request.prompt)
    told: set[str] = set()
    for negative, prompts in by_negative.items():
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in told]
        told |= set(new)
        run.say_cuts(new, negative, say)
