"""Turn a matplotlib figure into inline SVG: themed, small, and allowed by the page's Content-Security-Policy.

Matplotlib writes colours and fonts into style attributes, which a strict policy refuses and dark mode cannot change.
Here every colour of PALETTE becomes a CSS class (`s-accent` for strokes, `f-accent` for fills), all other styles become
SVG attributes, and ids are prefixed with the figure's name.
"""

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from safelight.trainer.report.markup import Markup, escape

# Placeholder colours for matplotlib. They identify the theme's colour and never appear in the page.
PALETTE = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "accent": "#040404",
    "amber": "#050505",
    "faint": "#060606",
    "surface": "#070707",
}
POINTS_PER_INCH = 72
_CLASS_OF = {value: name for name, value in PALETTE.items()}
# from the figure's <style> element, which is dropped
_DEFAULT_PROPERTIES = {"stroke-linejoin": "round"}
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_LONG_NUMBERS = frozenset({"d", "x", "y", "transform", "points", "width", "height"})
_DROPPED_ELEMENTS = frozenset({"metadata", "style", "title"})


def new_figure(width: int, height: int) -> Figure:
    """Return an empty figure of width x height CSS pixels, without pyplot and its global state."""
    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    return figure


def to_svg(figure: Figure, name: str, label: str, css_class: str = "") -> Markup:
    """Return the figure as an inline <svg> element.

    name: unique in the page. label: description for screen readers.
    """
    buffer = io.StringIO()
    # keep text as text: it can be searched and copied, and uses the page's font
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    used = {
        match
        for element in root.iter()
        for value in element.attrib.values()
        for match in re.findall(r"#([\w.-]+)", value)
    }
    view_box = root.attrib["viewBox"]
    body = "".join(_write(child, name, used) for child in root)
    _, _, width, height = view_box.split()
    size = f'width="{float(width):.0f}" height="{float(height):.0f}"'
    return Markup(
        f'<svg class="{escape(f"graph {css_class}".strip())}" viewBox="{view_box}" {size} role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


def _write(element: ElementTree.Element, name: str, used: set[str]) -> str:
    element_name = element.tag.split("}")[-1]
    if element_name in _DROPPED_ELEMENTS:
        return ""
    attributes, classes = {}, []
    for key, value in element.attrib.items():
        key = key.split("}")[-1]
        if key == "style":
            _style_to_attributes(value, attributes, classes)
        elif key != "id":
            attributes[key] = value
        elif value in used:
            attributes["id"] = value
    children = "".join(_write(child, name, used) for child in element)
    if element_name in ("g", "defs") and not children:
        return ""
    written = f' class="{" ".join(classes)}"' if classes else ""
    for key, value in attributes.items():
        written += f' {key}="{escape(_clean_value(key, value, name, used))}"'
    text = escape(element.text.strip()) if element.text and element.text.strip() else ""
    if element_name == "g" and not written:
        return children
    return f"<{element_name}{written}>{text}{children}</{element_name}>"


def _style_to_attributes(style: str, attributes: dict[str, str], classes: list[str]) -> None:
    properties = dict(_DEFAULT_PROPERTIES) if "stroke:" in style else {}
    for declaration in filter(None, map(str.strip, style.split(";"))):
        key, _, value = declaration.partition(":")
        properties[key.strip()] = value.strip()
    for key, value in properties.items():
        if key in ("fill", "stroke") and value in _CLASS_OF:
            classes.append(f"{key[0]}-{_CLASS_OF[value]}")
        elif key == "font":
            attributes["font-size"] = re.search(r"([\d.]+)px", value)[1]
            if "bold" in value or re.search(r"\b[67]00\b", value):
                attributes["font-weight"] = "600"
        elif key == "font-size":
            attributes[key] = value.removesuffix("px")
        elif key != "font-family":
            attributes[key] = value


def _clean_value(key: str, value: str, name: str, used: set[str]) -> str:
    if key == "id":
        return f"{name}-{value}"
    if "#" in value:
        value = re.sub(r"#([\w.-]+)", lambda match: f"#{name}-{match[1]}" if match[1] in used else match[0], value)
    if key in _LONG_NUMBERS:
        value = _NUMBER.sub(lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value)
        value = " ".join(value.split())
    return value
