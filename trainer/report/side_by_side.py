"""Write a page that shows several runs side by side: what was set, how they went, what they measured and drew."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import safelight
from safelight.data.atomic import atomic_write_text
from safelight.data.lock import is_held
from safelight.errors import UserError
from safelight.trainer.config.toml import require_run
from safelight.trainer.report import chart, measures
from safelight.trainer.report.common_pictures import pictures_section
from safelight.trainer.report.course import ending, lost_losses
from safelight.trainer.report.facts import (
    best_validation,
    format_duration,
    format_epoch,
    format_percent,
    headline_facts,
    is_one_picture,
)
from safelight.trainer.report.markup import Markup, heading_of, join, shorten, table, tag
from safelight.trainer.report.overlaid_curves import overlaid_section
from safelight.trainer.report.run_reader import RunFolder, number, read_run_folder
from safelight.trainer.report.settings_table import settings_section
from safelight.trainer.report.shared_measures import measures_section
from safelight.trainer.report.shown_runs import ShownRun, loss_caveat, shown_runs
from safelight.trainer.report.theme import THEME, Part, asset, page
from safelight.untrusted import UnsafeFile, is_inside, open_regular

PART = Part(asset("side_by_side.css"))
FILE_NAME = "comparison.html"
MIN_RUNS, MAX_RUNS = 2, 12
# begins the title of every such page, by which one is known that may be overwritten
TITLE = "Runs side by side: "
MAX_HEAD_BYTES = 4096
MAX_PROBLEMS = 20
# the figures of a run, in this order
HEADLINES = (
    *("base model", "photographs", "ended", "trained", "losses", "lowest held-out loss", "held-out loss of the base"),
    *("change from the base", "last held-out loss", "run time", "mean speed", "peak memory"),
)


def build_side_by_side(run_dirs: Sequence[Path], out: Path | None, force: bool = False) -> Path:
    """Write the page about these runs and return its path.

    out: the file, None for FILE_NAME in the folder that all runs share. force: overwrite whatever is there. Raises
    UserError for folders that are no runs, one that is given twice, too few or too many, and a file that is not such a
    page or lies in a run.
    """
    _check_runs(run_dirs)
    path = _place(run_dirs, out, force)
    runs = [read_run_folder(run_dir, is_training=is_held(run_dir)) for run_dir in run_dirs]
    atomic_write_text(path, render(runs))
    return path


def render(folders: Sequence[RunFolder]) -> str:
    """Return the page as HTML."""
    runs = shown_runs(folders)
    sections = (
        ("headline", _headline_section),
        ("settings", settings_section),
        ("loss", overlaid_section),
        ("measures", measures_section),
        ("pictures", pictures_section),
    )
    drawn = [(key, make(runs)) for key, make in sections]
    title = f"{TITLE}{', '.join(one.label for one in runs)}"
    body = join(
        tag(
            "header",
            tag("div", "Safelight · runs side by side", class_="mark"),
            tag("h1", f"{len(runs)} runs side by side"),
            tag("ul", [_key(one) for one in runs], class_="runs"),
            [_problems(one) for one in runs],
            tag("nav", [tag("a", heading_of(made), href=f"#{key}") for key, made in drawn], aria_label="Sections"),
        ),
        tag("main", [made for _, made in drawn]),
        tag(
            "footer",
            f"Written by Safelight {safelight.__version__}. "
            "This file is self-contained: it loads nothing from the internet. Charts: uPlot by Leon Sorokin (MIT).",
        ),
    )
    return page(shorten(title, 400), body, parts=(THEME, chart.PART, measures.PART, PART))


def _check_runs(run_dirs: Sequence[Path]) -> None:
    if not MIN_RUNS <= len(run_dirs) <= MAX_RUNS:
        raise UserError(f"{len(run_dirs)} runs given; a page shows {MIN_RUNS} to {MAX_RUNS} side by side")
    first: dict[str, Path] = {}
    for run_dir in run_dirs:
        require_run(run_dir)
        known = first.setdefault(os.path.realpath(run_dir), run_dir)
        if known is not run_dir:
            same = f"{run_dir} is given twice" if known == run_dir else f"{known} and {run_dir} are the same run"
            raise UserError(f"{same}; give each run once")


def _place(run_dirs: Sequence[Path], out: Path | None, force: bool) -> Path:
    """Return where to write the page. Raises UserError if it would lie in a run, or replace something else."""
    path = out or _shared_folder(run_dirs) / FILE_NAME
    if path.is_dir():
        path = path / FILE_NAME
    if any(is_inside(path.parent, run_dir) for run_dir in run_dirs):
        where = "it is not written into a run folder; name another file with -o"
        raise UserError(f"{path} lies in one of the runs; {where}")
    if (os.path.lexists(path) and not force) and not _is_side_by_side(path):
        raise UserError(
            f"{path} exists and is not such a page; name another file with -o, or add --force to overwrite it"
        )
    return path


def _shared_folder(run_dirs: Sequence[Path]) -> Path:
    """Return the innermost folder that holds all runs, relative if all of them are given so."""
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(run_dir)) for run_dir in run_dirs])
    return Path(shared if any(run_dir.is_absolute() for run_dir in run_dirs) else os.path.relpath(shared))


def _is_side_by_side(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return f"<title>{TITLE}".encode() in file.read(MAX_HEAD_BYTES)
    except (UnsafeFile, OSError):
        return False


def _key(one: ShownRun) -> Markup:
    """Return a run's entry in the list at the top: its colour, name, folder and note."""
    notes = shorten(" ".join(one.run.notes.split()), 1000)
    return tag(
        "li",
        tag("strong", one.name),
        " ",
        tag("code", shorten(one.run.path, 200), class_="meta"),
        tag("div", notes, class_="meta", dir="auto") if notes else None,
    )


def _problems(one: ShownRun) -> Markup | None:
    problems = one.run.problems
    if not problems:
        return None
    lines = [tag("li", shorten(problem, 400)) for problem in problems[:MAX_PROBLEMS]]
    more = len(problems) - len(lines)
    lines += [tag("li", f"and {more:,} more")] if more > 0 else []
    return tag("div", tag("strong", f"Parts of {one.label} could not be read:"), tag("ul", lines), class_="alert")


def _headline_section(runs: Sequence[ShownRun]) -> Markup:
    columns = [_headline(one.run) for one in runs]
    names = [name for name in HEADLINES if any(name in column for column in columns)]
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    return tag(
        "section",
        tag("h2", "At a glance"),
        table(["", *(one.name for one in runs)], rows, class_="beside"),
        tag("p", loss_caveat(runs), class_="note"),
        tag("h3", "Which checkpoint of each"),
        tag("ul", [_suggestion(one) for one in runs], class_="suggested"),
        id="headline",
    )


def _headline(run: RunFolder) -> dict[str, object]:
    """Return the figures of a run that has them, by name."""
    facts, end = headline_facts(run.metrics), ending(run)
    ends = {
        "finished": "finished",
        "stopped": f"stopped at {end.place}",
        "diverged": tag("strong", f"diverged at {end.place}", class_="put-forward"),
        "open": {
            True: f"training goes on, at {end.place}",
            False: f"ended before its time, at {end.place}",
            None: f"still running, or ended before its time, at {end.place}",
        }[run.is_training],
    }
    shown: dict[str, object] = {"base model": run.base_title}
    data = run.data or {}
    photos, held_out = number(data.get("num_photos")), number(data.get("num_validation"))
    if photos >= 0:
        shown["photographs"] = f"{photos:,.0f}" + (f" ({held_out:,.0f} held out)" if held_out >= 0 else "")
    shown["ended"] = ends.get(end.kind, "unknown")
    shown["trained"] = f"{format_epoch(facts.last_epoch)} epochs, {facts.last_step:,} steps"
    if lost := lost_losses(run.metrics):
        shown["losses"] = " ".join(lost)
    if facts.best:
        place = f"epoch {format_epoch(facts.best.epoch)}" if facts.best.step else "the base model"
        shown["lowest held-out loss"] = f"{facts.best.loss:.4f} ({place})"
    held = run.metrics.validation["held_out"]
    if held and held[0].step == 0:
        shown["held-out loss of the base"] = f"{held[0].loss:.4f}"
    if facts.change_percent is not None:
        shown["change from the base"] = format_percent(facts.change_percent)
    if held and facts.best and held[-1].step > facts.best.step:
        shown["last held-out loss"] = f"{held[-1].loss:.4f}"
    if facts.run_time_s is not None and facts.last_step:
        shown["run time"] = format_duration(facts.run_time_s)
    if facts.images_per_s is not None:
        shown["mean speed"] = f"{facts.images_per_s:.3g} images/s"
    if facts.peak_memory_gib is not None:
        shown["peak memory"] = f"{facts.peak_memory_gib:.2f} GiB"
    return shown


def _suggestion(one: ShownRun) -> Markup:
    run = one.run
    suggestion = run.evaluation.suggestion if run.evaluation else None
    if suggestion:
        text = shorten(suggestion.sentence, 600)
        reasons = "; ".join(shorten(reason, 300) for reason in suggestion.reasons)
    else:
        best = best_validation(run.metrics.validation["held_out"])
        trained = [point for point in run.metrics.validation["held_out"] if point.step]
        if best is None or not trained:
            text, reasons = "No held-out loss was measured after training began.", ""
        elif is_one_picture(run.metrics.validation["held_out"]):
            text, reasons = "A single held-out photograph is too little to choose by.", ""
        elif best.step == 0:
            text, reasons = "By held-out loss, none is better than the base model.", ""
        else:
            text = f"By held-out loss alone, epoch {format_epoch(best.epoch)} (step {best.step:,})."
            reasons = "not evaluated"
    return tag(
        "li",
        tag("strong", one.label, dir="auto"),
        ": ",
        text,
        tag("span", f" {reasons}", class_="meta") if reasons else None,
    )
