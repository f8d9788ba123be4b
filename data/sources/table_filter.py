"""Conditions on a table's rows, as people write them: `landscape and photo_width >= 1600 and camera ~ canon`.

A condition compares a column with a value, or is a name of one of ours; several are joined by `and`. A text is only
ever compared, never evaluated.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from safelight.errors import UserError

Row = Mapping[str, str]
MAX_CHARACTERS = 1000
# a quoted text, an operator, or a word
_TOKEN = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|(<=|>=|==|!=|[<>=~])|([^\s<>=!~"']+))""")
_ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "~")


@dataclass(frozen=True)
class Derived:
    """A name that is no column: computed from columns. value: returns its text; "" is false, where it stands alone."""

    columns: tuple[str, ...]
    value: Callable[[Row], str]


@dataclass(frozen=True)
class Condition:
    """One comparison. sign: "" for a name that stands alone."""

    name: str
    sign: str = ""
    value: str = ""


def _number(text: str) -> float:
    """Return the number that a text is, NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _tokens(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) of each token; kind: "text" if quoted, "sign" or "word"."""
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise UserError(f"--where {text!r}: {text[position:].strip()!r} cannot be read; quote it")
        position = match.end()
        double, single, sign, word = match.groups()
        quoted = double if double is not None else single
        tokens.append(("text", quoted) if quoted is not None else ("sign", sign) if sign else ("word", word))
    return tokens


def parse_conditions(text: str) -> list[Condition]:
    """Return the conditions of a text, [] for an empty one. Raises UserError saying what cannot be read."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"--where has {len(text):,} characters (limit {MAX_CHARACTERS:,})")
    parts: list[list[tuple[str, str]]] = [[]]
    for token in _tokens(text):
        if token[0] == "word" and token[1].lower() == "and":
            parts.append([])
        else:
            parts[-1].append(token)
    return [_condition(part, text) for part in parts] if text.strip() else []


def _condition(part: list[tuple[str, str]], text: str) -> Condition:
    kinds = [kind for kind, _ in part]
    shown = " ".join(word for _, word in part)
    if kinds == ["word"]:
        return Condition(part[0][1])
    if len(part) < 3 or kinds[:2] != ["word", "sign"] or "sign" in kinds[2:]:
        raise UserError(
            f"--where {text!r}: {shown!r} is no condition; write COLUMN {' | '.join(OPERATORS)} VALUE, joined by `and`"
        )
    name, sign = part[0][1], part[1][1].replace("==", "=")
    value = " ".join(word for _, word in part[2:])
    if sign in _ORDER and math.isnan(_number(value)):
        raise UserError(f"--where {text!r}: {value!r} is no number, which {name} {sign} needs")
    return Condition(name, sign, value)


def columns_of(conditions: list[Condition], columns: Collection[str], derived: Mapping[str, Derived]) -> set[str]:
    """Return the columns that conditions read. Raises UserError for a name that is neither a column nor derived."""
    needed: set[str] = set()
    for condition in conditions:
        if condition.name in derived:
            needed.update(derived[condition.name].columns)
        elif condition.name in columns and condition.sign:
            needed.add(condition.name)
        elif condition.name in columns:
            raise UserError(f"--where: {condition.name} is compared with nothing; write {condition.name} = VALUE")
        else:
            near = difflib.get_close_matches(condition.name, [*columns, *derived], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*derived, *columns])}"
            raise UserError(f"--where: there is no column {condition.name}; {hint}")
    return needed


def holds(condition: Condition, row: Row, derived: Mapping[str, Derived]) -> bool:
    """Return whether a row meets a condition.

    Numbers are compared as such, texts without regard to letter case; an empty cell is neither smaller nor
    larger than any.
    """
    name, sign, value = condition.name, condition.sign, condition.value
    cell = (derived[name].value(row) if name in derived else row[name]).strip()
    if not sign:
        return bool(cell)
    if sign in _ORDER:
        return _ORDER[sign](_number(cell), _number(value))
    if sign == "~":
        return value.casefold() in cell.casefold()
    is_equal = cell.casefold() == value.casefold() or _number(cell) == _number(value)
    return is_equal == (sign == "=")
