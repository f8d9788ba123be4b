"""Where pictures burn or lose their detail: the scores' distributions beside photographs', and the worst pictures."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.trainer.report.bars import Axis, distribution_bar, show_number
from safelight.trainer.report.evaluation import REAL, Burn, ShownPicture
from safelight.trainer.report.facts import evenly_chosen
from safelight.trainer.report.markup import Markup, details, join, shorten, table, tag
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
LEGEND = (
    "A block holds the middle half of the pictures and its gap the median; the line goes from 5 % to 95 %. The dashed "
    "line is the limit that few real photographs exceed; the share of pictures beyond it stands beside, with its "
    "interval, and in red where chance does not explain it."
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
        _distributions(run, burn, model) if burn.sets else None,
        tag("p", LEGEND, class_="note") if burn.sets else None,
        _worst(run, "Most burnt", burn.worst_burnt, model),
        _worst(run, "Most smoothed out", burn.worst_smoothed, model),
        id="burn",
    )


def _distributions(run: RunFolder, burn: Burn, model: str | None) -> Markup:
    ordered = sorted(burn.sets, key=lambda one: one.model != REAL)
    places = set(evenly_chosen(len(ordered), MAX_SETS))
    places |= {place for place, one in enumerate(ordered) if one.model in (BASE, model)}
    shown = [ordered[place] for place in sorted(places)[: 2 * MAX_SETS]]
    limits = (burn.limit_burnt, burn.limit_smoothed)
    axes = [
        Axis.over([*(q for one in shown for q in getattr(one, name)), *([] if limit is None else [limit])])
        for name, limit in zip(("burnt", "smoothed"), limits, strict=True)
    ]
    one_cfg = len({one.cfg for one in shown if one.model != REAL}) < 2
    rows = []
    for one in shown:
        color = "amber" if one.model == REAL else "accent" if one.model == model else "muted"
        name = "real photographs" if one.model == REAL else _model_name(run, one.model)
        cfg = "" if one_cfg or one.model == REAL else f", cfg {one.cfg:g}"
        rows.append(
            [
                tag("span", shorten(name, 60), cfg, class_="put-forward" if one.model == model else None),
                distribution_bar(axes[0], one.burnt, color, limits[0]),
                _share(one.share_burnt, one.burnt_interval, one.is_burnt),
                distribution_bar(axes[1], one.smoothed, color, limits[1]),
                _share(one.share_smoothed, one.smoothed_interval, one.is_smoothed),
                f"{one.num:,}",
            ]
        )
    head = ["", "burnt", "share", "smoothed out", "share", "pictures"]
    return table(head, rows, class_="figures burn")


def _share(share: float, interval: tuple[float, float] | None, is_more: bool) -> Markup:
    text = tag("span", f"{100 * share:.0f} %", class_="put-forward" if is_more else None)
    if interval is None:
        return text
    low, high = (100 * value for value in interval)
    return join(text, tag("span", f" {low:.0f} to {high:.0f}", class_="meta"))


def _model_name(run: RunFolder, model: str) -> str:
    return name_of(run, model) if model == BASE or model.startswith("step-") else model


def _worst(run: RunFolder, title: str, shown: Sequence[ShownPicture], model: str | None) -> Markup | None:
    """Return the worst pictures of the model that is put forward, and those of the others folded."""
    own = [one for one in shown if one.model == model][:MAX_WORST]
    others = [one for one in shown if one.model != model][:MAX_WORST]
    cards = _cards(run, title, [*own, *others])
    own_cards, other_cards = (list(filter(None, part)) for part in (cards[: len(own)], cards[len(own) :]))
    if not own_cards and not other_cards:
        return None
    return join(
        tag("h3", f"{title} of {name_of(run, model)}" if own_cards and model else title),
        tag("div", own_cards or other_cards, class_="thumbs"),
        details("Of the other models", tag("div", other_cards, class_="thumbs")) if own_cards and other_cards else None,
    )


def _cards(run: RunFolder, title: str, shown: Sequence[ShownPicture]) -> list[Markup | None]:
    files = [inside(run.path, "compare", one.file) for one in shown]
    pictures = embed_all(files, EDGES_PX, BUDGET_BYTES // 2, run.work)
    cards: list[Markup | None] = []
    for one, picture in zip(shown, pictures, strict=True):
        if picture is None:
            cards.append(None)
            continue
        prompt = shorten(one.prompt, 120)
        parts = [shorten(_model_name(run, one.model), 60)]
        parts += [] if one.cfg is None else [f"cfg {one.cfg:g}"]
        text = " · ".join([*parts, f"score {show_number(one.score)}", *([one.why] if one.why else [])])
        caption = tag("figcaption", tag("div", text), tag("span", prompt, class_="prompt", dir="auto"))
        image = picture.img(f"{title}: {prompt}")
        cards.append(tag("figure", image, caption, data_zoom=f"{shorten(one.prompt, 400)} — {text}"))
    return cards
