"""Which settings a [[stage]] may override, read from the schema: the one place that decides it.

A field of schema.py is marked PER_STAGE, or its table is (`is_per_stage`) and the field is not marked PerRun. From
these marks the model of a [[stage]] is made, the stage's view of the settings, and the messages for what is refused.
Code that runs in a stage reads its settings from `ResolvedStage.config`, so a marked field needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Optional

from pydantic import BaseModel, Field, create_model


@dataclass(frozen=True)
class _PerStage:
    """Marks a setting that a [[stage]] may override."""


PER_STAGE = _PerStage()


@dataclass(frozen=True)
class PerRun:
    """Marks a setting that no [[stage]] can override. reason: as the end of "cannot differ between stages: "."""

    reason: str


def why_per_run(section: type[BaseModel], name: str) -> str:
    """Return why a stage cannot override a setting of this table, '' if it can."""
    marks = section.model_fields[name].metadata
    own = next((mark.reason for mark in marks if isinstance(mark, PerRun)), "")
    if own or not (section.is_per_stage or PER_STAGE in marks):
        return own or section.why_per_run
    return ""


def overridable(section: type[BaseModel]) -> list[str]:
    """Return the names of the settings of a table that a stage may override."""
    return [name for name in section.model_fields if not why_per_run(section, name)]


def attribute_of(table: str) -> str:
    """Return the name of a table's attribute: pydantic's BaseModel defines `validate`."""
    return "validate_" if table == "validate" else table


def _inherited(section: type[BaseModel], name: str) -> tuple[Any, Any]:
    """Return a setting's field in a stage, as create_model takes it: None, so inherited, unless it is set."""
    field = section.model_fields[name]
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return Optional[kind], Field(default=None, description=_first_sentence(field.description))  # noqa: UP045


def _first_sentence(text: str) -> str:
    sentence, dot, _ = text.replace(".\n", ". ").partition(". ")
    return sentence + "." * bool(dot)


def overriding_model(
    name: str,
    base: type[BaseModel],
    flat: Mapping[str, type[BaseModel]],
    nested: Mapping[str, type[BaseModel]],
) -> type[BaseModel]:
    """Return the model of a stage: the fields of `base`, the settings of flat tables, and the nested tables.

    Every setting is None unless it is set, and so is every nested table.
    """
    fields: dict[str, Any] = {
        setting: _inherited(section, setting) for section in flat.values() for setting in overridable(section)
    }
    assert len(fields) == sum(len(overridable(section)) for section in flat.values()), "two settings have one name"
    section_base = base.__mro__[1]
    for table, section in nested.items():
        own = {setting: _inherited(section, setting) for setting in overridable(section)}
        model = create_model(f"Stage{section.__name__}", __base__=section_base, __doc__=section.__doc__, **own)
        alias = None if attribute_of(table) == table else table
        field = Field(default=None, alias=alias, description=f"Settings of [{table}] in this stage.")
        fields[attribute_of(table)] = (Optional[model], field)  # noqa: UP045
    return create_model(name, __base__=base, __doc__=base.__doc__, **fields)
