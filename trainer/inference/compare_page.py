"""RUN/compare/index.html: a comparison's pictures beside each other, and links to their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import safelight
from safelight.data.atomic import atomic_write_text
from safelight.trainer.inference.gallery import MAX_PROMPT_CHARS, PAGE_NAME, relative_url
from safelight.trainer.registry.samplers import title_of
from safelight.trainer.report.comparison import ComparedRow, Comparison
from safelight.trainer.report.facts import evenly_chosen
from safelight.trainer.report.markup import Markup, join, prompt_markup, shorten, tag
from safelight.trainer.report.pictures import Picture, Work, embed_all, placeholder
from safelight.trainer.report.theme import page

MAX_SHOWN = 240
EDGES_PX = (512, 384, 256, 192, 160, 112)
BUDGET_BYTES = 12_000_000


def write_comparison_page(
    folder: Path, title: str, comparison: Comparison, labels: Mapping[str, str], sheets: Sequence[str]
) -> None:
    """Write the page: a row for each prompt and seed, a column for each model. It can be sent alone.

    labels: of each model, in lines. sheets: the contact sheets, which are linked.
    """
    rows, models = comparison.rows, comparison.models
    has_photos, has_seeds = any(row.photo for row in rows), len({row.seed for row in rows}) > 1
    num_columns = len(models) + has_photos
    chosen = [rows[number] for number in evenly_chosen(len(rows), max(1, MAX_SHOWN // num_columns))]
    heads = [labels[model.id] for model in models] + ["photograph"] * has_photos
    files = [_files(row, comparison, has_photos) for row in chosen]
    paths = [folder / file if file else None for row_files in files for file in row_files]
    pictures = iter(embed_all(paths, EDGES_PX, BUDGET_BYTES, Work()))
    body = []
    for row, row_files in zip(chosen, files, strict=True):
        about = [f"seed {row.seed}"] * has_seeds + ["caption of a held-out photograph"] * row.held_out
        prompt = prompt_markup(row.prompt, row.cut_after, MAX_PROMPT_CHARS)
        caption = join(prompt, " ", tag("span", ", ".join(about), class_="meta"))
        body.append(
            tag("tr", tag("th", tag("div", caption, class_="prompt-row"), colspan=num_columns, scope="rowgroup"))
        )
        shown = zip(heads, row_files, islice(pictures, num_columns), strict=True)
        body.append(
            tag(
                "tr",
                [
                    tag("td", _figure(row, *cell), data_label=cell[0].partition("\n")[0]) if cell[1] else tag("td")
                    for cell in shown
                ],
            )
        )
    head = [tag("th", [tag("div", line) for line in label.split("\n")], scope="col") for label in heads]
    table = tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_="strip")
    html = page(
        title,
        tag("header", tag("h1", title), tag("p", _note(comparison, len(chosen), sheets), class_="note")),
        tag("main", tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Pictures by prompt")),
        tag("footer", f"Written by Safelight {safelight.__version__}."),
    )
    atomic_write_text(folder / PAGE_NAME, html)


def _files(row: ComparedRow, comparison: Comparison, has_photos: bool) -> list[str]:
    return [row.images[model.id] for model in comparison.models] + [row.photo] * has_photos


def _figure(row: ComparedRow, head: str, file: str, picture: Picture | None) -> Markup:
    head = head.replace("\n", ", ")
    content = placeholder("missing") if picture is None else picture.img(f"{head}: {shorten(row.prompt, 120)}")
    zoom = f"{shorten(row.prompt, MAX_PROMPT_CHARS)} — {head}, seed {row.seed}"
    link = tag("a", "full size", href=relative_url(file), class_="meta")
    return tag("div", tag("div", content, data_zoom=zoom if picture else None), link)


def _note(comparison: Comparison, num_shown: int, sheets: Sequence[str]) -> Markup:
    sampler = title_of(comparison.sampler)
    against = f", negative prompt “{shorten(comparison.negative_prompt, 80)}”" if comparison.negative_prompt else ""
    note = (
        "All models of a row start from the same noise, so what differs comes from the model. "
        f"{sampler}, {comparison.num_steps} steps, cfg {comparison.cfg:g}{against}."
    )
    num_photos = sum(bool(row.photo) for row in comparison.rows)
    if num_photos:
        where = "" if num_photos == len(comparison.rows) else f", of {num_photos:,} of {len(comparison.rows):,} rows,"
        note += f" The photograph{where} is the one that has the prompt as its caption."
    if num_shown < len(comparison.rows):
        note += f" Shown are {num_shown} of {len(comparison.rows)} rows."
    links = [join(" ", tag("a", sheet, href=relative_url(sheet))) for sheet in sheets]
    return join(note, " All of them:", links, ".")
