"""Builds HTML in which text is escaped unless it was built here.

`Markup` marks what is HTML already; `tag` escapes everything else it is given. So a caption, a prompt or a path cannot
reach the page raw by somebody forgetting to escape it: there is no place where one would have to remember.
"""

from collections.abc import Iterable
from html import escape as _html_escape

VOID_ELEMENTS = frozenset({"br", "col", "hr", "img", "link", "meta"})
# What HTML forbids in a document, besides newline and tab, and the two that turn the letters after them around
# whatever their script. A caption file may hold anything.
_CONTROL_CHARACTERS = dict.fromkeys(
    (*range(0x09), 0x0B, *range(0x0D, 0x20), *range(0x7F, 0xA0), 0x202D, 0x202E), "\ufffd"
)


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Return the value as HTML text: markup untouched, all else escaped, with nothing left that UTF-8 cannot hold."""
    if isinstance(value, Markup):
        return value
    # A JSON caption may carry a lone surrogate, which cannot be encoded and would fail the whole report.
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return Markup(_html_escape(text.translate(_CONTROL_CHARACTERS), quote=True))


def join(*children: object) -> Markup:
    """Return the children one after the other; lists are flattened, None is nothing."""
    return Markup("".join(_flatten(children)))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return one element.

    Attributes: `class_` gives class, `data_x` gives data-x, True a bare name; None and False are left out.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID_ELEMENTS:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def shorten(text: object, max_characters: int) -> str:
    """Return the text, cut with a word on its whole length where it is longer than max_characters."""
    text = str(text)
    if len(text) <= max_characters:
        return text
    return f"{text[:max_characters].rstrip()} … ({len(text):,} characters)"


def details(summary: object, *children: object, **attributes: object) -> Markup:
    """Return a part of the page that is folded away until asked for."""
    return tag("details", tag("summary", summary), *children, **attributes)


def empty_state(*children: object) -> Markup:
    """Return the line that stands where a part of the run is missing, and says why."""
    return tag("p", *children, class_="empty")


def table(head: Iterable[object], rows: Iterable[Iterable[object]], **attributes: object) -> Markup:
    """Return a table in a frame that scrolls sideways on a narrow screen; the first cell of a row is its header."""
    head_row = tag("tr", [tag("th", cell, scope="col") for cell in head])
    body = []
    for row in rows:
        first, *rest = row
        body.append(tag("tr", tag("th", first, scope="row"), [tag("td", cell) for cell in rest]))
    return tag(
        "div",
        tag("table", tag("thead", head_row), tag("tbody", body), **attributes),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label="table",
    )


def _flatten(children: Iterable[object]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, list | tuple):
            yield from _flatten(child)
        else:
            yield escape(child)


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    return f' {name}="{escape(value)}"'
