"""What the model learnt: base, checkpoints and the real photograph beside each other, from the same noise."""

from __future__ import annotations

from safelight.text import counted
from safelight.trainer.report.comparison import ComparedRow, Comparison
from safelight.trainer.report.facts import evenly_chosen
from safelight.trainer.report.markup import Markup, details, nothing_yet, prompt_markup, shorten, tag
from safelight.trainer.report.models import is_suggested, name_of, put_forward
from safelight.trainer.report.pictures import Picture, embed_all
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder, averages_note, inside
from safelight.trainer.report.theme import Part, asset

PART = Part(asset("learned.css"), asset("learned.js"))
TITLE = "What it learnt"
MAX_ROWS = 100
MAX_PICTURES = 320
MAX_CHECKPOINTS = 6
# rows across the page, and those in two columns below; the rest is folded
NUM_WIDE, NUM_OPEN = 2, 8
EDGES_PX = (640, 512, 384, 320, 256, 192, 128)
BUDGET_BYTES = 11_000_000
MAX_PROMPT_CHARACTERS = 400
PHOTO = "photo"


def learned_section(run: RunFolder) -> Markup:
    """Return the pictures of base and checkpoints beside the photographs that the prompts were written for."""
    heading = tag("h2", TITLE)
    comparison = run.comparison
    rows = [row for row in comparison.rows if row.images] if comparison else []
    if not rows:
        return tag(
            "section", heading, nothing_yet("Base and trained model beside each other:", "compare"), id="learned"
        )
    checkpoints = _checkpoints(run, comparison)
    columns = [BASE, *checkpoints, PHOTO]
    rows = [rows[i] for i in evenly_chosen(len(rows), min(MAX_ROWS, MAX_PICTURES // len(columns)))]
    files = [_file(row, column) for row in rows for column in columns]
    pictures = embed_all([inside(run.path, "compare", file) for file in files], EDGES_PX, BUDGET_BYTES, run.work)
    num_missing = sum(bool(file) and picture is None for file, picture in zip(files, pictures, strict=True))
    chosen = put_forward(run, checkpoints)
    cards, wide = [], False
    for index, row in enumerate(rows):
        shown = dict(zip(columns, pictures[index * len(columns) : (index + 1) * len(columns)], strict=True))
        shown = {column: picture for column, picture in shown.items() if picture}
        if shown.keys() - {PHOTO}:
            cards.append(_card(run, row, shown, chosen))
            wide = wide or any(not picture.is_tiny for picture in shown.values())
    num_all = sum(bool(row.images) for row in comparison.rows)
    num_wide = NUM_WIDE if wide else 0
    rest = cards[NUM_OPEN:]
    return tag(
        "section",
        heading,
        tag("p", _note(run, comparison, any(row.photo for row in rows)), class_="note"),
        _missing(num_missing, sum(map(bool, files))),
        _chooser(run, checkpoints, chosen),
        tag("div", cards[:num_wide], class_="compared-rows wide") if num_wide else None,
        tag("div", cards[num_wide:NUM_OPEN], class_="compared-rows") if cards[num_wide:NUM_OPEN] else None,
        details(f"{counted(len(rest), 'more prompt')}", tag("div", rest, class_="compared-rows")) if rest else None,
        tag("p", f"Shown are {len(rows)} of {num_all:,} rows; all are in the run's compare folder.", class_="note")
        if len(rows) < num_all
        else None,
        id="learned",
    )


def _checkpoints(run: RunFolder, comparison: Comparison) -> list[str]:
    """Return the checkpoints to show, in order of steps: all, or some with the one that is put forward."""
    drawn = {model for row in comparison.rows for model in row.images}
    ids = [model.id for model in sorted(comparison.models, key=lambda m: m.step) if model.id != BASE]
    ids = [model for model in dict.fromkeys(ids) if model in drawn]
    chosen = evenly_chosen(len(ids), MAX_CHECKPOINTS)
    first = put_forward(run, ids)
    if first and ids.index(first) not in chosen:
        inner = chosen[1:-1]
        chosen.remove(min(inner, key=lambda place: abs(place - ids.index(first))))
        chosen = sorted([*chosen, ids.index(first)])
    return [ids[place] for place in chosen]


def _file(row: ComparedRow, column: str) -> str:
    return row.photo if column == PHOTO else row.images.get(column, "")


def _label(run: RunFolder, column: str) -> str:
    if column == PHOTO:
        return "Photograph"
    if column == BASE:
        return "Base, untrained" if run.model.get("from_scratch") else "Base"
    name = name_of(run, column)
    return name[0].upper() + name[1:]


def _card(run: RunFolder, row: ComparedRow, shown: dict[str, Picture], chosen: str | None) -> Markup:
    sides = []
    for column, picture in shown.items():
        label = _label(run, column)
        image = picture.img(f"{label}: {shorten(row.prompt, 120)}", data_label=label)
        kind = "photo" if column == PHOTO else "before" if column == BASE else "after"
        now = " now" if column == chosen else ""
        sides.append(tag("figure", tag("figcaption", label), image, class_=f"side {kind}{now}", data_model=column))
    about = [f"seed {row.seed}"] + ["held out of training"] * row.held_out
    caption = [
        prompt_markup(row.prompt, row.cut_after, MAX_PROMPT_CHARACTERS),
        tag("div", ", ".join(about), class_="meta"),
    ]
    zoom = f"{shorten(row.prompt, MAX_PROMPT_CHARACTERS)} — seed {row.seed}"
    return tag(
        "figure",
        tag("div", sides, class_="sides"),
        tag("figcaption", caption),
        class_="compared",
        data_zoom=zoom,
        data_zoom_by="button",
    )


def _note(run: RunFolder, comparison: Comparison, has_photos: bool) -> str:
    steps = "1 step" if comparison.num_steps == 1 else f"{comparison.num_steps} steps"
    sampler = f" of {shorten(comparison.sampler, 40)}" if comparison.sampler else ""
    note = (
        "All pictures of a row were drawn from the same prompt and the same initial noise, so what differs is what "
        f"training changed (cfg {comparison.cfg:g}, {steps}{sampler})."
    )
    if has_photos:
        note += " The photograph is the one whose caption is the prompt."
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
        tag("code", "safelight compare"),
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
    return tag("fieldset", legend, options, class_="choose", data_for="learned", hidden=True)
