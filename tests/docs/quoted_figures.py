"""Check that every figure with a unit in README and docs comes from a result line in bench/results.

A quoted figure is recorded if a number in a result line, in a field of the same unit, rounds to it at the quoted number
of digits. Predictions do not count: fields named predicted_..., and lines whose note begins with "a prediction".
bench/results/quoted.toml lists the exceptions: definitions, which are no measurements, and figures that were written
before result lines were kept; their number may only shrink.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.bench.core.results import RESULTS

QUOTED = RESULTS / "quoted.toml"
# unit -> (endings of field names, factors from the field's value to the unit)
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "images/s": (("images_per_s", "images_per_s_mean", "images_per_s_p20_p50_p80"), (1,)),
    "GiB": (("_gib", "_gib_of_process", "_gib_of_all"), (1,)),
    "MiB": (("_mib",), (1,)),
    "GB": (("gb",), (1,)),
    "GB/s": (("gb_per_s",), (1,)),
    "GFLOP": (("_gflop",), (1,)),
    "TFLOP": (("_gflop",), (1e-3,)),
    "TFLOP/s": (("tflops",), (1,)),
    "s": (("seconds", "_s"), (1,)),
    "min": (("seconds", "_s"), (1 / 60,)),
    "ms": (("_ms", "ms"), (1,)),
    # fractions: the demo's scores as (value, low, high), chance levels, shares
    "%": (("base", "trained", "difference", "chance", "share_of_limit", "_share"), (100,)),
    "launches": (("launches",), (1,)),
    "host syncs": (("host_syncs",), (1,)),
}
_ALIASES = {"img/s": "images/s", "images a second": "images/s", "seconds": "s", "minutes": "min"}
_UNITS = "|".join(re.escape(unit) for unit in sorted([*_FIELDS, *_ALIASES], key=len, reverse=True))
_MINUTES_SECONDS = re.compile(r"(?P<min>\d+) min (?P<s>\d+) s(?![\w/])")
# the ends of an interval, "78 % [66, 87]", have the unit before them
_FIGURE = re.compile(
    rf"(?<![\w.,-])(?P<value>\d[\d,]*(?:\.\d+)?) ?(?P<unit>{_UNITS})(?![\w/])"
    r"(?: \[(?P<low>[\d.]+), (?P<high>[\d.]+)\])?"
)


@dataclass(frozen=True)
class Quote:
    """A figure quoted in a text. text: as written. value, unit: as looked up, with 2 min 37 s as 157 s."""

    file: str
    line: int
    start: int
    text: str
    value: str
    unit: str


def quotes(text: str, file: str) -> Iterator[Quote]:
    """Yield the figures with units in a Markdown text, except in code, which claims nothing."""
    is_fenced, is_indented, is_after_blank = False, False, True
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        # four spaces after a blank line start a code block; within a paragraph they continue a list item
        is_indented = line.startswith("    ") and (is_indented or is_after_blank)
        is_after_blank = not line.strip()
        if is_fenced or is_indented:
            continue
        plain = re.sub(r"`[^`]*`", lambda match: " " * len(match[0]), line)
        for match in _MINUTES_SECONDS.finditer(plain):
            seconds = 60 * int(match["min"]) + int(match["s"])
            yield Quote(file, number, match.start(), match[0], str(seconds), "s")
        plain = _MINUTES_SECONDS.sub(lambda match: " " * len(match[0]), plain)
        for match in _FIGURE.finditer(plain):
            unit = _ALIASES.get(match["unit"], match["unit"])
            for value in filter(None, (match["value"], match["low"], match["high"])):
                yield Quote(file, number, match.start(), match[0], value.replace(",", ""), unit)


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield (field name, number) for all numbers in a result line. Items of a list have the list's name."""
    if isinstance(value, dict):
        for key, item in value.items():
            # everything nested in a prediction is a prediction
            yield from _numbers(item, name if name.startswith("predicted") else key)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def recorded(folder: Path = RESULTS) -> list[tuple[str, float]]:
    """Return (field name, number) for all numbers in the result lines of a folder, except predictions."""
    texts = [text for path in sorted(folder.glob("*.jsonl")) for text in path.read_text().splitlines()]
    lines = [line for line in map(json.loads, texts) if not str(line.get("note", "")).startswith("a prediction")]
    return [(name, number) for line in lines for name, number in _numbers(line) if not name.startswith("predicted")]


def is_recorded(quote: Quote, numbers: list[tuple[str, float]]) -> bool:
    """Return whether a number of the quote's unit rounds to the quote, at its number of digits."""
    digits = len(quote.value.partition(".")[2])
    endings, scales = _FIELDS[quote.unit]
    return any(
        name.endswith(endings) and round(number * scale, digits) == float(quote.value)
        for name, number in numbers
        for scale in scales
    )


def check(root: Path, declared: Path = QUOTED) -> tuple[list[Quote], list[str]]:
    """Return (figures that are neither recorded nor declared, messages on files with too many unrecorded figures)."""
    numbers = recorded()
    tables = tomllib.loads(declared.read_text())
    definitions = [entry["text"] for entry in tables.get("definition", [])]
    unrecorded = {entry["file"]: entry for entry in tables.get("unrecorded", [])}
    missing, num_unrecorded = [], Counter()
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        name = path.relative_to(root).as_posix()
        text = path.read_text()
        lines = text.splitlines()
        for quote in quotes(text, name):
            if is_recorded(quote, numbers):
                continue
            line = lines[quote.line - 1]
            if any(_covers(t, line, quote.start) for t in unrecorded.get(name, {}).get("texts", [])):
                num_unrecorded[name] += 1
            elif not any(_covers(t, line, quote.start) for t in definitions):
                missing.append(quote)
    return missing, [
        f"{name}: {num} figures without a result line, {unrecorded[name]['at_most']} declared"
        for name, num in num_unrecorded.items()
        if num > unrecorded[name]["at_most"]
    ]


def _covers(text: str, line: str, start: int) -> bool:
    return any(match.start() <= start < match.end() for match in re.finditer(re.escape(text), line))
