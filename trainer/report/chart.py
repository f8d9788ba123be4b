"""Charts that a reader can zoom, point at and switch curves on: a figure whose data the page's script draws (uPlot).

`chart` returns the figure: title, curves that can be switched, plot, note, and a table as the plot's text alternative,
which is all there is without JavaScript. The data stands in an attribute, escaped, and bounded in size. A page with
charts has PART among its parts.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from safelight.trainer.report.figures import Form, form_of
from safelight.trainer.report.markup import Markup, details, tag
from safelight.trainer.report.markup import table as markup_table
from safelight.trainer.report.theme import Part, asset

# uPlot, unchanged, behind its licence, which asks to stand in every copy
PART = Part(
    css=asset("uplot/uPlot.min.css") + asset("chart.css"),
    js=f"/*! uPlot\n{asset('uplot/LICENSE')}*/\n" + asset("uplot/uPlot.iife.min.js") + asset("chart.js"),
)
# of a quantity in order, such as timestep bands: from light to dark
RAMP = tuple(f"ramp{i}" for i in range(1, 9))
# of things without an order, such as runs
DISTINCT = ("accent", "blue", "amber", "teal", "plum", "olive", "ink", "muted")
MAX_POINTS = 4000
# an axis whose highest value is below the first is written in powers of ten, down to the second
SMALL, TINY = 1e-2, 1e-30
# values farther apart than this factor are drawn on a logarithmic axis
LOG_FROM_RATIO = 5
# rows of a table that sums up longer curves
NUM_INTERVALS = 16
# digits of typical values: pointed at, and in the table
DIGITS_READ, DIGITS_IN_TABLE = 4, 5
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Curve:
    """A curve of a chart. x ascends; x, y, low and high are equally long; a y that is not finite is a gap.

    color: of theme.css or chart.css, such as one of DISTINCT or RAMP. look: "dots" has a dot per value, "raw" is thin
    and does not count for the range of the y axis, "steps" holds each value back to the x before it. low, high: of an
    interval, drawn as a whisker. is_shown: whether it is switched on at first.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "accent"
    look: Literal["line", "dots", "dashed", "raw", "steps"] = "line"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    is_shown: bool = True


def chart(
    title: str,
    curves: Sequence[Curve],
    alternative: Markup,
    *,
    detail: str = "",
    label: str = "",
    note: str = "",
    x_name: str = "epoch",
    group: str = "",
    unit: str = "",
    ticks: Sequence[str] | None = None,
    stages: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str]] = (),
    spans: Sequence[tuple[float, float, str]] = (),
    ring: tuple[float, float, str] | None = None,
    steps: Sequence[tuple[float, int]] = (),
    is_log: bool = False,
    from_zero: bool = False,
    is_small: bool = False,
) -> Markup:
    """Return a chart as a <figure>.

    alternative: the same in text, from `table_of` or a table of one's own. detail: what the y axis measures. label:
    for screen readers, default the title. unit: behind a value that is pointed at. ticks: names of x = 0, 1, 2 ...
    instead of an axis of numbers. stages: x at which something begins, and its name. marks: x at which something
    happened, and what. spans: (from, to, name) of x, every other one shaded. ring: (x, y, text) of a point to be
    marked. steps: known pairs (x, step), to tell a step for every x.
    All charts of a page with one group, by default one x_name, are zoomed, and pointed at, together.
    """
    highest = max((abs(y) for curve in curves for y in curve.y if math.isfinite(y)), default=0.0)
    power = math.floor(math.log10(1.01 * highest)) if TINY < highest < SMALL and not is_log else 0
    data = {
        "curves": [_curve_data(curve) for curve in curves],
        "x": x_name,
        "group": group or x_name,
        "unit": unit,
        "decimals": form_of_curves(curves, DIGITS_READ).decimals,
        "ticks": ticks,
        "stages": [[_short(x), name] for x, name in stages],
        "marks": [[_short(x), name] for x, name in marks],
        "spans": [[_short(low), _short(high), name] for low, high, name in spans],
        "ring": ring and [_short(ring[0]), _short(ring[1]), ring[2]],
        "steps": [[_short(x), step] for x, step in _knots(steps)],
        "log": is_log,
        "zero": from_zero,
        "power": power,
    }
    measures = [detail] * bool(detail) + ["log scale"] * is_log
    measures += [f"×10{str(power).translate(SUPERSCRIPTS)}"] * (power != 0)
    heading = [tag("strong", title), " ", tag("span", ", ".join(measures))] if measures else tag("strong", title)
    switches = [
        tag("li", tag("span", _swatch(curve), tag("span", curve.name), class_="curve"), tag("output", ""))
        for curve in curves
    ]
    return tag(
        "figure",
        tag("p", heading, class_="chart-title"),
        tag("ul", switches, class_="curves", hidden=True),
        tag(
            "div",
            tag("noscript", "This chart is drawn by JavaScript; the table below it has its values."),
            class_="plot",
            role="group",
            aria_label=label or title,
            tabindex="0",
        ),
        tag("figcaption", note) if note else None,
        alternative,
        class_="chart small" if is_small else "chart",
        data_chart=json.dumps(data, separators=(",", ":"), allow_nan=False),
    )


def figure_grid(*charts: Markup) -> Markup:
    """Return small charts, side by side where there is room."""
    return tag("div", *charts, class_="charts")


def form_of_curves(curves: Sequence[Curve], digits: int) -> Form:
    """Return how the values of a chart are written: by their intervals, else by typical values of the first curve.

    A typical value, and no extreme one, because a spike would take the digits of all others.
    """
    ends = [(curve.low, curve.high) for curve in curves if curve.low is not None and curve.high is not None]
    intervals = [interval for low, high in ends for interval in zip(low, high, strict=True)]
    if intervals:
        return form_of([y for curve in curves for y in curve.y], intervals)
    sizes = [abs(y) for y in curves[0].y if math.isfinite(y) and y] if curves else []
    return form_of([float(np.median(sizes))] if sizes else [], digits=digits)


def table_of(
    curves: Sequence[Curve], x_name: str = "epoch", is_change: bool = False, title: str = "these values"
) -> Markup:
    """Return the values of curves as a folded table: all of them if they are few, else the means of equal intervals.

    is_change: whether values have their sign.
    """
    form = functools.partial(form_of_curves(curves, DIGITS_IN_TABLE).show, signed=is_change)
    xs = sorted({x for curve in curves for x in curve.x})
    if len(xs) <= 2 * NUM_INTERVALS:
        found = [_cells(curve, form) for curve in curves]
        rows = [[f"{x:g}", *(cells.get(x, "–") for cells in found)] for x in xs]
        return details(
            f"Table of {title}", markup_table([x_name, *(c.name for c in curves)], rows, title, class_="figures")
        )
    edges = np.linspace(xs[0], xs[-1], NUM_INTERVALS + 1)
    rows = []
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        cells = []
        for curve in curves:
            x, y = np.asarray(curve.x, dtype=np.float64), np.asarray(curve.y, dtype=np.float64)
            cells.append(_cell(y[(x > low if index else x >= low) & (x <= high)].tolist(), form))
        rows.append([f"{low:.4g} to {high:.4g}", *cells])
    summary = f"Table of {title}: mean (lowest to highest) of {NUM_INTERVALS} equal parts"
    return details(summary, markup_table([x_name, *(c.name for c in curves)], rows, title, class_="figures"))


def is_wide(values: Sequence[float]) -> bool:
    """Return whether values are so far apart that a logarithmic axis shows them better."""
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and bool(0 < min(known) < max(known) / LOG_FROM_RATIO)


def thinned(y: Sequence[float], max_points: int = MAX_POINTS) -> list[int]:
    """Return ascending indices of at most max_points values: the lowest and the highest of equal parts.

    So no spike is lost. The first and the last value are among them, and one of every part without a finite value.
    """
    values = np.asarray(y, dtype=np.float64)
    if len(values) <= max_points:
        return list(range(len(values)))
    edges = np.linspace(0, len(values), max_points // 2).astype(int)
    chosen = {0, len(values) - 1}
    for low, high in itertools.pairwise(edges.tolist()):
        part = values[low:high]
        if np.isfinite(part).any():
            chosen |= {low + int(np.nanargmin(part)), low + int(np.nanargmax(part))}
        else:
            chosen.add(low)
    return sorted(chosen)


def _curve_data(curve: Curve) -> dict:
    y = [value if math.isfinite(value) else math.nan for value in curve.y]
    chosen = thinned(y)
    data = {
        "name": curve.name,
        "color": curve.color,
        "look": curve.look,
        "shown": curve.is_shown,
        "x": [_short(curve.x[i], 8) for i in chosen],
        "y": [_short(y[i]) for i in chosen],
    }
    if curve.low is not None and curve.high is not None:
        data |= {"low": [_short(curve.low[i]) for i in chosen], "high": [_short(curve.high[i]) for i in chosen]}
    return data


def _short(value: float, digits: int = 6) -> float | int | None:
    """Return a value with few digits, None if it is not finite: JSON has no NaN."""
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{digits}g}")
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def _knots(steps: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return the pairs at which the line through all pairs (x, step) bends, at most MAX_POINTS."""
    knots: list[tuple[float, int]] = []
    for (x0, s0), (x1, s1), (x2, s2) in zip(steps, steps[1:], steps[2:], strict=False):
        line = s0 + (s2 - s0) * (x1 - x0) / (x2 - x0) if x2 > x0 else s1
        if abs(line - s1) > 0.01:
            knots.append((x1, s1))
    return [*steps[:1], *knots[: MAX_POINTS - 2], *(steps[-1:] if len(steps) > 1 else ())]


def _cells(curve: Curve, form: Callable[[float], str]) -> dict[float, str]:
    """Return the text of each value, with its interval if the curve has them."""
    cells = {x: _cell([y], form) for x, y in zip(curve.x, curve.y, strict=True)}
    if curve.low is not None and curve.high is not None:
        for x, low, high in zip(curve.x, curve.low, curve.high, strict=True):
            cells[x] += f" ({_cell([low], form)} to {_cell([high], form)})"
    return cells


def _cell(values: list[float], form: Callable[[float], str]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "–"
    mean, low, high = (form(float(value)) for value in (np.mean(known), min(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _swatch(curve: Curve) -> Markup:
    dash = ' stroke-dasharray="5 3"' if curve.look == "dashed" else ""
    width = 1.5 if curve.look == "raw" else 2.5
    dot = f'<circle class="f-{curve.color}" cx="11" cy="5" r="3"/>' if curve.look == "dots" else ""
    line = f'<path class="s-{curve.color}" stroke-width="{width}"{dash} d="M0 5H22"/>'
    return Markup(f'<svg viewBox="0 0 22 10" aria-hidden="true">{line}{dot}</svg>')
