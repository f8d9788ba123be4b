"""Scores of a run whose pictures can be judged by a rule: `safelight demo` writes them to scores.json."""

import math

from safelight.text import counted
from safelight.trainer.report.figures import Form, form_of
from safelight.trainer.report.markup import Markup, join, shorten, table, tag
from safelight.trainer.report.run_reader import number, rows_of

MAX_SCORES = 100


def scores_table(scores: dict | None) -> Markup | None:
    """Return the scores of base and trained model with their intervals, None if the run has none."""
    rows = rows_of(scores, "rows")[:MAX_SCORES]
    if not rows:
        return None
    interval = shorten(scores.get("interval") or "interval", 40)
    num_samples = number(scores.get("num_samples"))
    on = "" if not math.isfinite(num_samples) else f" on {counted(int(num_samples), 'generated image')}"
    body = [
        [
            [shorten(row.get("what", ""), 120), tag("div", shorten(row.get("explanation") or "", 300), class_="meta")],
            _interval_bars(row),
            # a phone shows no table header, so each value carries its own label there
            *(
                join(tag("span", side, class_="side"), _estimate(row.get(side), form, signed=side == "difference"))
                for side in ("base", "trained", "difference")
            ),
        ]
        for row in rows
        for form in [_form(row)]
    ]
    notes = scores.get("notes")
    notes = notes[:MAX_SCORES] if isinstance(notes, list) else []
    key = [
        tag(
            "li",
            Markup('<svg viewBox="0 0 24 10" aria-hidden="true"><circle class="f-muted" cx="12" cy="5" r="4"/></svg>'),
            "base",
        ),
        tag(
            "li",
            Markup('<svg viewBox="0 0 24 10" aria-hidden="true"><circle class="f-accent" cx="12" cy="5" r="4"/></svg>'),
            "trained",
        ),
        tag(
            "li",
            Markup(
                '<svg viewBox="0 0 24 10" aria-hidden="true">'
                '<path class="s-muted" stroke-dasharray="2 2" d="M12 0V10"/></svg>'
            ),
            "chance level",
        ),
    ]
    return join(
        tag("h3", f"Measured{on}"),
        tag("ul", key, class_="legend"),
        table(["", f"with the {interval} interval", "base", "trained", "difference"], body, "scores", class_="scores"),
        [
            tag("p", shorten(note, 400), class_="note")
            for note in (notes[:MAX_SCORES] if isinstance(notes, list) else [])
        ],
    )


def scores_sentence(scores: dict | None) -> str:
    """Return which scores changed beyond chance, from what to what, and which did not; "" if the run has none."""
    changed, unclear = [], []
    for row in rows_of(scores, "rows")[:MAX_SCORES]:
        form, what = _form(row, most=2), shorten(row.get("what", ""), 60)
        (base, *_), (trained, *_), (_, low, high) = (
            _three(row.get(side)) for side in ("base", "trained", "difference")
        )
        if not all(map(math.isfinite, (base, trained, low, high))):
            continue
        if low <= 0 <= high:
            unclear.append(what)
        else:
            moved = "rose" if trained > base else "fell"
            changed.append(f"{what} {moved} from {form.show(base)} to {form.show(trained)}")
    parts = [", ".join(changed), f"no clear change in {', '.join(unclear)}" if unclear else ""]
    said = "; ".join(filter(None, parts))
    return f"Scored by rules: {said}." if said else ""


def _form(row: dict, most: int | None = None) -> Form:
    estimates = [_three(row.get(side)) for side in ("base", "trained", "difference")]
    return form_of([mean for mean, _, _ in estimates], [(low, high) for _, low, high in estimates], most=most)


def _estimate(values: object, form: Form, signed: bool = False) -> Markup:
    mean, low, high = _three(values)
    if math.isnan(mean):
        return tag("span", "not measured", class_="meta")
    texts = [form.show(value, signed) for value in (mean, low, high)]
    return join(tag("strong", texts[0]), tag("div", f"{texts[1]} to {texts[2]}", class_="meta nowrap"))


def _three(values: object) -> tuple[float, float, float]:
    if isinstance(values, list) and len(values) == 3:
        return tuple(number(value) for value in values)
    return (math.nan, math.nan, math.nan)


def _interval_bars(row: dict) -> Markup:
    """Return base and trained as points with their intervals, on an axis from 0 to 1, or over their range if larger."""
    base, trained, chance = _three(row.get("base")), _three(row.get("trained")), number(row.get("chance"))
    known = [value for value in (*base, *trained, chance) if math.isfinite(value)]
    if not known:
        return Markup("")
    low, high = (0.0, 1.0) if min(known) >= 0 and max(known) <= 1 else (min(known), max(known))
    scale = 200 / ((high - low) or 1)

    def x(value: float) -> str:
        return f"{10 + (value - low) * scale:.1f}"

    parts = ['<path class="s-grid" d="M10 36H210"/>']
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(
            f'<text class="f-muted" font-size="11" x="{x(value)}" y="48" text-anchor="{anchor}">{value:g}</text>'
        )
    if math.isfinite(chance):
        parts.append(f'<path class="s-muted" stroke-dasharray="2 2" d="M{x(chance)} 2V36"/>')
    for (mean, left, right), y, name in ((base, 11, "muted"), (trained, 26, "accent")):
        if math.isfinite(mean + left + right):
            parts.append(f'<path class="s-{name}" stroke-width="2" d="M{x(left)} {y}H{x(right)}"/>')
            parts.append(f'<circle class="f-{name}" cx="{x(mean)}" cy="{y}" r="4"/>')
    return Markup(f'<svg viewBox="0 0 220 50" aria-hidden="true">{"".join(parts)}</svg>')
