"""A value with its interval, of a bootstrap or a jackknife."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """A value, and the limits of its interval at 95 %."""

    value: float
    low: float
    high: float
