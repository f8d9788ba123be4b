"""Reads and writes a run's settings as TOML. schema.py defines the settings.

An error names the setting, its value and the closest valid name. Does not import torch, so that typos are reported at
once.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ValidationError

from safelight.errors import UserError
from safelight.trainer.config.names_elsewhere import instead_of, nearest_value, setting_named
from safelight.trainer.config.schema import (
    AVERAGE_OF_PAGED,
    FLAT_TABLES,
    NESTED_TABLES,
    Config,
    OwnOfStage,
    Section,
    optimizer_conflict,
    shard_conflict,
)
from safelight.trainer.config.stage_settings import attribute_of, overridable, why_per_run
from safelight.trainer.registry.optimizers import MEMORY_MODES
from safelight.untrusted import read_toml

# source of settings given on the command line, which errors show as options
COMMAND_LINE = "command line"
# a file may hold any number of mistakes, and values of any length
MAX_MISTAKES_SHOWN = 20
MAX_VALUE_CHARS = 200
# pydantic's type of an error -> what was expected
PLAIN_TYPES = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}
# the same for types with a limit
LIMITS = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
}


def _names_at(location: tuple) -> list[str]:
    """Return the valid names below a location in the config, for suggestions."""
    model = Config
    for part in location:
        if isinstance(part, int):
            continue
        for name, field in model.model_fields.items():
            if part in (name, field.alias):
                types = [
                    t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)
                ]
                model = next((t for t in types if issubclass(t, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _of_whole_run(location: list) -> str:
    """Return why a setting that is not one of a stage's cannot be, '' if it is no setting of the run either.

    location: in a stage, such as stage, 0, checkpointing, or stage, 0, loss, prediction.
    """
    if not 3 <= len(location) <= 4 or location[0] != "stage":
        return ""
    *tables, name = location[2:]
    sections = {field.alias or key: field.annotation for key, field in Config.model_fields.items() if key != "stage"}
    for table in tables or FLAT_TABLES:
        if table in sections and name in sections[table].model_fields:
            reason = why_per_run(sections[table], name)
            return f"{table}.{name} cannot differ between stages: {reason}" if reason else ""
    if tables or name not in sections:
        return ""
    if name in FLAT_TABLES:
        return f"a stage has the settings of [{name}] by their own names: {', '.join(overridable(sections[name]))}"
    return f"{name} cannot differ between stages: {sections[name].why_per_run}"


def _named_elsewhere(location: list) -> list:
    """Return the path of the setting that another trainer calls by this name, [] if there is none."""
    named = setting_named(str(location[-1]))
    if named is None:
        return []
    if location[0] != "stage" or len(location) < 3:
        return list(named)
    table, name = named
    if table in FLAT_TABLES and name in overridable(FLAT_TABLES[table]):
        return [*location[:2], name]
    is_own = table in NESTED_TABLES and name in overridable(NESTED_TABLES[table])
    return [*location[:2], table, name] if is_own else [table, name]


def _shown(path: list, source: str) -> str:
    """Return a setting's name as written in a file, or as an option if it came from the command line."""
    name = ".".join(map(str, path))
    return f"--{name.replace('_', '-')}" if source == COMMAND_LINE else name


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]} ..."


def explain(error: ValidationError, source: str) -> list[str]:
    """Return a readable line for each of pydantic's errors. source: the file, or COMMAND_LINE."""
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems[:MAX_MISTAKES_SHOWN]:
        *parents, last = problem["loc"] or ("",)
        where = ".".join(str(part) for part in problem["loc"])[:MAX_VALUE_CHARS]
        if problem["type"] == "extra_forbidden" and (reason := _of_whole_run([*parents, last])):
            lines.append(f"{source}: {where}: {reason}")
        elif problem["type"] == "extra_forbidden" and (here := _named_elsewhere([*parents, last])):
            lines.append(f"{source}: {where} is not a setting; here: {_shown(here, source)}")
        elif problem["type"] == "extra_forbidden" and (advice := instead_of(str(last))):
            lines.append(f"{source}: {where} is not a setting; {advice}")
        elif problem["type"] == "extra_forbidden":
            similar = difflib.get_close_matches(str(last)[:MAX_VALUE_CHARS], _names_at(tuple(parents)), n=1, cutoff=0.5)
            known = ", ".join(_names_at(tuple(parents)))
            hint = (
                f"did you mean {_shown([*parents, similar[0]], source) if parents else similar[0]}?"
                if similar
                else f"known settings: {known}"
            )
            lines.append(f"{source}: {where} is not a setting; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{source}: {where} is missing")
        elif problem["type"] == "model_type":
            lines.append(f"{source}: {where} = {_quoted(problem['input'])}: expected a table, [{where}]")
        elif problem["loc"] == ("stage",):
            lines.append(f"{source}: stage = {_quoted(problem['input'])}: expected tables, [[stage]]")
        elif problem["type"] in PLAIN_TYPES:
            lines.append(f"{source}: {where} = {_quoted(problem['input'])}: expected {PLAIN_TYPES[problem['type']]}")
        elif problem["type"] in LIMITS:
            limit = LIMITS[problem["type"]].format(**problem["ctx"])
            lines.append(f"{source}: {where} = {_quoted(problem['input'])}: expected {limit}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "literal_error":
                message = message.replace("True", "true").replace("False", "false")
                near = nearest_value(str(problem["input"]), re.findall("'([^']*)'", problem["ctx"]["expected"]))
                message += f"; the nearest is '{near}'" if near else ""
            lines.append(f"{source}: {where} = {_quoted(problem['input'])}: {message[0].lower()}{message[1:]}")
    if len(problems) > MAX_MISTAKES_SHOWN:
        lines.append(f"{source}: and {len(problems) - MAX_MISTAKES_SHOWN} more mistakes")
    return lines


def parse_config(values: dict, source: str) -> Config:
    """Return the config with the values of a parsed TOML file. source: names their origin in messages.

    Raises UserError with one line for each invalid setting.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(*explain(error, source)) from None
    if contradiction := next(_contradictions(config), ""):
        raise UserError(f"{source}: {contradiction}")
    for index, stage in enumerate(config.stages()):
        if contradiction := next(_contradictions(stage.config), ""):
            raise UserError(f"{source}: stage.{index}: {contradiction}")
    if contradiction := next(_of_best(config), ""):
        raise UserError(f"{source}: {contradiction}")
    return config


def _contradictions(config: Config) -> Iterator[str]:
    """Yield what contradicts itself in settings that are valid one by one: those of the run, or as a stage has them."""
    if config.data.flip_p > 0 and config.data.variants == 1:
        yield f"data.flip_p {config.data.flip_p} has no effect with data.variants 1; use 2 or more variants"
    mode = MEMORY_MODES.get(config.optimizer.memory)
    if mode is not None and not mode.allows_average and config.train.ema_decay > 0:
        yield AVERAGE_OF_PAGED
    if config.loss.zero_terminal_snr and config.loss.prediction == "epsilon":
        yield "loss.zero_terminal_snr requires loss.prediction 'v_prediction', not 'epsilon'"
    if contradiction := config.loss.contradiction():
        yield contradiction
    for conflict in (optimizer_conflict(config), shard_conflict(config)):
        if conflict:
            yield conflict
    adapter = config.adapter.spec
    if config.train.layers and adapter.needs_base:
        yield (
            f"train.layers chooses among the UNet's own weights, which adapter.kind {adapter.name} leaves frozen; use "
            "adapter.target instead"
        )
    if config.text_encoder.train and not adapter.trains_text_encoder:
        yield (
            f"text_encoder.train true does not work with adapter.kind {adapter.name}, whose file has no place for a "
            "text encoder that is trained as a whole; set text_encoder.train to false, or adapter.kind to none"
        )
    if adapter.memory_modes is not None and config.optimizer.memory not in adapter.memory_modes:
        yield (
            f"optimizer.memory {config.optimizer.memory} keeps the state of a whole UNet in host memory, and "
            f"adapter.kind {adapter.name} trains a few MB; use {' or '.join(adapter.memory_modes)}"
        )
    if config.trains_word:
        yield from _word_contradictions(config)
    validate = config.validate_
    if validate.patience and validate.patience < max(1, validate.every_epochs):
        yield (
            f"validate.patience {validate.patience} is shorter than validate.every_epochs {validate.every_epochs}: no "
            "validation falls into it; use a multiple of every_epochs, three times it or more"
        )
    if validate.patience and (validate.every_epochs == 0 or config.data.validation_fraction == 0):
        name = "validate.every_epochs" if validate.every_epochs == 0 else "data.validation_fraction"
        yield f"validate.patience {validate.patience} needs held-out loss, but {name} is 0; set it above 0"
    if config.text_encoder.train and config.data.prompt_weights:
        yield (
            "data.prompt_weights true does not work with text_encoder.train true, whose captions are cached as token "
            "ids, without weights; set one of them to false"
        )


def _word_contradictions(config: Config) -> Iterator[str]:
    """Yield settings that adapter.kind embedding cannot have."""
    kind, optimizer = f"adapter.kind {config.adapter.kind}", config.optimizer
    wrong = {
        f"text_encoder.train true trains weights, and {kind} none; set it to false": config.text_encoder.train,
        f"data.prompt_weights true does not work with {kind}, whose captions are cached as token ids, without "
        "weights; set it to false": config.data.prompt_weights,
        f"train.ema_decay {config.train.ema_decay:g} averages weights, and {kind} trains none; set it to 0": (
            config.train.ema_decay > 0
        ),
        f"optimizer.memory {optimizer.memory} is for 16-bit weights, and the vectors of {kind} are fp32; use auto": (
            optimizer.memory not in ("auto", "fp32")
        ),
        f"optimizer.fused_backward true updates the UNet, which {kind} does not; use auto": (
            optimizer.fused_backward is True
        ),
        f"optimizer.clipping {optimizer.clipping} is for optimizer.fused_backward, which {kind} does not have; use "
        "auto": optimizer.clipping not in ("auto", "global"),
    }
    yield from (text for text, is_so in wrong.items() if is_so)


def _of_best(config: Config) -> Iterator[str]:
    """Yield why a stage cannot begin from the best checkpoint of the one before."""
    stages = config.stages()
    if stages[0].start_from == "best":
        yield "stage.0.start_from 'best' has no stage before it: the first stage begins from model.base; use 'last'"
    for index, (before, stage) in enumerate(pairwise(stages), start=1):
        if stage.start_from == "best" and before.config.validate_.every_epochs == 0:
            yield (
                f"stage.{index}.start_from 'best' needs validation in the stage before it, but validate.every_epochs "
                "is 0 there; set it to 1, or start_from to 'last'"
            )
    if any(stage.start_from == "best" for stage in stages) and config.data.validation_fraction == 0:
        yield "start_from 'best' needs held-out photographs; set data.validation_fraction above 0, or use 'last'"


def load_config(path: Path) -> Config:
    """Return the config in a TOML file. Raises UserError if the file is missing or invalid."""
    try:
        values = read_toml(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; write one with `safelight init tiny -o {shlex.quote(str(path))}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a settings file such as run.toml") from None
    return parse_config(values, str(path))


def toml_value(value) -> str:
    """Return a setting's value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # TOML escapes strings as JSON does, and DEL in addition
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(config: Config, comments: bool = False) -> str:
    """Return the config as TOML. comments: write each setting's documentation above it, once."""
    lines: list[str] = []

    def write(header: str, section: Section, comments: bool) -> None:
        tables = NESTED_TABLES if isinstance(section, OwnOfStage) else {}
        lines.append("")
        if comments:
            lines.append(f"# {section.__doc__.splitlines()[0]}")
        lines.append(header)
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if (field.alias or name) in tables:
                continue
            if comments:
                lines.extend(f"# {line}" for line in field.description.splitlines())
            if value is not None:
                lines.append(f"{name} = {toml_value(value)}")
            elif comments:
                # only a stage's values can be unset: write the inherited value, commented out
                lines.append(f"# {name} = {toml_value(getattr(config.stages()[0], name))}")
        for table, model in tables.items():
            own = getattr(section, attribute_of(table))
            if comments:
                names = ", ".join(overridable(model))
                lines.append(f"# [stage.{table}] may have: {names}")
            if own is not None:
                write(f"[stage.{table}]", own, False)

    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if name == "stage":
            for number, stage in enumerate(value):
                write("[[stage]]", stage, comments and number == 0)
        else:
            write(f"[{field.alias or name}]", value, comments)
    return "\n".join(lines).lstrip() + "\n"


def require_run(run_dir: Path) -> None:
    """Raise UserError if the folder is not a run's: it has no config.toml."""
    if not (run_dir / "config.toml").is_file():
        raise UserError(
            f"{run_dir} is not a run folder: it has no config.toml; train first, or give a folder such as runs/NAME"
        )
