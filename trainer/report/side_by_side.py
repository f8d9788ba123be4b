"""Write a page that shows several runs side by side: what was set, how they went, what they measured and drew."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safelight
from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.trainer.config.toml import require_run
from safelight.trainer.report import chart as charts
from safelight.trainer.report.chart import DISTINCT, Curve, chart, figure_grid, is_wide, table_of
from safelight.trainer.report.common_pictures import pictures_section
from safelight.trainer.report.course import ending, learning_rates, lost_losses
from safelight.trainer.report.curves import smoothed
from safelight.trainer.report.facts import (
    best_validation,
    format_duration,
    format_epoch,
    format_percent,
    headline_facts,
    is_one_picture,
)
from safelight.trainer.report.markup import Markup, empty_state, join, shorten, table, tag
from safelight.trainer.report.run_reader import RunFolder, number, read_run_folder
from safelight.trainer.report.settings_table import differing, settings_of, settings_section
from safelight.trainer.report.shared_measures import measures_section
from safelight.trainer.report.theme import THEME, Part, asset, page
from safelight.untrusted import UnsafeFile, is_inside, open_regular, path_in, read_json_object

PART = Part(asset("side_by_side.css"))
FILE_NAME = "comparison.html"
MIN_RUNS, MAX_RUNS = 2, 12
# begins the title of every such page, by which one is known that may be overwritten
TITLE = "Runs side by side: "
MAX_HEAD_BYTES = 4096
MAX_LABEL_CHARACTERS = 48
MAX_SPLIT_BYTES = 2**26
MAX_PROBLEMS = 20
# settings that decide what a held-out loss measures; all of [loss] does too
LOSS_SETTINGS = (
    *("run.seed", "model.vae", "model.clip_skip", "data.resolution", "data.upscale", "data.max_aspect"),
    *("data.caption_suffix", "data.caption_chunks", "validate.timesteps", "validate.max_images"),
)


def build_side_by_side(run_dirs: Sequence[Path], out: Path | None, force: bool = False) -> Path:
    """Write the page about these runs and return its path.

    out: the file, None for FILE_NAME in the folder that all runs share. force: overwrite whatever is there. Raises
    UserError for folders that are no runs, one that is given twice, too few or too many, and a file that is not such a
    page or lies in a run.
    """
    _check_runs(run_dirs)
    path = _place(run_dirs, out, force)
    runs = [read_run_folder(run_dir) for run_dir in run_dirs]
    atomic_write_text(path, render(runs))
    return path


def render(runs: Sequence[RunFolder]) -> str:
    """Return the page as HTML."""
    labels = labels_of(runs)
    sections = (
        ("headline", "At a glance", _headline_section),
        ("settings", "Settings", settings_section),
        ("loss", "Loss", _loss_section),
        ("measures", "Measured", measures_section),
        ("pictures", "Pictures", pictures_section),
    )
    title = f"{TITLE}{', '.join(labels)}"
    body = join(
        tag(
            "header",
            tag("div", "Safelight · runs side by side", class_="mark"),
            tag("h1", f"{len(runs)} runs side by side"),
            tag(
                "ul",
                [_key(run, label, i) for i, (run, label) in enumerate(zip(runs, labels, strict=True))],
                class_="runs",
            ),
            [_problems(run, label) for run, label in zip(runs, labels, strict=True)],
            tag("nav", [tag("a", name, href=f"#{key}") for key, name, _ in sections], aria_label="Sections"),
        ),
        tag("main", [make(runs, labels) for _, _, make in sections]),
        tag(
            "footer",
            f"Written by Safelight {safelight.__version__}. "
            "This file is self-contained: it loads nothing from the internet. Charts: uPlot by Leon Sorokin (MIT).",
        ),
    )
    return page(shorten(title, 400), body, parts=(THEME, charts.PART, PART))


def labels_of(runs: Sequence[RunFolder]) -> list[str]:
    """Return a short name for each run: its title; with its folder where titles are equal."""
    titles = [shorten(" ".join(run.title.split()), MAX_LABEL_CHARACTERS) for run in runs]
    paths = [run.path.resolve() for run in runs]
    shared = os.path.commonpath([path.parent for path in paths])
    folders = [os.path.relpath(path, shared) for path in paths]
    return [
        title if titles.count(title) == 1 else folder if title == folder else f"{title} ({folder})"
        for title, folder in zip(titles, folders, strict=True)
    ]


def color_of(index: int) -> str:
    """Return the colour of a run's curves; beyond as many as there are, they repeat, and the curves are dashed."""
    return DISTINCT[index % len(DISTINCT)]


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
    paths = [Path(os.path.realpath(run_dir)) for run_dir in run_dirs]
    path = out or Path(os.path.relpath(os.path.commonpath([path.parent for path in paths]))) / FILE_NAME
    if path.is_dir():
        path = path / FILE_NAME
    if any(is_inside(path.parent, run) for run in paths):
        where = "it is not written into a run folder; name another file with -o"
        raise UserError(f"{path} lies in one of the runs; {where}")
    if (os.path.lexists(path) and not force) and not _is_side_by_side(path):
        raise UserError(
            f"{path} exists and is not such a page; name another file with -o, or add --force to overwrite it"
        )
    return path


def _is_side_by_side(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return f"<title>{TITLE}".encode() in file.read(MAX_HEAD_BYTES)
    except (UnsafeFile, OSError):
        return False


def _key(run: RunFolder, label: str, index: int) -> Markup:
    """Return a run's entry in the list at the top: its colour, name and folder."""
    mark = Markup(
        f'<svg viewBox="0 0 14 14" aria-hidden="true"><circle class="f-{color_of(index)}" cx="7" cy="7" r="6"/></svg>'
    )
    notes = shorten(" ".join(run.notes.split()), 200)
    return tag(
        "li",
        mark,
        tag("div", tag("strong", label, dir="auto"), " ", tag("code", shorten(run.path, 200), class_="meta")),
        tag("div", notes, class_="meta", dir="auto") if notes else None,
    )


def _problems(run: RunFolder, label: str) -> Markup | None:
    if not run.problems:
        return None
    lines = [tag("li", shorten(problem, 400)) for problem in run.problems[:MAX_PROBLEMS]]
    more = len(run.problems) - len(lines)
    lines += [tag("li", f"and {more:,} more")] if more > 0 else []
    return tag("div", tag("strong", f"Parts of {label} could not be read:"), tag("ul", lines), class_="alert")


def _headline_section(runs: Sequence[RunFolder], labels: Sequence[str]) -> Markup:
    columns = [_headline(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    reasons = [_suggestion(run, label) for run, label in zip(runs, labels, strict=True)]
    return tag(
        "section",
        tag("h2", "At a glance"),
        table(["", *labels], rows, class_="beside"),
        tag("p", " ".join(_comparability(runs)), class_="note"),
        tag("h3", "Which checkpoint of each"),
        tag("ul", reasons, class_="suggested"),
        id="headline",
    )


def _headline(run: RunFolder) -> dict[str, object]:
    """Return the figures of a run that has them, by name."""
    facts, end = headline_facts(run.metrics), ending(run)
    ends = {
        "finished": "finished",
        "stopped": f"stopped at {end.place}",
        "diverged": tag("strong", f"diverged at {end.place}", class_="put-forward"),
        "open": f"still running, or ended before its time, at {end.place}",
    }
    shown: dict[str, object] = {"base model": shorten(run.base, 120)}
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


def _suggestion(run: RunFolder, label: str) -> Markup:
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
        tag("strong", label, dir="auto"),
        ": ",
        text,
        tag("span", f" {reasons}", class_="meta") if reasons else None,
    )


def _comparability(runs: Sequence[RunFolder]) -> list[str]:
    """Return whether the held-out losses of these runs measure the same thing, in sentences."""
    columns = [settings_of(run) for run in runs]
    own = [name for name in differing(columns) if name in LOSS_SETTINGS or name.startswith("loss.")]
    splits = {_held_out_photographs(run) for run in runs}
    bases = {run.base for run in runs}
    why = []
    if own:
        why.append(f"these settings decide what it measures and differ: {', '.join(own)}")
    if None not in splits and len(splits) > 1:
        why.append("the runs hold out different photographs")
    if len(bases) > 1:
        why.append("the base models differ, and may predict other things or have other autoencoders")
    if why:
        return [
            f"Held-out loss cannot be compared between all of these runs: {'; '.join(why)}.",
            "Compare each with its own base.",
        ]
    if None in splits or not all(columns):
        return ["Held-out losses can be compared if the runs hold out the same photographs, which is not known here."]
    return ["Held-out loss is measured alike in all of these runs: same photographs, noise and timesteps."]


def _held_out_photographs(run: RunFolder) -> frozenset[str] | None:
    """Return the names of the photographs held out of training, which contain a hash of each; None if unknown."""
    try:
        names = read_json_object(path_in(run.path, "split.json"), MAX_SPLIT_BYTES).get("validation")
    except (UnsafeFile, OSError):
        return None
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else None


@dataclass(frozen=True)
class _Chart:
    title: str
    detail: str
    curves: list[Curve]
    unit: str = ""
    is_small: bool = False
    note: str = ""


def _loss_section(runs: Sequence[RunFolder], labels: Sequence[str]) -> Markup:
    """Return the curves of all runs over each other: held-out loss, training loss, change from the base, rate."""
    held_out, changes, training, rates = [], [], [], []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        color, is_repeated = color_of(index), index >= len(DISTINCT)
        points = run.metrics.validation["held_out"]
        look = "dashed" if is_repeated else "dots"
        if points:
            epochs = [point.epoch for point in points]
            held_out.append(Curve(label, epochs, [point.loss for point in points], color, look))
            if points[0].step == 0 and points[0].loss > 0 and len(points) > 1 and not is_one_picture(points):
                relative = [100 * (point.loss / points[0].loss - 1) for point in points]
                changes.append(Curve(label, epochs, relative, color, look))
        line = "dashed" if is_repeated else "line"
        means = smoothed(run.metrics, "loss", "", color)[:1]
        training += [Curve(label, curve.x, curve.y, color, line) for curve in means]
        exact = learning_rates(run)
        train = run.metrics.train
        logged = (train["epoch"], train["lr"]) if exact is None else exact
        if any(map(math.isfinite, logged[1])):
            rates.append(Curve(label, *map(list, logged), color, "dashed" if is_repeated else "steps"))
    large = [
        _Chart("Held-out loss", "mean squared error", held_out, note=" ".join(_comparability(runs))),
        _Chart("Training loss", "smoothed", training, note="Training draws new noise at every step."),
    ]
    small = [
        _Chart("Change of held-out loss", "% from the base", changes, "%", True),
        _Chart("Learning rate", "", rates, "", True),
    ]
    drawn = [_drawn(one) for one in large if one.curves]
    beside = [_drawn(one) for one in small if one.curves]
    body = (
        [*drawn, figure_grid(*beside) if beside else None] if drawn or beside else empty_state("No run logged a step.")
    )
    return tag("section", tag("h2", "Loss"), body, id="loss")


def _drawn(one: _Chart) -> Markup:
    values = [value for curve in one.curves for value in curve.y]
    return chart(
        one.title,
        one.curves,
        table_of(one.curves, title=one.title.lower()),
        detail=one.detail,
        label=f"{one.title} of each run over the epochs",
        note=one.note,
        unit=one.unit,
        is_small=one.is_small,
        is_log=not one.is_small and is_wide(values),
        from_zero=one.title == "Learning rate",
    )
