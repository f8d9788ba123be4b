"""Where pictures burn or lose their detail: the scores' distributions beside photographs', and the worst pictures."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.trainer.report.bars import Axis, distribution_bar
from safelight.trainer.report.evaluation import (
    FAULTS,
    REAL,
    Burn,
    BurnScores,
    Fault,
    ShownPicture,
    is_worse_than_base,
    num_over,
)
from safelight.trainer.report.figures import Form
from safelight.trainer.report.markup import Markup, details, join, kept_together, shorten, table, tag
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.pictures import embed_all
from safelight.trainer.report.records import BASE
from safelight.trainer.report.run_reader import RunFolder, inside
from safelight.trainer.report.theme import Part, asset

PART = Part(asset("burn_panel.css"))
TITLE = "Burnt or smoothed out?"
MAX_WORST = 6
EDGES_PX = (320, 256, 192, 128)
BUDGET_BYTES = 1_500_000
SCORE = Form(2)
LEGEND = (
    "A block holds the middle half of the pictures and its gap the median; the line goes from 5 % to 95 %. The dashed "
    "line is the limit that few real photographs exceed; how many pictures are beyond it stands beside, with the "
    "interval of their share, and in red where chance does not explain it. The check knows pixels, not prompts: pure "
    "colours that a prompt asks for, as in flat drawings, count as well, so look at the pictures below."
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
        tag("p", told) if model and (told := _against_base(run, burn, model)) else None,
        _distributions(run, burn, model) if burn.sets else None,
        tag("p", LEGEND, class_="note") if burn.sets else None,
        _worst(run, "burnt", burn.worst_burnt, burn.limit_burnt, model),
        _worst(run, "smoothed", burn.worst_smoothed, burn.limit_smoothed, model),
        id="burn",
    )


def _against_base(run: RunFolder, burn: Burn, model: str) -> str:
    """Return whether training made pictures burn or lose their detail, against the base at the same cfg."""
    of = {one.model: one for one in burn.sets if one.model != REAL and one.cfg == run.evaluation.cfg}
    own, base = of.get(model), of.get(BASE)
    if not own or not base or own is base:
        return ""
    said, name = [], name_of(run, model)
    for score, what in (("burnt", "burnt"), ("smoothed", "smoothed out")):
        counts = f"{num_over(own, score)} of {own.num} by {name}, {num_over(base, score)} of {base.num} by the base"
        if is_worse_than_base(own, base, score):
            said.append(f"Training made more pictures look {what}: {counts}.")
        elif getattr(own, f"is_{score}"):
            noise = ", a difference within noise" if num_over(own, score) > num_over(base, score) else ""
            said.append(f"That pictures look {what} was not added by training: {counts}{noise}.")
    return " ".join(said)


def _distributions(run: RunFolder, burn: Burn, model: str | None) -> Markup:
    """Return a table of the sets at the evaluation's guidance scale, and one of those at other scales, folded."""
    ordered = sorted(burn.sets, key=lambda one: one.model != REAL)
    limits = (burn.limit_burnt, burn.limit_smoothed)
    axes = [
        Axis.over([*(q for one in ordered for q in getattr(one, name)), *([] if limit is None else [limit])])
        for name, limit in zip(("burnt", "smoothed"), limits, strict=True)
    ]
    others = [one for one in ordered if one.model != REAL and one.cfg != run.evaluation.cfg]
    own = [one for one in ordered if one.model == REAL or one.cfg == run.evaluation.cfg]

    def table_of(sets: Sequence[BurnScores], label: str) -> Markup:
        rows = [_row(run, one, axes, limits, model, has_cfg=bool(others)) for one in sets]
        return table(["", "burnt", "pictures", "smoothed out", "pictures"], rows, label, class_="figures burn")

    label = "burnt and smoothed-out pictures of each model"
    if not others or all(one.model == REAL for one in own):
        return table_of(ordered, label)
    scales = ", ".join(f"{cfg:g}" for cfg in dict.fromkeys(one.cfg for one in others))
    elsewhere = f"At other guidance scales: cfg {shorten(scales, 200)}"
    return join(table_of(own, label), details(elsewhere, table_of(others, elsewhere)))


def _row(
    run: RunFolder,
    one: BurnScores,
    axes: Sequence[Axis],
    limits: Sequence[float | None],
    model: str | None,
    has_cfg: bool,
) -> list[object]:
    color = "amber" if one.model == REAL else "accent" if one.model == model else "muted"
    name = "real photographs" if one.model == REAL else _model_name(run, one.model)
    cfg = f", cfg {one.cfg:g}" if has_cfg and one.model != REAL else ""
    return [
        tag("span", shorten(name, 60), cfg, class_="put-forward" if one.model == model else None),
        distribution_bar(axes[0], one.burnt, color, limits[0]),
        _share(one, "burnt"),
        distribution_bar(axes[1], one.smoothed, color, limits[1]),
        _share(one, "smoothed"),
    ]


def _share(one: BurnScores, score: str) -> Markup:
    """Return how many of the pictures are beyond a score's limit, with the interval of the share in per cent."""
    interval = getattr(one, f"{score}_interval")
    is_more = getattr(one, f"is_{score}")
    text = tag("span", f"{num_over(one, score):,} of {one.num:,}", class_="put-forward" if is_more else None)
    if interval is None:
        return text
    low, high = (100 * value for value in interval)
    return join(text, tag("span", kept_together(f" {low:.0f} to {high:.0f} %"), class_="meta"))


def _model_name(run: RunFolder, model: str) -> str:
    return name_of(run, model) if model == BASE or model.startswith("step-") else model


def _worst(
    run: RunFolder, score: Fault, shown: Sequence[ShownPicture], limit: float | None, model: str | None
) -> Markup | None:
    """Return the worst pictures of the model that is put forward, one a prompt, and others folded.

    Its own are those at the guidance scale of the evaluation, as in the open table.
    """
    cfg, word = run.evaluation.cfg, FAULTS[score]
    mine = [one for one in shown if one.model == model and one.cfg in (None, cfg)]
    own = _one_a_prompt(mine)
    others = _one_a_prompt([one for one in shown if one not in mine])
    cards = _cards(run, f"Most {word}", [*own, *others])
    own_cards, other_cards = (list(filter(None, part)) for part in (cards[: len(own)], cards[len(own) :]))
    if not own_cards and not other_cards:
        return None
    of = f" of {name_of(run, model)}" if own_cards and model else ""
    title, note = f"Most {word}{of}", None
    if limit is not None:
        judged = [one for one in run.evaluation.burn.sets if one.model == model and one.cfg == cfg]
        note = f"A picture counts as {word} above a score of {SCORE.show(limit)}."
        if own_cards and judged:
            note += (
                f" At cfg {cfg:g}, {num_over(judged[0], score):,} of {judged[0].num:,} do; shown are the highest "
                "scores, one a prompt."
            )
        above = sum(one.score > limit for one in (own if own_cards else others))
        if not above:
            title = f"Nearest to the limit for {word}{of and ','}{of}"
            note = f"None exceeds the limit, {SCORE.show(limit)}: these are not {word}, only the highest scores."
    return join(
        tag("h3", title),
        tag("p", note, class_="note") if note else None,
        tag("div", own_cards or other_cards, class_="thumbs"),
        details("Of other models and guidance scales", tag("div", other_cards, class_="thumbs"))
        if own_cards and other_cards
        else None,
    )


def _one_a_prompt(shown: Sequence[ShownPicture]) -> list[ShownPicture]:
    """Return the worst picture of each prompt, the worst first."""
    worst: dict[str, ShownPicture] = {}
    for one in sorted(shown, key=lambda one: -one.score):
        worst.setdefault(one.prompt, one)
    return list(worst.values())[:MAX_WORST]


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
        text = " · ".join([*parts, f"score {SCORE.show(one.score)}", *([one.why] if one.why else [])])
        caption = tag("figcaption", tag("div", text), tag("span", prompt, class_="prompt", dir="auto"))
        image = picture.img(f"{title}: {prompt}")
        cards.append(tag("figure", image, caption, data_zoom=f"{shorten(one.prompt, 400)} — {text}"))
    return cards
