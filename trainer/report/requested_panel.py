"""The report's section on pictures that were asked for while the run trained: the newest ones, by prompt."""

from __future__ import annotations

from safelight.text import counted
from safelight.trainer.report.markup import Markup, join, prompt_markup, shorten, tag
from safelight.trainer.report.pictures import embed_all
from safelight.trainer.report.requested_record import FOLDER, RequestedPicture
from safelight.trainer.report.run_reader import RunFolder, averages_note, inside
from safelight.trainer.report.samples import EDGES_PX, MAX_PROMPT_CHARACTERS, key_of, settings_markup

MAX_SHOWN = 48
BUDGET_BYTES = 2_000_000


def requested_section(run: RunFolder) -> Markup | None:
    """Return a strip of pictures for each prompt that was asked for; None if nothing was."""
    shown = run.requested[-MAX_SHOWN:]
    if not shown:
        return None
    files = [inside(run.path, FOLDER, picture.file) for picture in shown]
    embedded = embed_all(files, EDGES_PX, BUDGET_BYTES, run.work)
    strips: dict[tuple, list[Markup]] = {}
    cuts: dict[tuple, str] = {}
    for picture, image in zip(shown, embedded, strict=True):
        if image is None:
            continue
        key = key_of(picture.model_dump())
        where = f"step {picture.step:,}"
        zoom = f"{shorten(picture.prompt, MAX_PROMPT_CHARACTERS)} — {where}, seed {picture.seed}"
        img = image.img(f"{where}: {shorten(picture.prompt, 120)}", data_label=where)
        strips.setdefault(key, []).append(tag("li", tag("span", where, class_="epoch"), img, data_zoom=zoom))
        cuts.setdefault(key, picture.cut_after)
    figures = [
        tag(
            "figure",
            tag("figcaption", prompt_markup(key[0], cuts[key], MAX_PROMPT_CHARACTERS), " ", settings_markup(key)),
            tag(
                "ol",
                pictures,
                class_="frames requested",
                tabindex="0",
                role="region",
                aria_label=f"Pictures drawn on request: {shorten(key[0], 120)}, seed {key[1]}",
            ),
            class_="sampled",
        )
        for key, pictures in strips.items()
    ]
    note = _note(run, shown, sum(map(len, strips.values())))
    return tag("section", tag("h2", "Drawn on request"), tag("p", note, class_="note"), figures, id="requested")


def _note(run: RunFolder, shown: tuple[RequestedPicture, ...], num_found: int) -> Markup:
    total = len(run.requested)
    newest = f", of which the newest {len(shown)} are shown" if len(shown) < total else ""
    missing = len(shown) - num_found
    lost = f" {missing:,} of them {'is' if missing == 1 else 'are'} missing or damaged." if missing else ""
    return join(
        tag("code", "safelight sample RUN --live"),
        f" asked for {counted(total, 'picture')}{newest}; all in full size, with their settings: {FOLDER}/index.html.",
        averages_note(run, "They use"),
        lost,
    )
