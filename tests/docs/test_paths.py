"""What README and docs name is there: files, tests, anchors; the map in docs/architecture.md has every room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_rooms import FLOOR

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# the log tells of files as they were called at the time
PRESENT = [page for page in PAGES if page.name != "log.md"]
TOPS = "bench|configs|data|docs|kernels|notebooks|safelight|tests|tools|trainer"
NAMED = re.compile(rf"`((?:{TOPS})/[\w/.-]*)`")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
# names that a reader makes up, or that must not be there
EXCEPTIONS = {"kernels/ops/NAME.py", "tests/kernels/ops/test_NAME.py", "kernels/__init__.py"}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)
def test_named_files_exist(page):
    named = set(NAMED.findall(page.read_text())) - EXCEPTIONS
    assert not {name for name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def test_every_doc_is_reachable_from_the_readme():
    linked = {(ROOT / target).resolve() for target, _ in LINK.findall((ROOT / "README.md").read_text()) if target}
    assert set(PAGES[1:]) <= linked


def test_the_map_has_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = set(re.findall(r"^\| `([\w/]+)/` \|", text, flags=re.MULTILINE))
    assert rooms == set(FLOOR)


def test_code_refers_to_headings_of_the_decisions():
    headings = set(re.findall(r"^#+ (.+)$", (ROOT / "docs" / "decisions.md").read_text(), flags=re.MULTILINE))
    files = [
        *ROOT.glob("*.py"),
        *(path for top in ("safelight", "kernels", "data", "trainer", "bench") for path in (ROOT / top).rglob("*.py")),
    ]
    for path in files:
        for reference in re.findall(r"docs/decisions\.md, ([^)]+)\)", path.read_text()):
            assert reference in headings, f"{path.relative_to(ROOT)}: {reference}"
