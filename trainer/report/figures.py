"""How measured figures are written: those that are read together have the same number of decimals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from safelight.trainer.report.evaluation import Difference, Estimate

# digits of a figure without an interval, and of the width of the narrowest interval
DIGITS, INTERVAL_DIGITS = 3, 2
# digits of the largest figure, however narrow the intervals are
MOST_DIGITS = 5
# figures that need more are written with a power of ten
MOST_DECIMALS = 6
# from here on no figure is written out
HUGE = 1e15


@dataclass(frozen=True)
class Form:
    """How figures of one kind are written. decimals: None for a power of ten with `digits` digits."""

    decimals: int | None
    digits: int = DIGITS

    def show(self, value: float, signed: bool = False) -> str:
        """Return a figure with separators from 1000 on and a true minus sign; what rounds to 0 has no sign."""
        sign = "+" if signed else ""
        if 0 < abs(value) < math.inf and (self.decimals is None or abs(value) >= HUGE):
            number, power = f"{value:{sign}.{self.digits - 1}e}".split("e")
            text = f"{number}e{int(power)}"
        else:
            text = f"{value:{sign},.{self.decimals or 0}f}"
            text = text if text.strip("+-0.,") else text.lstrip("+-")
        return text.replace("-", "−")


# of tests, in standard deviations of chance
Z = Form(1)


def form_of(
    values: Iterable[float],
    intervals: Iterable[tuple[float, float]] = (),
    digits: int = DIGITS,
    most: int | None = None,
) -> Form:
    """Return how figures that are read together are written.

    The width of the narrowest interval, (low, high), has two digits: more would be noise. Without intervals the largest
    figure has `digits`. most: decimals at most.
    """
    ends = [end for interval in intervals for end in interval]
    widths = [high - low for low, high in zip(ends[::2], ends[1::2], strict=True)]
    widths = [width for width in widths if 0 < width < math.inf]
    sizes = [abs(value) for value in (*values, *ends) if 0 < abs(value) < math.inf]
    if not sizes:
        return Form(0)
    decimals = digits - 1 - _power(max(sizes))
    if widths:
        decimals = min(INTERVAL_DIGITS - 1 - _power(min(widths)), MOST_DIGITS - 1 - _power(max(sizes)))
    if most is not None:
        decimals = min(decimals, most)
    return Form(None if decimals > MOST_DECIMALS else max(0, decimals), digits)


def form_of_estimates(estimates: Sequence[Estimate | Difference]) -> Form:
    """Return how estimates that are read together are written, with their intervals."""
    return form_of([one.value for one in estimates], [(one.low, one.high) for one in estimates])


def form_of_kl(divergences: Iterable[float]) -> Form:
    """Return how divergences of crops are written; chance moves them by hundredths of a nat and more."""
    return form_of(divergences, most=2)


def show_p(p: float) -> str:
    """Return a p-value with two or three decimals, "< 0.001" below that."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _power(value: float) -> int:
    return math.floor(math.log10(value))
