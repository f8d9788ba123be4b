"""HTML pages: their style sheet, their script, and the Content-Security-Policy that allows exactly these two.

A page is made of parts, each a style sheet and a script of its own (theme.css and theme.js, chart.css and chart.js).
The look is a darkroom's: neutral paper in light mode, a dark room in dark mode, and the red and amber of a safelight.
A page is complete without JavaScript; the script adds what needs a pointer.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.trainer.report.markup import Markup, join, tag


@dataclass(frozen=True)
class Part:
    """What one kind of content adds to a page's style sheet and to its script."""

    css: str = ""
    js: str = ""


def asset(name: str, folder: Path = Path(__file__).parent) -> str:
    """Return a text file of a folder of the package, by default this one."""
    return (folder / name).read_text(encoding="utf-8")


CSS = asset("theme.css")
JS = asset("theme.js")
# every page's
THEME = Part(CSS, JS)


def page(title: str, *body: object, parts: Sequence[Part] = (THEME,), is_served: bool = False) -> str:
    """Return an HTML document whose one style sheet and one script are those of its parts, in their order.

    is_served: whether its script may ask the server that it came from.
    """
    css, js = look(parts)
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=content_security_policy(css, js, is_served)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} · Safelight"),
        tag("style", Markup(css)),
    )
    document = tag("html", tag("head", head), tag("body", *body, tag("script", Markup(js))), lang="en")
    return f"<!doctype html>\n{document}\n"


def look(parts: Sequence[Part]) -> tuple[str, str]:
    """Return the style sheet and the script that parts make together."""
    return "".join(part.css for part in parts), "".join(part.js for part in parts)


def content_security_policy(css: str = CSS, js: str = JS, is_served: bool = False) -> str:
    """Return the policy: embedded pictures, this style sheet and this script, by their hashes, and nothing else.

    is_served: the script may also ask the server that the page came from.
    """
    asks = "connect-src 'self'; " if is_served else ""
    return (
        f"default-src 'none'; img-src data:; {asks}"
        f"style-src '{_source_hash(css)}'; script-src '{_source_hash(js)}'; base-uri 'none'; form-action 'none'"
    )


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
