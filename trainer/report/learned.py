"""What the model learnt: base, checkpoints and the real photograph beside each other, from the same noise.

The pictures are those of `safelight compare`, else those that were sampled during training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safelight.text import counted
from safelight.trainer.report.comparison import Comparison
from safelight.trainer.report.facts import evenly_chosen
from safelight.trainer.report.markup import Markup, details, join, nothing_yet, prompt_markup, shorten, tag
from safelight.trainer.report.models import is_suggested, name_of, put_forward
from safelight.trainer.report.pictures import Picture, embed_all
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder, averages_note, inside
from safelight.trainer.report.samples import cut_after_of, key_of
from safelight.trainer.report.theme import Part, asset
from safelight.trainer.report.verdicts import is_from_scratch

PART = Part(asset("learned.css"), asset("learned.js"))
TITLE = "What it learnt"
MAX_ROWS = 100
MAX_PICTURES = 320
MAX_CHECKPOINTS = 6
# rows across the page, and those in two columns below; the rest is folded
NUM_WIDE, NUM_OPEN = 2, 8
EDGES_PX = (640, 512, 384, 320, 256, 192, 128)
BUDGET_BYTES = 10_000_000
MAX_PROMPT_CHARACTERS = 400
PHOTO = "photo"
# what stands in this report without being explained again
TERMS = (
    "Cfg, the guidance scale, is how strongly the prompt steers a picture; the seed is the number that its initial "
    "noise is made from."
)


@dataclass
class Row:
    """A prompt and its pictures. files: model or PHOTO -> its file, None if it is named but missing."""

    prompt: str
    seed: int
    cut_after: str = ""
    is_held_out: bool = False
    files: dict[str, Path | None] = field(default_factory=dict)


def learned_section(run: RunFolder) -> Markup:
    """Return the pictures of base and checkpoints beside the photographs that the prompts were written for."""
    heading = tag("h2", TITLE)
    rows = compared_rows(run, run.comparison) if run.comparison else []
    note = _note(run, run.comparison, rows) if rows else _SAMPLED_NOTE
    rows = rows or sampled_rows(run)
    if not rows:
        return tag(
            "section", heading, nothing_yet("Base and trained model beside each other:", "compare"), id="learned"
        )
    num_all, checkpoints = len(rows), _checkpoints(run, rows)
    columns = [BASE, *checkpoints, PHOTO]
    rows = [rows[i] for i in evenly_chosen(len(rows), min(MAX_ROWS, MAX_PICTURES // len(columns)))]
    named = [(row, column) for row in rows for column in columns if column in row.files]
    embedded = embed_all([row.files[column] for row, column in named], EDGES_PX, BUDGET_BYTES, run.work)
    num_missing = sum(picture is None for picture in embedded)
    by_row: dict[int, dict[str, Picture]] = {}
    for (row, column), picture in zip(named, embedded, strict=True):
        if picture:
            by_row.setdefault(id(row), {})[column] = picture
    chosen = put_forward(run, checkpoints)
    cards = [_card(run, row, shown, chosen) for row in rows if (shown := by_row.get(id(row), {})).keys() - {PHOTO}]
    is_tiny = all(picture.is_tiny for picture in embedded if picture)
    layout, num_wide = ("compared-rows small", 0) if is_tiny else ("compared-rows", NUM_WIDE)
    rest = cards[NUM_OPEN:]
    return tag(
        "section",
        heading,
        tag("p", note, class_="note"),
        _missing(num_missing, len(named)),
        _chooser(run, checkpoints, chosen),
        tag("div", cards[:num_wide], class_="compared-rows wide") if num_wide else None,
        tag("div", cards[num_wide:NUM_OPEN], class_=layout) if cards[num_wide:NUM_OPEN] else None,
        details(f"{counted(len(rest), 'more prompt')}", tag("div", rest, class_=layout)) if rest else None,
        tag("p", f"Shown are {len(rows)} of {num_all:,} rows; all are in the run's compare folder.", class_="note")
        if len(rows) < num_all
        else None,
        id="learned",
    )


_SAMPLED_NOTE = join(
    "Sampled during training: base and checkpoint from the same prompt and the same initial noise. ",
    tag("code", "safelight compare RUN"),
    " draws more prompts, beside the photographs they were written for. ",
    TERMS,
)


def compared_rows(run: RunFolder, comparison: Comparison) -> list[Row]:
    """Return the rows that `safelight compare` drew."""
    rows = []
    for row in comparison.rows:
        if row.images:
            names = {**row.images, **({PHOTO: row.photo} if row.photo else {})}
            files = {column: inside(run.path, "compare", name) for column, name in names.items() if name}
            rows.append(Row(row.prompt, row.seed, row.cut_after, row.held_out, files))
    return rows


def sampled_rows(run: RunFolder) -> list[Row]:
    """Return the samples of the base and of later steps as rows, [] if the base or all later ones are missing."""
    rows: dict[tuple, Row] = {}
    for sample in run.samples:
        for image in sample.images:
            key = key_of(image)
            row = rows.setdefault(key, Row(key[0], key[1], cut_after_of(image)))
            model = f"step-{sample.step}" if sample.step else BASE
            row.files[model] = inside(run.path, sample.folder, image.get("file"))
    return [row for row in rows.values() if BASE in row.files and len(row.files) > 1]


def _checkpoints(run: RunFolder, rows: list[Row]) -> list[str]:
    """Return the checkpoints to show, in order of steps: all, or some with the one that is put forward."""
    drawn = {model for row in rows for model in row.files} - {BASE, PHOTO}
    ids = sorted(drawn, key=lambda model: int(model.removeprefix("step-")))
    chosen = evenly_chosen(len(ids), MAX_CHECKPOINTS)
    first = put_forward(run, ids)
    if first and ids.index(first) not in chosen:
        inner = chosen[1:-1]
        chosen.remove(min(inner, key=lambda place: abs(place - ids.index(first))))
        chosen = sorted([*chosen, ids.index(first)])
    return [ids[place] for place in chosen]


def _label(run: RunFolder, column: str) -> str:
    if column == PHOTO:
        return "Photograph"
    if column == BASE:
        return "Untrained" if is_from_scratch(run) else "Base"
    name = name_of(run, column)
    return name[0].upper() + name[1:]


def _card(run: RunFolder, row: Row, shown: dict[str, Picture], chosen: str | None) -> Markup:
    sides, others = [], []
    for column, picture in shown.items():
        label = _label(run, column)
        image = picture.img(f"{label}: {shorten(row.prompt, 120)}", data_label=label)
        kind = "photo" if column == PHOTO else "before" if column == BASE else "after"
        now = " now" if column == chosen else ""
        side = tag("figure", tag("figcaption", label), image, class_=f"side {kind}{now}", data_model=column)
        is_other = kind == "after" and not now and chosen in shown
        (others if is_other else sides).append(side)
    seed = [f"seed {row.seed}"] * (row.seed >= 0)
    caption = [
        prompt_markup(row.prompt, row.cut_after, MAX_PROMPT_CHARACTERS),
        tag("div", ", ".join(seed + ["held out of training"] * row.is_held_out), class_="meta"),
    ]
    return tag(
        "figure",
        tag("div", tag("div", sides, class_="sides"), _folded(others)),
        tag("figcaption", caption),
        class_="compared",
        data_zoom=" — ".join([shorten(row.prompt, MAX_PROMPT_CHARACTERS), *seed]),
        data_zoom_by="button",
    )


def _folded(others: list[Markup]) -> Markup | None:
    """Return the checkpoints beside the one that is put forward, which the script puts into its place instead."""
    if not others:
        return None
    return details(counted(len(others), "other checkpoint"), tag("div", others, class_="more"), class_="others")


def _note(run: RunFolder, comparison: Comparison, rows: list[Row]) -> str:
    steps = "1 step" if comparison.num_steps == 1 else f"{comparison.num_steps} steps"
    sampler = f" of {shorten(comparison.sampler, 40)}" if comparison.sampler else ""
    note = (
        "All pictures of a row were drawn from the same prompt and the same initial noise, so what differs is what "
        f"training changed (cfg {comparison.cfg:g}, {steps}{sampler}). {TERMS}"
    )
    having = [bool(row.files.get(PHOTO)) for row in rows]
    if any(having):
        where = "" if all(having) else ", where there is one,"
        note += f" The photograph{where} is the one whose caption is the prompt."
    last = max((model.step for model in comparison.models), default=0)
    if last < run.metrics.last_step and not run.evaluation:
        note += f" The last checkpoint drawn is of step {last:,}; training went on to step {run.metrics.last_step:,}."
    return note + averages_note(run, "The checkpoints' pictures use")


def _missing(num_missing: int, num_all: int) -> Markup | None:
    if not num_missing:
        return None
    are = "is" if num_missing == 1 else "are"
    return tag(
        "p",
        f"{num_missing:,} of {counted(num_all, 'picture')} {are} missing, damaged or too large for this page; ",
        tag("code", "safelight compare RUN"),
        " draws what is missing.",
        class_="note",
    )


def _chooser(run: RunFolder, checkpoints: list[str], chosen: str | None) -> Markup | None:
    if len(checkpoints) < 2:
        return None
    options = []
    for model in checkpoints:
        suggested = tag("span", " suggested", class_="meta") if is_suggested(run, model) else None
        button = tag("input", type="radio", name="learned", value=model, checked=model == chosen)
        options.append(tag("label", button, tag("span", name_of(run, model), suggested)))
    legend = tag("legend", "Compare the base model with")
    return tag("fieldset", legend, options, class_="choose", hidden=True)
