"""Settings on the command line, `--train.batch-size 8`, removed from the arguments before tyro parses them.

tyro only shows them in the help. Here they become plain values, merged with those of the file and validated by the same
parse_config, so that an invalid value gives the same message in either place.
"""

from __future__ import annotations

import os
import re
from collections import deque
from typing import Any, get_args, get_origin

from safelight.errors import UserError
from safelight.trainer.config.schema import FLAT_TABLES, NESTED_TABLES, Config, Stage, is_switch
from safelight.trainer.config.stage_settings import overridable


def _field_type(path: list[str]) -> Any:
    """Return the annotation of a setting, or None if there is no such setting, which pydantic reports later."""
    if path[0] == "stage":
        return _stage_field_type(path[2:])
    tables = {field.alias or name: field.annotation for name, field in Config.model_fields.items()}
    table, names = tables.get(path[0]), path[1:]
    if table is None or len(names) != 1 or names[0] not in table.model_fields:
        return None
    return table.model_fields[names[0]].annotation


def _stage_field_type(names: list[str]) -> Any:
    """Return the annotation of a stage's own setting, or of the setting that it overrides."""
    if len(names) == 2:
        sections = [NESTED_TABLES[names[0]]] if names[0] in NESTED_TABLES else []
    else:
        sections = list(FLAT_TABLES.values())
    own = [Stage] if len(names) == 1 else []
    found = [section for section in sections if names[-1:] and names[-1] in overridable(section)] + own
    return found[0].model_fields[names[-1]].annotation if found and names[-1] in found[0].model_fields else None


def _is_text(annotation: Any) -> bool:
    return annotation is str or any(isinstance(part, str) or _is_text(part) for part in get_args(annotation))


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def names_config(word: str) -> bool:
    """Return whether an argument is a settings file or a run folder by its look: FILE.toml, or a folder of a config."""
    return word.lower().endswith(".toml") or os.path.isfile(os.path.join(os.path.expanduser(word), "config.toml"))


def _take_value(option: str, annotation: Any, given: str | None, rest: deque[str]) -> Any:
    """Return an option's value: the text after `=`, or the arguments that follow, which are removed from `rest`.

    A switch needs no value, and a list takes any number: both stop before the settings file, which may come last.
    """
    may_be_list = any(get_origin(part) is list for part in get_args(annotation))
    is_list = may_be_list or get_origin(annotation) in (list, tuple)
    if is_switch(annotation):
        if given is None and rest and not rest[0].startswith("-") and not names_config(rest[0]):
            given = rest.popleft()
        return {None: True, "true": True, "false": False}.get(given and given.lower(), given)
    words = [] if given is None else [given]
    while given is None and rest and (is_list or not words) and not rest[0].startswith("--"):
        if (is_list or annotation is None) and names_config(rest[0]):
            break
        words.append(rest.popleft())
    values = words if annotation is None or _is_text(annotation) else [_number(word) for word in words]
    if is_list and not (may_be_list and len(values) == 1):
        return values
    if not values and annotation is not None:
        raise UserError(f"command line: {option} needs a value")
    # a setting that does not exist is reported as such, with or without a value
    return values[0] if values else None


def _put(settings: dict, path: list[str], value: Any) -> None:
    """Set a value in nested tables. `stage` is a list of tables, by number; the next free number adds a stage."""
    where = ".".join(path)
    if path[0] == "stage":
        stages = settings["stage"]
        is_number = len(path) in (3, 4) and re.fullmatch("[0-9]{1,6}", path[1])
        if not is_number or int(path[1]) > len(stages):
            raise UserError(
                f"command line: {where}: a stage is given by its number, for example --stage.0.lr 1e-6; "
                f"there are {len(stages)}, and --stage.{len(stages)}.epochs adds one"
            )
        if int(path[1]) == len(stages):
            stages.append({})
        settings, path = stages[int(path[1])], path[2:]
    for name in path[:-1]:
        if settings.get(name) is None:
            settings[name] = {}
        settings = settings[name]
        if not isinstance(settings, dict):
            raise UserError(f"command line: {where} is not a setting; {name} is a value, not a table")
    settings[path[-1]] = value


def take_overrides(argv: list[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """Return (the remaining arguments, the overrides as (path of the setting, value)).

    Raises UserError for an option without a value.
    """
    others: list[str] = []
    overrides: list[tuple[list[str], Any]] = []
    rest = deque(argv)
    while rest:
        word = rest.popleft()
        option, _, after = word.partition("=")
        if not option.startswith("--") or "." not in option:
            others.append(word)
            continue
        path = option[2:].replace("-", "_").split(".")
        given = after if "=" in word else None
        positive = [*path[:-1], path[-1].removeprefix("no_")]
        if positive != path and _field_type(path) is None and is_switch(_field_type(positive)) and given is None:
            overrides.append((positive, False))
        else:
            overrides.append((path, _take_value(option, _field_type(path), given, rest)))
    return others, overrides


def with_overrides(settings: dict, overrides: list[tuple[list[str], Any]]) -> dict:
    """Return a copy of a config's plain values with the overrides applied.

    Raises UserError for a stage that cannot exist; parse_config validates names and values.
    """
    stages = [{name: dict(v) if isinstance(v, dict) else v for name, v in stage.items()} for stage in settings["stage"]]
    settings = {**settings, "stage": stages}
    settings = {name: dict(table) if isinstance(table, dict) else table for name, table in settings.items()}
    for path, value in overrides:
        _put(settings, path, value)
    return settings
