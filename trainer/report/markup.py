"""Build HTML that is escaped by default.

`Markup` is text that already is HTML; `tag` escapes everything else. No caller has to remember to escape a caption, a
prompt or a path, so none can forget to.
"""

import re
from collections.abc import Iterable
from html import escape as _html_escape
from html import unescape

VOID_ELEMENTS = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})
# Control characters that HTML forbids (newline and tab are fine), and the two overrides that reverse the direction of
# the text after them. A caption may contain any of them.
_CONTROL_CHARACTERS = dict.fromkeys(
    (*range(0x09), 0x0B, *range(0x0D, 0x20), *range(0x7F, 0xA0), 0x202D, 0x202E), "\ufffd"
)


class Markup(str):
    """Text that already is HTML and is not escaped again."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Return the value as HTML: Markup unchanged, everything else escaped. The result can be encoded as UTF-8."""
    if isinstance(value, Markup):
        return value
    # a caption from JSON may contain a lone surrogate, which cannot be encoded: writing the report would fail
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return Markup(_html_escape(text.translate(_CONTROL_CHARACTERS), quote=True))


def join(*children: object) -> Markup:
    """Return the children concatenated. Lists are flattened, None is skipped."""
    return Markup("".join(_flatten(children)))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an HTML element.

    Attributes: `class_` becomes class, `data_x` becomes data-x, True gives a bare name; None and False are omitted.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID_ELEMENTS:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def shorten(text: object, max_characters: int) -> str:
    """Return the text; if longer than max_characters, it is cut and its full length added."""
    text = str(text)
    if len(text) <= max_characters:
        return text
    return f"{text[:max_characters].rstrip()} … ({len(text):,} characters)"


def prompt_markup(prompt: str, cut_after: str, max_characters: int) -> Markup:
    """Return a prompt in quotes. cut_after: the end of what the text encoder read of it, '' if it read all."""
    if not prompt.strip():
        return tag("span", "(empty prompt)", class_="prompt")
    text = tag("span", "“", shorten(prompt, max_characters), "”", class_="prompt", dir="auto")
    cut = tag("span", f"(cut after “{shorten(cut_after, 80)}”)", class_="meta") if cut_after else None
    return join(text, " " if cut_after else None, cut)


def kept_together(text: str) -> str:
    """Return a text with no line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|px|GiB|s|min|h|d)(?!\w))", "\u00a0", text)


def heading_of(section: Markup) -> Markup:
    """Return what a section's first heading says, by which the page's contents name it."""
    return Markup(re.search(r"<h2>(.*?)</h2>", section, re.DOTALL)[1])


def details(summary: object, *children: object, **attributes: object) -> Markup:
    """Return a collapsed <details> element."""
    return tag("details", tag("summary", summary), *children, **attributes)


def empty_state(*children: object) -> Markup:
    """Return a box that says why a part of the report is missing."""
    return tag("p", *children, class_="empty")


def nothing_yet(what: str, command: str) -> Markup:
    """Return a quiet line: what the section would show, and the command that fills it."""
    return tag("p", what, " ", tag("code", f"safelight {command} RUN"), class_="note")


def table(head: Iterable[object], rows: Iterable[Iterable[object]], label: str = "", **attributes: object) -> Markup:
    """Return a table that scrolls sideways on a narrow screen. The first cell of each row is its header.

    label: what the table is called where it is not seen, by default the heads of its columns.
    """
    head = list(head)
    columns = [unescape(re.sub(r"<[^>]*>", "", cell)) if isinstance(cell, Markup) else str(cell) for cell in head]
    label = label or f"table of {', '.join(filter(None, columns))}"
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
        aria_label=shorten(label, 400),
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
