"""Settings on the command line, `--train.batch-size 8`, removed from the arguments before tyro parses them.

tyro only shows them in the help. Here they become plain values, merged with those of the file and validated by the same
parse_config, so that an invalid value gives the same message in either place.
"""

from __future__ import annotations

from collections import deque
from typing import Any, get_args, get_origin

from safelight.errors import UserError
from safelight.trainer.config.schema import Config, Stage, is_switch


def _field_type(path: list[str]) -> Any:
    """Return the annotation of a setting, or None if there is no such setting, which pydantic reports later."""
    tables = {field.alias or name: field.annotation for name, field in Config.model_fields.items()}
    table = Stage if path[0] == "stage" else tables.get(path[0])
    names = path[2:] if path[0] == "stage" else path[1:]
    if table is None or len(names) != 1 or names[0] not in table.model_fields:
        return None
    return table.model_fields[names[0]].annotation


def _is_text(annotation: Any) -> bool:
    return annotation is str or any(isinstance(part, str) or _is_text(part) for part in get_args(annotation))


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _take_value(option: str, annotation: Any, given: str | None, rest: deque[str]) -> Any:
    """Return an option's value: the text after `=`, or the arguments that follow, which are removed from `rest`."""
    if is_switch(annotation):
        if given is None and rest and not rest[0].startswith("-"):
            given = rest.popleft()
        return {None: True, "true": True, "false": False}.get(given and given.lower(), given)
    words = [] if given is None else [given]
    is_list = get_origin(annotation) in (list, tuple)
    while given is None and rest and (is_list or not words) and not rest[0].startswith("--"):
        words.append(rest.popleft())
    values = words if annotation is None or _is_text(annotation) else [_number(word) for word in words]
    if is_list:
        return values
    if not values:
        raise UserError(f"command line: {option} needs a value")
    return values[0]


def _put(settings: dict, path: list[str], value: Any) -> None:
    """Set a value in nested tables. `stage` is a list of tables, by number; the next free number adds a stage."""
    where = ".".join(path)
    if path[0] == "stage":
        stages = settings["stage"]
        if len(path) != 3 or not path[1].isdigit() or int(path[1]) > len(stages):
            raise UserError(
                f"command line: {where}: a stage is given by its number, for example --stage.0.lr 1e-6; "
                f"there are {len(stages)}, and --stage.{len(stages)}.epochs adds one"
            )
        if int(path[1]) == len(stages):
            stages.append({})
        settings, path = stages[int(path[1])], path[2:]
    for name in path[:-1]:
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise UserError(f"command line: {where} is not a setting; {name} is a value, not a table")
    settings[path[-1]] = value


def take_overrides(argv: list[str], settings: dict) -> tuple[list[str], dict]:
    """Return (the remaining arguments, the settings with the overrides applied).

    settings: a config as plain values; a copy is changed. Raises UserError for an option without a value or a stage
    that cannot exist; parse_config validates names and values.
    """
    settings = {**settings, "stage": [dict(stage) for stage in settings["stage"]]}
    settings = {name: dict(table) if isinstance(table, dict) else table for name, table in settings.items()}
    others: list[str] = []
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
            _put(settings, positive, False)
        else:
            _put(settings, path, _take_value(option, _field_type(path), given, rest))
    return others, settings
