"""How --help shows an option, for every command: its text as one paragraph, its default in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, get_args, get_origin

from pydantic import BaseModel
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from safelight.text import printable


def described() -> ConstructorRegistry:
    """Return tyro's rules for dataclasses, with our text for defaults.

    A flag shows no default. An empty text is shown as "empty", an empty list as "none".
    """
    registry = ConstructorRegistry()
    is_nested = False

    @registry.struct_rule
    def describe(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal is_nested
        if is_nested:
            return None
        is_nested = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            is_nested = False
        if not isinstance(spec, StructConstructorSpec):
            return spec
        are_flags = not (isinstance(info.type, type) and issubclass(info.type, BaseModel))
        return replace(spec, fields=tuple(_with_hint(field, are_flags) for field in spec.fields))

    return registry


def _with_hint(field: StructFieldSpec, are_flags: bool) -> StructFieldSpec:
    kind, *extras = get_args(field.type) if get_origin(field.type) is Annotated else (field.type,)

    def hint(label: str) -> str:
        if kind is bool and are_flags:
            return ""
        # tyro shows an empty text as two quotes
        nothing = "empty" if kind is str else "none"
        return f"(default: {nothing if label in ('', repr('')) else printable(label)})"

    text = " ".join(field.helptext.split()) if isinstance(field.helptext, str) else field.helptext
    # the field's own arg() comes last, so that it overrides ours
    return replace(field, type=Annotated[(kind, arg(help_behavior_hint=hint), *extras)], helptext=text)
