"""Where pictures burn or lose their detail: the scores' distributions beside photographs', and the worst pictures."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.trainer.report.bars import Axis, distribution_bar, show_number
from safelight.trainer.report.evaluation import BurnScores, ShownPicture
from safelight.trainer.report.facts import evenly_chosen
from safelight.trainer.report.markup import Markup, shorten, table, tag
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.pictures import embed_all
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder, inside
from safelight.trainer.report.theme import Part, asset

PART = Part(asset("burn_panel.css"))
TITLE = "Burnt or smoothed out?"
MAX_SETS = 16
MAX_WORST = 6
EDGES_PX = (320, 256, 192, 128)
BUDGET_BYTES = 1_500_000
REAL = "real"
LEGEND = (
    "A block holds the middle half of the pictures and its gap the median; the line goes from 5 % to 95 %. "
    "The share is of pictures beyond the limit that 95 % of photographs keep."
)


def burn_section(run: RunFolder) -> Markup | None:
    """Return how burnt and how smoothed out the pictures of each model are, against photographs."""
    heading, burn = tag("h2", TITLE), run.evaluation.burn if run.evaluation else None
    if burn is None:
        return None
    model = put_forward(run, [one.id for one in run.evaluation.models])
    return tag(
        "section",
        heading,
        tag("p", shorten(burn.sentence, 1000)),
        _distributions(run, burn.sets, model) if burn.sets else None,
        tag("p", LEGEND, class_="note") if burn.sets else None,
        _worst(run, "Most burnt", burn.worst_burnt),
        _worst(run, "Most smoothed out", burn.worst_smoothed),
        id="burn",
    )


def _distributions(run: RunFolder, sets: Sequence[BurnScores], model: str | None) -> Markup:
    ordered = sorted(sets, key=lambda one: one.model != REAL)
    places = evenly_chosen(len(ordered), MAX_SETS)
    shown = [ordered[place] for place in places]
    axes = [Axis.over(q for one in shown for q in getattr(one, name)) for name in ("burnt", "smoothed")]
    one_cfg = len({one.cfg for one in shown if one.model != REAL}) < 2
    rows = []
    for one in shown:
        color = "amber" if one.model == REAL else "accent" if one.model == model else "muted"
        name = "real photographs" if one.model == REAL else _model_name(run, one.model)
        cfg = "" if one_cfg or one.model == REAL else f", cfg {one.cfg:g}"
        rows.append(
            [
                tag("span", shorten(name, 60), cfg, class_="put-forward" if one.model == model else None),
                distribution_bar(axes[0], one.burnt, color),
                _share(one.share_burnt),
                distribution_bar(axes[1], one.smoothed, color),
                _share(one.share_smoothed),
                f"{one.num:,}",
            ]
        )
    head = ["", "burnt", "share", "smoothed out", "share", "pictures"]
    return table(head, rows, class_="figures burn")


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"


def _model_name(run: RunFolder, model: str) -> str:
    return name_of(run, model) if model == BASE or model.startswith("step-") else model


def _worst(run: RunFolder, title: str, shown: Sequence[ShownPicture]) -> Markup | None:
    shown = shown[:MAX_WORST]
    files = [inside(run.path, "compare", one.file) for one in shown]
    pictures = embed_all(files, EDGES_PX, BUDGET_BYTES // 2, run.work)
    cards = []
    for one, picture in zip(shown, pictures, strict=True):
        if picture is None:
            continue
        name = _model_name(run, one.model)
        prompt = shorten(one.prompt, 120)
        text = f"{shorten(name, 60)} · score {show_number(one.score)}"
        image = picture.img(f"{title}: {prompt}")
        caption = tag("figcaption", tag("div", text), tag("span", prompt, class_="prompt", dir="auto"))
        cards.append(tag("figure", image, caption, data_zoom=f"{shorten(one.prompt, 400)} — {text}"))
    if not cards:
        return None
    return tag("div", tag("h3", title), tag("div", cards, class_="thumbs"))
