"""A page that is rendered again when its files change, in a thread of its own, while others are served the last one."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import UserError
from safelight.trainer.live.run_state import State
from safelight.trainer.report.build import PARTS, Content
from safelight.trainer.report.markup import Markup, tag
from safelight.trainer.report.theme import Part, asset, content_security_policy, look, page

PART = Part(asset("live.css", Path(__file__).parent), asset("live.js", Path(__file__).parent))
ALL_PARTS = (*PARTS, PART)
CSP = content_security_policy(*look(ALL_PARTS), is_served=True)
# which style sheet and script a page was made with: an open page of another server's is loaded anew
LOOK = hashlib.sha256("".join(look(ALL_PARTS)).encode()).hexdigest()[:16]
# seconds between two looks at the files, and between the end of a rendering and the next one
LOOK_EVERY_S, MIN_PAUSE_S = 1.0, 3.0
# ... or as many times as long as it took, so that a large run's page takes a tenth of a core from its training
PAUSE_PER_RENDERING = 9


@dataclass(frozen=True)
class Reading:
    """A page as its files were. state: what to say at the top, asked whenever the page is."""

    content: Content
    changed: float | None
    state: Callable[[], State]


@dataclass(frozen=True)
class Rendered:
    """parts: identifier -> (digest, HTML), in order: header, sections, footer."""

    reading: Reading
    parts: dict[str, tuple[str, str]]


class LivePage:
    """A page that follows files. mark: what changes with them, cheap. read: makes the page, slow.

    fail: called with an exception that nobody expects. No request waits for a rendering but the first.
    """

    def __init__(
        self,
        mark: Callable[[], Hashable],
        read: Callable[[], Reading],
        fail: Callable[[BaseException], None],
        home: str = "",
    ):
        self._mark, self._read, self._fail, self._home = mark, read, fail, home
        self._lock, self._is_first_done = threading.Lock(), threading.Event()
        self._rendered: Rendered | None = None
        self._rendered_mark: Hashable = None
        self._is_rendering = False
        self._next_look = 0.0
        self._problem = ""

    def html(self) -> str | None:
        """Return the whole page, None if it cannot be rendered."""
        rendered = self._latest()
        if rendered is None:
            return None
        state = rendered.reading.state()
        wrapped = {
            key: tag("div", Markup(html), data_part=key, data_digest=digest)
            for key, (digest, html) in rendered.parts.items()
        }
        header, footer = wrapped.pop("header"), wrapped.pop("footer")
        main = tag("main", list(wrapped.values()))
        bar = self._bar(state, rendered.reading.changed)
        return page(rendered.reading.content.title, bar, header, main, footer, parts=ALL_PARTS, is_served=True)

    def version(self) -> str | None:
        """Return what the page's script asks for every few seconds, as JSON: the state, and the digest of each part."""
        rendered = self._latest()
        if rendered is None:
            return None
        state = rendered.reading.state()
        return json.dumps(
            {
                "look": LOOK,
                "title": rendered.reading.content.title,
                "state": state.kind,
                "says": self._problem or state.says,
                "changed": rendered.reading.changed,
                "now": time.time(),
                "parts": [[key, digest] for key, (digest, _) in rendered.parts.items()],
            }
        )

    def part(self, key: str) -> str | None:
        """Return a part of the page with its digest, as JSON; None if there is none of this name."""
        rendered = self._latest()
        if rendered is None or key not in rendered.parts:
            return None
        digest, html = rendered.parts[key]
        return json.dumps({"digest": digest, "html": html})

    def _latest(self) -> Rendered | None:
        """Return the page as last rendered; if files have changed since, and enough time has passed, start again."""
        with self._lock:
            if not self._is_rendering and time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + LOOK_EVERY_S
                mark = self._mark()
                if mark != self._rendered_mark or not self._is_first_done.is_set():
                    self._is_rendering = True
                    threading.Thread(target=self._render, args=(mark,), daemon=True).start()
        self._is_first_done.wait()
        return self._rendered

    def _render(self, mark: Hashable) -> None:
        start = time.monotonic()
        try:
            reading = self._read()
            content = reading.content
            parts = {"header": content.header, **content.sections, "footer": content.footer}
            texts = {key: str(html).encode("utf-8", "replace").decode() for key, html in parts.items()}
            digests = {key: hashlib.sha256(text.encode()).hexdigest()[:16] for key, text in texts.items()}
            self._rendered = Rendered(reading, {key: (digests[key], text) for key, text in texts.items()})
            self._problem = ""
        except (UserError, OSError) as error:
            # deleted, or unreadable while something is written: what was rendered before is shown on
            self._problem = f"{error}; this page shows the last state"
        except BaseException as error:
            self._fail(error)
        finally:
            end = time.monotonic()
            with self._lock:
                self._rendered_mark, self._is_rendering = mark, False
                self._next_look = end + max(MIN_PAUSE_S, PAUSE_PER_RENDERING * (end - start))
            self._is_first_done.set()

    def _bar(self, state: State, changed: float | None) -> Markup:
        """Return the line at the top that says whether the page is live, and what is going on."""
        home = tag("a", "All runs", href=self._home) if self._home else None
        said = tag("span", self._problem or state.says, class_="says", role="status", dir="auto")
        is_live = tag("strong", "Live", class_="is-live")
        when = tag("time", "", data_at=f"{changed:.0f}" if changed else None, class_="when")
        noscript = tag("noscript", "Without JavaScript this page does not refresh by itself: reload it.")
        return tag(
            "div",
            tag("i", "", aria_hidden="true"),
            is_live,
            said,
            when,
            noscript,
            home,
            class_="live",
            data_state=state.kind,
            data_look=LOOK,
        )
