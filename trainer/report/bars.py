"""Small drawings for the cells of a table: an interval with its value, and a distribution by five quantiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from safelight.trainer.report.markup import Markup

WIDTH, HEIGHT, MARGIN = 200, 18, 6


@dataclass(frozen=True)
class Axis:
    """The range that all bars of a column share."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> Axis:
        """Return an axis from the lowest to the highest value."""
        known = [value for value in values if math.isfinite(value)] or [0.0]
        return cls(min(known), max(known))

    def x(self, value: float) -> str:
        """Return a value's place in px."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return f"{MARGIN + min(1.0, max(0.0, share)) * (WIDTH - 2 * MARGIN):.1f}"


def interval_bar(axis: Axis, value: float, low: float, high: float, color: str, level: float | None = None) -> Markup:
    """Return a value as a dot on its interval. level: a value to compare with, dashed."""
    middle = HEIGHT / 2
    parts = [_ground(axis, level)]
    parts.append(f'<path class="s-{color}" stroke-width="2" d="M{axis.x(low)} {middle}H{axis.x(high)}"/>')
    parts.append(f'<circle class="f-{color}" cx="{axis.x(value)}" cy="{middle}" r="4"/>')
    return _svg(parts)


def distribution_bar(axis: Axis, quantiles: Sequence[float], color: str, level: float | None = None) -> Markup:
    """Return the quantiles 5, 25, 50, 75 and 95 % as a line, a block and a mark. level: a limit, dashed."""
    least, low, middle, high, most = (axis.x(value) for value in quantiles)
    width = max(1.0, float(high) - float(low))
    parts = [
        _ground(axis, level),
        f'<path class="s-{color}" stroke-width="1.5" d="M{least} 9H{most}"/>',
        f'<rect class="f-{color}" x="{low}" y="4" width="{width:.1f}" height="10" rx="2"/>',
        f'<path class="s-paper" stroke-width="2" d="M{middle} 3V15"/>',
    ]
    return _svg(parts)


def _ground(axis: Axis, level: float | None) -> str:
    ground = f'<path class="s-grid" d="M{MARGIN} {HEIGHT / 2}H{WIDTH - MARGIN}"/>'
    if level is None:
        return ground
    return ground + f'<path class="s-muted" stroke-dasharray="2 2" d="M{axis.x(level)} 0V{HEIGHT}"/>'


def _svg(parts: Sequence[str]) -> Markup:
    return Markup(f'<svg class="cell-bar" viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>')
