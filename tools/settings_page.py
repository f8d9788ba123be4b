"""Writes docs/settings.md: every setting of trainer/config/schema.py, with what other trainers call it.

    python -m tools.settings_page

writes the page; a test fails while it is not what this would write. A new setting needs a row in settings_peers.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from safelight.trainer.config.names_elsewhere import VALUES, WITHOUT
from safelight.trainer.config.schema import FLAT_TABLES, NESTED_TABLES, Config, OwnOfStage
from safelight.trainer.config.stage_settings import overridable
from safelight.trainer.config.toml import toml_value

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "settings.md"
PEERS = Path(__file__).with_name("settings_peers.toml")
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
PEER_NAMES = ("EveryDream2", "kohya", "OneTrainer")
# defaults of kohya's sd-scripts that differ from ours: setting -> (its option, its default)
OTHER_DEFAULTS = {
    "optimizer.lr_cycles": ("--lr_scheduler_num_cycles", "1"),
    "optimizer.lr_power": ("--lr_scheduler_power", "1"),
    "loss.huber_delta": ("--huber_c", "0.1"),
    "data.caption_dropout": ("--caption_dropout_rate", "0"),
    "adapter.rank": ("--network_dim", "4"),
    "adapter.alpha": ("--network_alpha", "1"),
    "train.batch_size": ("--train_batch_size", "1"),
}
# in Without.names, how a trainer writes its settings
_PREFIX = {"kohya": "--"}
INTRODUCTION = """\
# Settings

<!-- Written by `python -m tools.settings_page` from trainer/config/schema.py, trainer/config/names_elsewhere.py and
tools/settings_peers.toml. Change those, and run it again. -->

Every setting of a run, by the tables of its `run.toml`. `safelight init tiny -o run.toml` writes such a file with all
of them and their explanations; on the command line `batch_size` of `[train]` is `--train.batch-size 2`.

Beside each setting stands what other trainers call it: EveryDream2 in its `train.json`, `optimizer.json`,
`validation_default.json`, `plugins/textual_inversion.json` and prompts' file, kohya's sd-scripts as options, OneTrainer
in its settings. A name in brackets means nearly the same; a trainer that is not named has no such setting. What others
have and Safelight has not stands [at the end](#names-without-a-counterpart), with what to do instead.
"""


def tables() -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (table, its model) in the order of a settings file. Of a [[stage]]: what only a stage has."""
    for name, field in Config.model_fields.items():
        yield field.alias or name, OwnOfStage if name == "stage" else field.annotation


def read_peers() -> dict[str, dict[str, list[str]]]:
    """Return table -> setting -> its names in the order of PEER_NAMES, '' for none."""
    return tomllib.loads(PEERS.read_text(encoding="utf-8"))


def missing_rows(peers: dict[str, dict[str, list[str]]]) -> list[str]:
    """Return what is wrong with the table of names: settings without a row, rows without a setting, rows too short."""
    known = {f"{table}.{name}" for table, section in tables() for name in section.model_fields}
    rows = {f"{table}.{name}": names for table, values in peers.items() for name, names in values.items()}
    return [
        *(f"{name} has no row in {PEERS.name}" for name in sorted(known - rows.keys())),
        *(f"{name} in {PEERS.name} is no setting" for name in sorted(rows.keys() - known)),
        *(
            f"{name} in {PEERS.name} needs {len(PEER_NAMES)} names"
            for name, r in rows.items()
            if len(r) != len(PEER_NAMES)
        ),
    ]


def _plain(annotation: object, metadata: tuple) -> tuple[object, tuple]:
    """Return a type without Annotated, and all that annotates it."""
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata = (*more, *metadata)
    # a Field inside Annotated keeps its limits in its own metadata
    flat = [own for mark in metadata for own in (mark.metadata if isinstance(mark, FieldInfo) else (mark,))]
    return annotation, tuple(flat)


def _limits(metadata: tuple) -> str:
    """Return the bounds of a number or text in words, '' for none."""
    found = {
        name: getattr(mark, name)
        for mark in metadata
        for name in ("ge", "gt", "le", "lt", "max_length")
        if hasattr(mark, name)
    }
    if "max_length" in found:
        return f"at most {found['max_length']:,} characters"
    if "ge" in found and "le" in found:
        return f"{found['ge']:,} to {found['le']:,}"
    words = {"ge": "{:,} or more", "gt": "above {:,}", "le": "at most {:,}", "lt": "below {:,}"}
    return ", ".join(text.format(found[name]) for name, text in words.items() if name in found)


def values_of(annotation: object, metadata: tuple = ()) -> str:
    """Return in words which values a setting may have."""
    kind, marks = _plain(annotation, metadata)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(values_of(part, marks) for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        # the limits stand at the parts
        first, own = _plain(get_args(kind)[0], ())
        num = "several" if Ellipsis in get_args(kind) else len(get_args(kind))
        return ", each ".join(filter(None, (f"{num} {_PLURALS.get(first, 'values')}", _limits(own))))
    if get_origin(kind) is list:
        return f"list of {_PLURALS.get(_plain(get_args(kind)[0], ())[0], 'values')}"
    names = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
    return ", ".join(filter(None, (names.get(kind, "table"), _limits(marks))))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _elsewhere(names: list[str]) -> str:
    """Return what the other trainers call a setting, a line each; a dash if none has it."""
    return "<br>".join(f"{t}: {_names(name)}" for t, name in zip(PEER_NAMES, names, strict=True) if name) or "–"


def _names(text: str) -> str:
    """Return another trainer's names as code, each option by itself."""
    nearly = text.startswith("(") and text.endswith(")")
    parts = [part.partition(" ") for part in text.strip("()").split(", ")]
    shown = ", ".join(
        f"`{name}`{space}{rest}" if "=" not in rest else f"`{name} {rest}`" for name, space, rest in parts
    )
    shown = shown.replace("`one` more", "one more")
    return f"({shown})" if nearly else shown


def _row(table: str, name: str, field: FieldInfo, names: list[str], in_stage: bool) -> str:
    default = "required" if field.is_required() else f"default `{toml_value(field.get_default())}`"
    allowed = values_of(field.annotation, tuple(field.metadata))
    facts = f"**`{name}`**<br>{allowed}; {default}{'; per stage' if in_stage else ''}"
    return f"| {' | '.join(_cell(text) for text in (facts, field.description or '', _elsewhere(names)))} |"


def page() -> str:
    """Return docs/settings.md. Raises KeyError for a setting without a row of names."""
    peers, parts = read_peers(), [INTRODUCTION]
    for table, section in tables():
        is_stage = table == "stage"
        in_stages = overridable(section) if table in (*FLAT_TABLES, *NESTED_TABLES) else []
        title = "[[stage]]" if is_stage else f"[{table}]"
        intro = _cell(section.__doc__ or "")
        if is_stage:
            flat = ", ".join(f"`{name}`" for one in FLAT_TABLES.values() for name in overridable(one))
            nested = ", ".join(f"`[stage.{one}]`" for one in NESTED_TABLES)
            intro += f" A stage may also set {flat} and, in {nested}, the settings marked `per stage` below."
        head = "| setting | what it does | elsewhere |\n|---|---|---|"
        rows = [
            _row(table, name, field, peers[table][name], name in in_stages)
            for name, field in section.model_fields.items()
        ]
        parts.append("\n".join([f"## `{title}`", "", intro, "", head, *rows, ""]))
    return "\n".join([*parts, _without_counterpart()])


def _default_of(setting: str) -> str:
    """Return a setting's default as TOML."""
    table, _, name = setting.partition(".")
    return toml_value(dict(tables())[table].model_fields[name].get_default())


def _option(trainer: str, name: str) -> str:
    return f"`{_PREFIX.get(trainer, '')}{name}`"


def _without_counterpart() -> str:
    """Return the tables of names and values elsewhere that are no setting here, and of defaults that differ."""
    rows = [
        f"| {row.trainer} | {', '.join(_option(row.trainer, name) for name in row.names)} | {_cell(row.instead)} |"
        for row in sorted(WITHOUT, key=lambda row: PEER_NAMES.index(row.trainer))
    ]
    values = [f"| `{other}` | `{own}` |" for other, own in VALUES.items()]
    defaults = [
        f"| `{setting}` | `{_default_of(setting)}` | `{option} {default}` |"
        for setting, (option, default) in OTHER_DEFAULTS.items()
    ]
    return "\n".join(
        [
            "## Names without a counterpart",
            "",
            "What other trainers have and a settings file here has not, and what to do instead. A settings file or a "
            "command line with one of these names gets the same answer.",
            "",
            "| trainer | name | instead |\n|---|---|---|",
            *rows,
            "",
            "Values by other names, such as `--lr_scheduler cosine_with_restarts`; case does not matter:",
            "",
            "| elsewhere | here |\n|---|---|",
            *values,
            "",
            "## Defaults that differ",
            "",
            "Of kohya's sd-scripts, for whoever copies a command line that leaves them out:",
            "",
            "| setting | default | kohya's default |\n|---|---|---|",
            *defaults,
            "",
            "`adapter.alpha` 0 is the rank, so that a LoRA is not scaled; kohya's 1 scales it by 1 / rank. Its "
            "`--huber_c` is for its `huber`, which is `loss.kind pseudo_huber` here.",
            "",
        ]
    )


def main() -> None:
    if problems := missing_rows(read_peers()):
        raise SystemExit("\n".join(problems))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
