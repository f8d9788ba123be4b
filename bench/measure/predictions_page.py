"""The page of `safelight bench report`: goals, and what was predicted beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from safelight.bench.measure.goals import UNITS, Goal
from safelight.bench.measure.predictions import MEMORY, SECTIONS, SPEED, Row
from safelight.text import counted, printable
from safelight.trainer.report.build import MARK
from safelight.trainer.report.markup import Markup, empty_state, join, table, tag
from safelight.trainer.report.theme import page

COLUMNS = ("figure", "unit", "predicted", "measured", "measured / predicted")
GOAL_COLUMNS = ("goal", "unit", "published", "must", "stretch", "measured", "reached")


def figure(value: float | None) -> str:
    """Return a figure with three digits, `12,300` or `0.0123`."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Row) -> tuple[str, ...]:
    """Return a row of a table under COLUMNS."""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    measured = "out of memory" if row.measured is None else figure(row.measured)
    return row.what, row.unit, figure(row.predicted), measured, ratio


def goal_cells(goal: Goal, measured: float | None) -> tuple[str, ...]:
    """Return a row of a table under GOAL_COLUMNS."""
    published = figure(goal.published) if goal.published else ""
    name = f"{goal.card}, {goal.what}" if goal.card else goal.what
    verdict = goal.verdict(measured)
    return name, UNITS[goal.of], published, f"{goal.must:g}", f"{goal.stretch:g}", figure(measured), verdict


def _tile(name: str, value: str, unit: str) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value, " ", tag("small", unit), class_="value"))


def _tiles(rows: Sequence[Row], goals: Sequence[tuple[Goal, float | None]]) -> Markup:
    verdicts = [goal.verdict(measured) for goal, measured in goals]
    num_measured = len(verdicts) - verdicts.count("not measured")
    num_reached = verdicts.count("must") + verdicts.count("stretch")
    reached = (str(num_reached), f"of {num_measured} measured") if num_measured else ("–", "not measured")
    items = [_tile("Goals reached", *reached)]
    for name, section in (("Speed, measured / predicted", SPEED), ("Memory, measured / predicted", MEMORY)):
        ratios = [row.ratio for row in rows if row.section == section and row.ratio is not None]
        middle = f"{statistics.median(ratios):.2f}" if ratios else "–"
        items.append(_tile(name, middle, f"median of {len(ratios)}" if ratios else "not measured"))
    return tag("dl", items, class_=f"tiles of-{len(items)}")


def _goals(goals: Sequence[tuple[Goal, float | None]]) -> Markup:
    note = "The best of the steps that measure each; peaks include the CUDA context. Published figures are others'."
    rows = [goal_cells(goal, measured) for goal, measured in goals]
    return tag(
        "section",
        tag("h2", "Goals"),
        tag("p", note, class_="note"),
        table(GOAL_COLUMNS, rows, class_="figures of-class"),
        id="goals",
    )


def _section(number: int, name: str, rows: Sequence[Row]) -> Markup:
    return tag(
        "section",
        tag("h2", name),
        tag("p", SECTIONS[name], class_="note"),
        table(COLUMNS, map(cells, rows), label=name, class_="figures of-class"),
        id=f"predicted-{number}",
    )


def _not_measured(notes: Sequence[tuple[str, str]]) -> Markup | None:
    if not notes:
        return None
    return tag("section", tag("h2", "Not measured"), table(("part", "why"), notes), id="not-measured")


def render(
    rows: Sequence[Row],
    goals: Sequence[tuple[Goal, float | None]],
    devices: Sequence[str],
    versions: str,
    notes: Sequence[tuple[str, str]],
) -> str:
    """Return the page as HTML.

    goals: each with its measured figure. devices: that the lines were measured on. versions: of the code and its
    libraries. notes: (part, why it was not measured).
    """
    title = f"Predicted and measured: {', '.join(devices) or 'no device'}"
    by_section = {name: [row for row in rows if row.section == name] for name in SECTIONS}
    sections = [_section(n, name, own) for n, (name, own) in enumerate(by_section.items()) if own]
    nothing = tag("section", empty_state("No figure in these results was predicted.")) if not sections else None
    header = tag(
        "header",
        tag("div", Markup(MARK), "Safelight · benchmarks", class_="mark"),
        tag("h1", printable(title)),
        tag("p", f"{counted(len(rows), 'figure')} that had been predicted; measured with {versions}", class_="sub"),
        _tiles(rows, goals),
    )
    main = tag("main", _goals(goals), nothing, sections, _not_measured(notes))
    return page(printable(title), join(header, main, tag("footer", "Written by safelight bench report.")))
