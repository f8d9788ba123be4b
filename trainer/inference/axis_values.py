"""Values of an axis as a user writes them: 3,5,7.5 or 1-5 (+2) or 1-10 [5], and texts with commas in double quotes.

The syntax is that of A1111's X/Y/Z plot, so that its users need to learn nothing.
"""

from __future__ import annotations

import csv
import re
from decimal import ROUND_FLOOR, Decimal

from safelight.errors import UserError

# of one axis, as in the record of a grid (trainer/report/grid_record.py)
MAX_VALUES = 200
_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,20})?"
_RANGE = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})\s*(?:\(\s*([+-])\s*({_NUMBER})\s*\)|\[\s*([0-9]{{1,6}})\s*\])?")


def split(text: str) -> list[str]:
    """Return the parts between commas, without the white space around them; double quotes protect commas.

    Raises UserError for a quote that is not closed, or has text behind it.
    """
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(
            f'{text}: {error}; put a value with commas in double quotes, as in "a dog, red",a cat'
        ) from None
    return [part.strip() for part in (rows[0] if rows else [])] or [""]


def numbers(text: str, whole: bool) -> list[int] | list[float]:
    """Return the numbers of a list such as 3,5,7.5 or 1-5 (+2) or 1-10 [5], in the order written.

    1-5 counts by one; (+2) or (-2) is the step; [5] is how many, evenly spaced and rounded down where they must be
    whole. whole: whether only whole numbers are allowed. Raises UserError, naming what is no number.
    """
    found: list[Decimal] = []
    for part in split(text):
        found += _range(part, whole) if (part.count("-") and _RANGE.fullmatch(part)) else [_number(part)]
        if len(found) > MAX_VALUES:
            raise UserError(f"{text} has more than {MAX_VALUES} values; give fewer")
    if not whole:
        return [float(number) for number in found]
    if broken := next((number for number in found if number % 1), None):
        raise UserError(f"{broken} is not a whole number; give for example 10,20 or 10-40 (+10)")
    return [int(number) for number in found]


def _number(part: str) -> Decimal:
    if not re.fullmatch(rf"[+-]?{_NUMBER}", part):
        raise UserError(f"{part!r} is not a number; give for example 3,5,7.5 or 1-5 (+2) or 1-10 [4]")
    return Decimal(part)


def _range(part: str, whole: bool) -> list[Decimal]:
    first, last, sign, by, num = _RANGE.fullmatch(part).groups()
    start, stop = Decimal(first), Decimal(last)
    if num is not None:
        return _evenly(start, stop, int(num), whole)
    step = Decimal(by) if by is not None else Decimal(1)
    step = -step if sign == "-" or (sign is None and stop < start) else step
    if not step or (stop - start) * step < 0:
        raise UserError(f"{part} never reaches {last}; give the step another sign, as in 1-5 (+2) or 5-1 (-2)")
    if (stop - start) / step > MAX_VALUES:
        raise UserError(f"{part} has more than {MAX_VALUES} values; give a larger step, as in {first}-{last} [5]")
    return [start + step * number for number in range(int((stop - start) / step) + 1)]


def _evenly(start: Decimal, stop: Decimal, num: int, whole: bool) -> list[Decimal]:
    if not 1 <= num <= MAX_VALUES:
        raise UserError(f"[{num}] is not from 1 to {MAX_VALUES} values; give for example 1-10 [5]")
    values = [start + (stop - start) * number / max(1, num - 1) for number in range(num)]
    return [value.to_integral_value(ROUND_FLOOR) for value in values] if whole else [round(v, 6) for v in values]
