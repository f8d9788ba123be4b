"""Find and start Chromium, and measure pages in it."""

import os
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest

SIZES = {"desk": (1280, 900), "phone": (390, 844)}
MIN_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
# no background traffic of the browser itself, and no sandbox, which root cannot use
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic"
).split()
WATCH = """
window.violations = [];
document.addEventListener('securitypolicyviolation', e => window.violations.push(e.violatedDirective));
"""


def find_chromium() -> str:
    """Return the path of a Chromium that starts; skip the test if there is none."""
    given = os.environ.get("SAFELIGHT_CHROMIUM")
    names = [given] if given else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        assert not given, f"SAFELIGHT_CHROMIUM={given} is not a program"
        pytest.skip("Chromium not found: apt-get install chromium, or set SAFELIGHT_CHROMIUM to its path")
    # Ubuntu's chromium-browser may be a script that only recommends a snap
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    if version.returncode:
        pytest.skip(f"{path} does not start: {(version.stderr or version.stdout).strip()[:200]}")
    return path


@dataclass
class Opened:
    """An opened page. messages: console output, errors and dialogs. requests: every URL that was requested."""

    page: object
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def violations(self) -> list[str]:
        return self.page.evaluate("window.violations")


OVERFLOW = """() => {
  const root = document.documentElement, wide = [...document.querySelectorAll('body *')].filter(e =>
    !e.closest('.scroll') && e.getBoundingClientRect().right > root.clientWidth + 1);
  return [root.scrollWidth - root.clientWidth, ...wide.map(e => e.tagName + '.' + e.className)];
}"""
# the number of visible texts, and those whose contrast with their background is below the minimum
LOW_CONTRAST = """(minimum) => {
  const parse = text => { const v = text.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.slice(0, 3).map(linear); return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { const layers = [];
    for (; e; e = e.parentElement) {
      layers.push(parse(getComputedStyle(e).backgroundColor));
      if (e.tagName !== 'DIALOG') continue;
      layers.push(parse(getComputedStyle(e, '::backdrop').backgroundColor));
      e = document.body;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]) };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = [];
  let counted = 0;
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.data.trim() || !e.getClientRects().length || style.visibility === 'hidden') continue;
    const ground = behind(e), ink = over(parse(e.closest('svg') ? style.fill : style.color), ground);
    const [dark, bright] = [light(ink), light(ground)].sort((a, b) => a - b), ratio = (bright + .05) / (dark + .05);
    counted += 1;
    if (ratio < minimum) low.push(ratio.toFixed(2) + ' ' + walker.currentNode.data.slice(0, 40));
  }
  return [counted, low];
}"""
BROKEN_IMAGES = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).length"


def assert_sound(opened: Opened) -> None:
    """Assert no messages, violations, requests, broken images or overflow, and enough contrast in both modes."""
    page = opened.page
    assert opened.messages == []
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
