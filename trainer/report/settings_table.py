"""The settings in which runs differ, a row a setting and a column a run; the equal ones are folded away."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from safelight.text import counted
from safelight.trainer.config.schema import Config
from safelight.trainer.report.markup import Markup, details, join, shorten, table, tag
from safelight.trainer.report.provenance import format_value
from safelight.trainer.report.run_reader import RunFolder

if TYPE_CHECKING:
    from safelight.trainer.report.shown_runs import ShownRun

# names of a run, which say nothing of how it was trained
NAMES = ("run.dir", "run.title", "run.notes")
# of one run, and of the rows of a table
MAX_SETTINGS, MAX_ROWS = 2000, 400
MAX_VALUE_CHARACTERS = 300
# of environment.json: what is different every time
PER_START = ("started", "command", "settings", "changed_settings")

# setting, such as train.batch_size -> its value
Settings = dict[str, object]


def settings_of(run: RunFolder) -> Settings:
    """Return a run's settings by their dotted names; one that config.toml lacks has the default.

    An earlier version wrote fewer settings, and behaved as the defaults of those that it did not have. A stage is
    called stage.0, as on the command line. Empty if config.toml could not be read.
    """
    if not run.config:
        return {}
    defaults = dict(_flattened(Config().model_dump(mode="json", by_alias=True)))
    return defaults | dict(itertools.islice(_flattened(run.config), MAX_SETTINGS))


def differing(columns: Sequence[Settings]) -> list[str]:
    """Return the names of the settings that are not equal in all columns, in their order. A lacking one differs."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [name for name in names if any(not _is_equal(column, columns[0], name) for column in columns)]


def settings_section(runs: Sequence[ShownRun]) -> Markup:
    """Return the settings that differ, then machines and versions that differ, then what is equal, folded."""
    known = [one for one in runs if one.run.config]
    unknown = [one.label for one in runs if not one.run.config]
    columns = [_without(one.settings, NAMES) for one in known]
    machines = [_without({**_scalars(one.run.environment), **_scalars(one.run.model)}, PER_START) for one in runs]
    changed = differing(columns) if columns else []
    equal = [name for name in (columns[0] if columns else {}) if name not in changed]
    elsewhere = differing(machines)
    quiet = "All settings are equal." if len(columns) > 1 else "The settings are not known."
    return tag(
        "section",
        tag("h2", "Settings that differ"),
        _table(changed, columns, [one.name for one in known]) if changed else tag("p", quiet),
        tag("p", f"Unknown: those of {', '.join(unknown)}.", class_="note") if unknown else None,
        join(
            tag("h3", "Model as loaded, machine and versions that differ"),
            _table(elsewhere, machines, [one.name for one in runs], grouped=True),
        )
        if elsewhere
        else None,
        details(f"{counted(len(equal), 'equal setting')}", _table(equal, columns[:1], ["all runs"])) if equal else None,
        id="settings",
    )


def _table(names: Sequence[str], columns: Sequence[Settings], heads: Sequence[object], grouped: bool = False) -> Markup:
    """grouped: whole numbers with thousands separators."""
    rows = [
        [_name(name), *(_cell(column.get(name, _LACKING), grouped) for column in columns)] for name in names[:MAX_ROWS]
    ]
    more = len(names) - len(rows)
    return join(
        table(["", *heads], rows, class_="beside"),
        tag("p", f"and {more:,} more.", class_="note") if more > 0 else None,
    )


def _name(name: str) -> Markup:
    """Return a setting's name, a stage's as config.toml and the report of one run call it; it may break at a dot."""
    text = re.sub(r"^stage\.(\d{1,6})\.", lambda found: f"[[stage]] {int(found[1]) + 1} ", shorten(name, 120))
    parts = re.split(r"(?<=[._])", text)
    return tag("code", [[part, Markup("<wbr>")] for part in parts[:-1]], parts[-1])


_LACKING = object()


def _cell(value: object, grouped: bool) -> str:
    return "" if value is _LACKING else shorten(format_value(value, grouped), MAX_VALUE_CHARACTERS)


def _flattened(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flattened(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                yield from _flattened(item, f"{name}.{index}.")
        elif value != []:
            yield name, value


def _is_equal(column: Settings, other: Settings, name: str) -> bool:
    mine, theirs = column.get(name, _LACKING), other.get(name, _LACKING)
    # True == 1, but a setting that takes either means different things by them
    return mine == theirs and isinstance(mine, bool) == isinstance(theirs, bool)


def _scalars(values: dict) -> Settings:
    return {key.replace("_", " "): value for key, value in values.items() if not isinstance(value, dict | list)}


def _without(values: Settings, names: Sequence[str]) -> Settings:
    return {name: value for name, value in values.items() if name not in names}
