"""Pictures that resemble a training photograph: beside it, and beside what the base draws for the same prompt."""

from __future__ import annotations

from safelight.text import counted
from safelight.trainer.report.evaluation import Memorisation, NearestPhoto
from safelight.trainer.report.figures import Form
from safelight.trainer.report.markup import Markup, details, shorten, tag
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.pictures import embed_all
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder, inside
from safelight.trainer.report.theme import Part, asset

PART = Part(asset("memorisation_panel.css"))
TITLE = "Did it memorise photographs?"
MAX_PAIRS, NUM_OPEN, MAX_MODELS_SHOWN = 12, 4, 40
EDGES_PX = (320, 256, 192, 128)
BUDGET_BYTES = 2_000_000
SIMILARITY = Form(3)


def memorisation_section(run: RunFolder) -> Markup | None:
    """Return the pictures nearest to training photographs."""
    heading, found = tag("h2", TITLE), run.evaluation.memorisation if run.evaluation else None
    if found is None:
        return None
    first = put_forward(run, {pair.model for pair in found.pairs})
    pairs = sorted(found.pairs, key=lambda pair: (not pair.is_flagged, pair.model != first, -pair.similarity))
    pairs = pairs[:MAX_PAIRS]
    cards = _triples(run, pairs)
    return tag(
        "section",
        heading,
        tag("p", shorten(found.sentence, 1000)),
        tag("p", counts, class_="note") if (counts := _counts(run, found)) else None,
        tag("div", cards[:NUM_OPEN], class_="triples") if cards else None,
        details(counted(len(cards) - NUM_OPEN, "more pair"), tag("div", cards[NUM_OPEN:], class_="triples"))
        if len(cards) > NUM_OPEN
        else None,
        id="memorisation",
    )


def _counts(run: RunFolder, found: Memorisation) -> str:
    """Return how many pictures are flagged, and by which rule; "" if it could not be judged."""
    if not found.num_flagged:
        return ""
    flagged = [f"{num:,} of {name_of(run, model)}" for model, num in list(found.num_flagged.items())[:MAX_MODELS_SHOWN]]
    chance = "" if found.chance is None else f", which happens by chance to at most {100 * found.chance:.2g} %"
    return (
        f"Flagged, of up to {counted(found.num, 'picture')} each: {', '.join(flagged)}. A picture is flagged if its "
        f"similarity to a training photograph is above {SIMILARITY.show(found.limit)}{chance}; similarity is by "
        f"{shorten(found.features, 120)}. No measure separates copies reliably: look at the pairs."
    )


def _triples(run: RunFolder, pairs: list[NearestPhoto]) -> list[Markup]:
    rows = run.comparison.rows if run.comparison else ()
    base_of = {file: row.images.get(BASE) for row in rows for file in row.images.values()}
    files = [
        path
        for pair in pairs
        for path in (
            inside(run.path, "compare", pair.file),
            inside(run.path, "evaluation", pair.photo),
            inside(run.path, "compare", base_of.get(pair.file)),
        )
    ]
    pictures = embed_all(files, EDGES_PX, BUDGET_BYTES, run.work)
    cards = []
    for index, pair in enumerate(pairs):
        drawn, photo, base = pictures[3 * index : 3 * index + 3]
        if drawn is None or photo is None:
            continue
        prompt, name = shorten(pair.prompt, 160), name_of(run, pair.model)
        like_base = "" if pair.base_similarity is None else f", base {SIMILARITY.show(pair.base_similarity)}"
        near = "nearest photograph, mirrored" if pair.is_mirrored else "nearest photograph"
        shown = [(drawn, name, "accent"), (photo, near, "")]
        if base and pair.model != BASE:
            shown.append((base, "base", ""))
        sides = [
            tag(
                "figure",
                tag("figcaption", label, class_=color or None),
                picture.img(f"{label}: {prompt}", data_label=label),
            )
            for picture, label, color in shown
        ]
        flag = tag("strong", "flagged · ", class_="put-forward") if pair.is_flagged else None
        text = f"similarity {SIMILARITY.show(pair.similarity)}{like_base}"
        caption = tag(
            "figcaption", flag, text, tag("div", tag("span", prompt, class_="prompt", dir="auto")), class_="meta"
        )
        zoom = f"{shorten(pair.prompt, 400)} — {text}"
        cards.append(tag("figure", tag("div", sides, class_="three"), caption, data_zoom=zoom))
    return cards
