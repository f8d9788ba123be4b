"""What help says of an option, the same for every command: its text as one paragraph, its default in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, get_args, get_origin

from pydantic import BaseModel
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo


def described() -> ConstructorRegistry:
    """Return tyro's own rules, with what each option's help says of it.

    A flag has no default to tell: it is given or not. Nothing is told as empty, or as none where there may be several.
    """
    registry = ConstructorRegistry()
    is_asking = False

    @registry.struct_rule
    def describe(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal is_asking
        if is_asking:
            return None
        is_asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            is_asking = False
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
        # tyro's label of an empty text is two quotes
        nothing = "empty" if kind is str else "none"
        return f"(default: {nothing if label in ('', repr('')) else label})"

    text = " ".join(field.helptext.split()) if isinstance(field.helptext, str) else field.helptext
    # what a field says of itself comes later, and counts
    return replace(field, type=Annotated[(kind, arg(help_behavior_hint=hint), *extras)], helptext=text)
