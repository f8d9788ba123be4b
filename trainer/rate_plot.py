"""The plot of a learning rate range test: an SVG file in the report's colours, for light and dark."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from safelight.trainer.report.rate_test_record import RateTest

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 64, 52
# losses above this many times the first are cut off
MAX_SHOWN = 1.25
# as in trainer/report/theme.css
STYLE = """
svg{--paper:#fff;--ink:#1f1b19;--muted:#6b625d;--grid:#ebe7e2;--accent:#b8281b;--wash:#f6ece9}
@media (prefers-color-scheme:dark){svg{--paper:#1b1716;--ink:#efe8e3;--muted:#a89c95;--grid:#2a2321;--accent:#ff5d47;
--wash:#2a1816}}
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:var(--muted)}
.title{font-size:16px;font-weight:600;fill:var(--ink)}.mark{fill:var(--accent);font-weight:600}
.paper{fill:var(--paper)}.wash{fill:var(--wash)}.grid{stroke:var(--grid)}.dot{fill:var(--accent)}
.curve{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.line{stroke:var(--accent);stroke-width:1.5;stroke-dasharray:5 4}.first{stroke:var(--muted);stroke-dasharray:2 3}
"""


def rate_plot(test: RateTest) -> str:
    """Return the loss over the rate, with the proposed rate and its range, as SVG."""
    rates, first_loss, proposal = test.rates, test.first_loss, test.proposal
    points = [(rate, loss) for rate, loss in zip(rates, test.losses, strict=True) if loss is not None]
    known = [first_loss or 0.0, *(loss for _, loss in points)]
    low = min(known)
    high = min(max(known), MAX_SHOWN * (first_loss or math.inf))
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - pad, high + pad
    left, right = math.log10(rates[0]), math.log10(max(rates[-1], 10 * rates[0]))

    def x_of(rate: float) -> float:
        place = min(max((math.log10(rate) - left) / (right - left), 0.0), 1.0)
        return round(LEFT + place * (WIDTH - LEFT - RIGHT), 1)

    def y_of(loss: float) -> float:
        return round(TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    bottom = HEIGHT - BOTTOM
    parts = [f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="8"/>']
    if proposal.rate is not None:
        x = x_of(proposal.low)
        parts.append(
            f'<rect class="wash" x="{x}" y="{TOP}" width="{x_of(proposal.high) - x:.1f}" height="{bottom - TOP}"/>'
        )
    for tick in _ticks(low, high):
        y = y_of(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>')
    for power in range(math.ceil(left - 1e-9), math.floor(right + 1e-9) + 1):
        x = x_of(10.0**power)
        parts.append(f'<path class="grid" d="M{x} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">1e{power}</text>')
    if first_loss is not None:
        y = y_of(first_loss)
        parts.append(f'<path class="first" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{y - 5}" text-anchor="end">before the test</text>')
    # one point beyond the edge shows where the curve goes
    inside = next((n for n, (_, loss) in enumerate(points) if loss > high), len(points))
    line = " ".join(f"{x_of(rate)},{y_of(loss)}" for rate, loss in points[: inside + 1])
    size = f'width="{WIDTH - LEFT - RIGHT}" height="{bottom - TOP}"'
    parts.append(f'<clipPath id="c"><rect x="{LEFT}" y="{TOP}" {size}/></clipPath>')
    parts.append(f'<polyline class="curve" clip-path="url(#c)" points="{line}"/>')
    parts += [f'<circle class="dot" cx="{x_of(r)}" cy="{y_of(loss)}" r="2.5"/>' for r, loss in points[:inside]]
    if proposal.rate is not None:
        x = x_of(proposal.rate)
        anchor, shift = ("start", 6) if x < WIDTH / 2 else ("end", -6)
        parts.append(f'<path class="line" d="M{x} {TOP}V{bottom}"/>')
        label = f"proposed {proposal.rate:.1e} ({proposal.sureness})"
        parts.append(f'<text class="mark" x="{x + shift}" y="{TOP + 16}" text-anchor="{anchor}">{label}</text>')
    parts.append(f'<text class="title" x="{LEFT}" y="28">Loss after training at a rising learning rate</text>')
    parts.append(f'<text x="{LEFT}" y="48">{escape(proposal.reason)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">learning rate</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="Loss over the learning rate"><style>{STYLE}</style>' + "".join(parts) + "</svg>\n"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return round values between two, four to eight of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 8)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
