"""How --help shows an option, for every command: its text as one paragraph, its default in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args, get_origin

from pydantic import BaseModel
from tyro.conf import arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from safelight.text import printable

# what an empty path is read as, because Path("") is the current folder; no file can have this name
EMPTY_PATH = Path("\0empty")


def described() -> ConstructorRegistry:
    """Return tyro's rules for dataclasses, with our text for defaults, and for paths, with EMPTY_PATH for empty ones.

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

    @registry.primitive_rule
    def read_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: Path(words[0]) if words[0] else EMPTY_PATH,
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda path: [str(path)],
        )

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
