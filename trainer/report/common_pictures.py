"""What several runs drew for the same prompts and seeds: the base, the real photograph, and each run's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.text import counted
from safelight.trainer.report.facts import evenly_chosen
from safelight.trainer.report.learned import PHOTO, Row, compared_rows, sampled_rows
from safelight.trainer.report.markup import Markup, details, nothing_yet, prompt_markup, shorten, tag
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.pictures import Work, embed_all, placeholder
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder
from safelight.trainer.report.shown_runs import ShownRun

MAX_ROWS, MAX_PICTURES, NUM_OPEN = 40, 320, 6
# prompts of each run where no two runs share one
NUM_ALONE = 4
EDGES_PX = (512, 384, 320, 256, 192, 128)
BUDGET_BYTES = 14_000_000
MAX_PROMPT_CHARACTERS = 400
NOT_YET = "Pictures of two runs for the same prompts and seeds, as these commands draw them:"
NONE_IN_COMMON = (
    "These runs drew pictures, but none for the same prompt and seed as another. "
    "safelight compare draws the prompts of sample.prompts first, from the seed run.seed: set both alike in all runs."
)

# of a row: its prompt and seed
Key = tuple[str, int]


@dataclass(frozen=True)
class _Drawn:
    """What one run drew. model: the checkpoint to show. settings: how, and from which base weights."""

    run: RunFolder
    label: str
    rows: dict[Key, Row]
    places: dict[Key, int]
    model: str
    base: tuple


def pictures_section(runs: Sequence[ShownRun]) -> Markup:
    """Return the pictures that two or more runs drew for the same prompt and seed."""
    heading = tag("h2", "Pictures of the same prompts")
    drawn = [one for shown in runs if (one := _drawn(shown.run, shown.label))]
    counts: dict[Key, int] = {}
    for one in drawn:
        for key in one.rows:
            counts[key] = counts.get(key, 0) + 1
    common = sorted((key for key in counts if counts[key] > 1), key=lambda key: -counts[key])
    if not common:
        why = tag("p", NONE_IN_COMMON, class_="note") if len(drawn) > 1 else nothing_yet(NOT_YET, "compare")
        return tag("section", heading, why, [_alone(one) for one in drawn], id="pictures")
    width = 2 + 2 * len(drawn)
    keys = [common[i] for i in evenly_chosen(len(common), max(1, min(MAX_ROWS, MAX_PICTURES // width)))]
    cells = [_cells(key, drawn) for key in keys]
    flat = [file for row in cells for _, file in row]
    embedded = iter(embed_all(flat, EDGES_PX, BUDGET_BYTES, Work()))
    cards = [
        _card(key, drawn, [(label, next(embedded)) for label, _ in row]) for key, row in zip(keys, cells, strict=True)
    ]
    rest = cards[NUM_OPEN:]
    shown = f" Shown are {len(keys)} of {len(common):,}." if len(keys) < len(common) else ""
    return tag(
        "section",
        heading,
        tag("p", _note(drawn, keys) + shown, class_="note"),
        cards[:NUM_OPEN],
        details(counted(len(rest), "more prompt"), rest) if rest else None,
        id="pictures",
    )


def _alone(one: _Drawn) -> Markup:
    """Return a few prompts of one run: photograph, base and checkpoint."""
    keys = [list(one.rows)[place] for place in evenly_chosen(len(one.rows), NUM_ALONE)]
    cells = [_cells(key, [one]) for key in keys]
    embedded = iter(embed_all([file for row in cells for _, file in row], EDGES_PX, BUDGET_BYTES // 4, Work()))
    cards = [
        _card(key, [one], [(label, next(embedded)) for label, _ in row]) for key, row in zip(keys, cells, strict=True)
    ]
    return tag("div", tag("h3", one.label, " against its own base", dir="auto"), cards)


def _drawn(run: RunFolder, label: str) -> _Drawn | None:
    """Return a run's pictures by prompt and seed, None if it has none of a checkpoint."""
    comparison = run.comparison
    rows = compared_rows(run, comparison) if comparison else []
    rows = rows or sampled_rows(run)
    model = put_forward(run, {model for row in rows for model in row.files if model.startswith("step-")})
    if model is None:
        return None
    settings: tuple = ()
    weights = run.base
    if comparison:
        settings = (comparison.width, comparison.height, comparison.num_steps, comparison.cfg, comparison.sampler)
        settings += (comparison.negative_prompt,)
        weights = next((one.weights for one in comparison.models if one.id == BASE and one.weights), run.base)
    by_key = {(row.prompt, row.seed): row for row in reversed(rows) if row.files.get(model)}
    # in the order of the record
    by_key = {(row.prompt, row.seed): by_key[row.prompt, row.seed] for row in rows if (row.prompt, row.seed) in by_key}
    places = {(row.prompt, row.seed): row.place for row in comparison.rows} if comparison else {}
    return _Drawn(run, label, by_key, places, model, (weights, *settings))


def _cells(key: Key, drawn: Sequence[_Drawn]) -> list[tuple[str, Path | None]]:
    """Return the pictures of a row with their captions: photograph, base or bases, each run's checkpoint."""
    having = [one for one in drawn if key in one.rows]
    photos = [one.rows[key].files[PHOTO] for one in having if one.rows[key].files.get(PHOTO)]
    cells: list[tuple[str, Path | None]] = [("Photograph", photos[0])] if photos else []
    bases: dict[tuple, _Drawn] = {}
    for one in having:
        if one.rows[key].files.get(BASE):
            bases.setdefault((one.base, one.places.get(key)), one)
    for one in bases.values():
        of = f" of {one.label}" if len(bases) > 1 else ""
        name = "Untrained" if one.run.model.get("from_scratch") else "Base"
        cells.append((f"{name}{of}", one.rows[key].files[BASE]))
    return cells + [(f"{one.label}, {name_of(one.run, one.model)}", one.rows[key].files[one.model]) for one in having]


def _card(key: Key, drawn: Sequence[_Drawn], pictures: Sequence[tuple[str, object]]) -> Markup:
    prompt, seed = key
    row = next(one.rows[key] for one in drawn if key in one.rows)
    figures = []
    for label, picture in pictures:
        text = " — ".join([label, shorten(prompt, MAX_PROMPT_CHARACTERS)])
        image = picture.img(f"{label}: {shorten(prompt, 120)}") if picture else placeholder("missing or damaged")
        figures.append(tag("figure", image, tag("figcaption", label, dir="auto"), data_zoom=text if picture else None))
    caption = [
        prompt_markup(prompt, row.cut_after, MAX_PROMPT_CHARACTERS),
        tag("div", f"seed {seed}" if seed >= 0 else "", class_="meta"),
    ]
    return tag("div", tag("div", caption), tag("div", figures, class_="across"), class_="common")


def _note(drawn: Sequence[_Drawn], keys: Sequence[Key]) -> str:
    sizes = {one.base[1:3] for one in drawn}
    is_same_place = all(len({one.places.get(key) for one in drawn if key in one.rows}) == 1 for key in keys)
    settings = {one.base[1:] for one in drawn}
    noise = (
        "Each row is drawn from the same prompt and the same initial noise."
        if is_same_place and len(sizes) == 1 and all(one.places for one in drawn)
        else "Each row has the same prompt and seed; the initial noise may differ, as may what is where in the picture."
    )
    if len(settings) > 1:
        noise += " The runs draw with different settings (size, steps, cfg, sampler or negative prompt)."
    return f"{noise} Of each run its suggested checkpoint is shown, else that of lowest held-out loss, else the last."
