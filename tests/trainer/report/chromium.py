"""Chromium, a page opened in it, and what it measures of one."""

import os
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest

SIZES = {"desk": (1280, 900), "phone": (390, 844)}
MIN_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
# none of the browser's own business: it must neither phone home nor ask for a sandbox that root has not
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic"
).split()
WATCH = """
window.violations = [];
document.addEventListener('securitypolicyviolation', e => window.violations.push(e.violatedDirective));
"""


def find_chromium() -> str:
    """Return the browser's path; skip, and say why, where there is none that starts."""
    given = os.environ.get("SAFELIGHT_CHROMIUM")
    names = [given] if given else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        assert not given, f"SAFELIGHT_CHROMIUM={given} is no program"
        pytest.skip("no Chromium here: apt-get install chromium, or name one in SAFELIGHT_CHROMIUM")
    # Ubuntu's chromium-browser is a script that only tells of a snap
    asked = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    if asked.returncode:
        pytest.skip(f"{path} does not start: {(asked.stderr or asked.stdout).strip()[:200]}")
    return path


@dataclass
class Opened:
    """A page, and all that the browser said about it."""

    page: object
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def violations(self) -> list[str]:
        return self.page.evaluate("window.violations")


OVERFLOW = """() => {
  const root = document.documentElement, wide = [...document.querySelectorAll('body *')].filter(e =>
    !e.closest('.scroll') && e.getBoundingClientRect().right > root.clientWidth + 1);
  return [root.scrollWidth - root.clientWidth, ...wide.map(e => e.tagName + '.' + e.className)];
}"""
# every text that can be seen, with less contrast against what lies behind it than asked
LOW_CONTRAST = """(least) => {
  const parse = text => { const v = text.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { const layers = [];
    for (; e; e = e.parentElement) {
      layers.push(parse(getComputedStyle(e).backgroundColor));
      if (e.tagName === 'DIALOG') { layers.push(parse(getComputedStyle(e, '::backdrop').backgroundColor)); e = document.body }
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]) };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  let counted = 0;
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.data.trim() || !e.getClientRects().length || style.visibility === 'hidden') continue;
    const ground = behind(e), ink = over(parse(e.closest('svg') ? style.fill : style.color), ground);
    const [dark, bright] = [light(ink), light(ground)].sort((a, b) => a - b), ratio = (bright + .05) / (dark + .05);
    counted += 1;
    if (ratio < least) found.push(ratio.toFixed(2) + ' ' + walker.currentNode.data.slice(0, 40));
  }
  return [counted, found];
}"""
BROKEN_IMAGES = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
SVG_TEXTS = """svg => [...svg.querySelectorAll('text')].map(t => {
  const box = t.getBoundingClientRect(), scale = svg.getScreenCTM().a;
  return {text: t.textContent, px: parseFloat(getComputedStyle(t).fontSize) * scale,
          box: [box.left, box.top, box.right, box.bottom]} })"""


def assert_sound(opened: Opened) -> None:
    """Nothing said, nothing fetched, nothing broken, nothing too wide, all of it readable by day and by night."""
    page = opened.page
    assert opened.said == []
    assert opened.violations() == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate(BROKEN_IMAGES) == 0
    assert page.evaluate(OVERFLOW) == [0]
    for scheme, paper in (("light", "rgb(250, 249, 247)"), ("dark", "rgb(19, 16, 16)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        counted, low = page.evaluate(LOW_CONTRAST, MIN_CONTRAST)
        assert counted > 20
        assert low == []
