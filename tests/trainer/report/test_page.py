"""report.html as a file: self-contained, well-formed, escaped, bounded in size, and within its security policy."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from safelight.trainer.report import learned
from safelight.trainer.report.build import build_report
from safelight.trainer.report.markup import VOID_ELEMENTS, escape, tag
from safelight.trainer.report.theme import asset

ATTACK = "</title></script><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \ud800\x00\u202e"
UPLOT_BANNER = asset("uplot/uPlot.iife.min.js").partition("\n")[0]
# attributes that make a browser load or open something
URL_ATTRIBUTES = {"src", "srcset", "href", "xlink:href", "action", "formaction", "poster", "data", "background"}


class Page(HTMLParser):
    """A parser that fails on unbalanced tags and collects elements, texts, scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attributes}) == len(attributes), f"<{name}> repeats an attribute"
        self.elements.append((name, {key: value or "" for key, value in attributes}))
        if name not in VOID_ELEMENTS:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open, f"</{name}> closes nothing"
        assert self.open[-1] == name, f"</{name}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inline:
            self.inline[self.open[-1]].append(data)
        elif data.strip():
            self.texts.append(data)

    def having(self, name: str) -> list[dict[str, str]]:
        return [attributes for element, attributes in self.elements if element == name]


def open_page(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert_safe(page)
    return page


def assert_safe(page: Page) -> None:
    """Fail if the page has anything that its policy should refuse, or a policy that would allow it."""
    for name, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), f"<{name} {key}>"
            assert key != "style", f"<{name} style>: the policy allows no style attribute"
            # a link that nobody has followed loads nothing
            is_link = name == "a" and attributes.get("rel") == "noopener noreferrer nofollow"
            if key in URL_ATTRIBUTES and not (is_link and re.match(r"https?://[^/]", value)):
                assert value.startswith(("data:", "#")), f"<{name} {key}={value[:60]!r}>"
    assert {name for name, _ in page.elements}.isdisjoint({"iframe", "object", "embed", "base", "form"})
    [policy] = [meta["content"] for meta in page.having("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    for kind in ("script", "style"):
        assert len(page.inline[kind]) == 1
        digest = base64.b64encode(hashlib.sha256(page.inline[kind][0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        # the charts' library names its home in a comment
        assert not re.search(r"url\(|@import|https?:", page.inline[kind][0].replace(UPLOT_BANNER, ""))
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers), "an id stands twice"


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def small_run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A complete run of three epochs that a test may change."""
    write_run = request.getfixturevalue("write_run")
    return write_run(tmp_path / "run", num_epochs=3, edge_px=48, prompts=("a boat", "a fox"))


def test_a_report_needs_no_torch_and_no_matplotlib(full_run: Path):
    """Importing them takes seconds, and people build the report again and again during a run."""
    code = (
        "import sys\nfrom safelight.__main__ import main\n"
        f"status = main(['report', {str(full_run)!r}])\n"
        "print(status, 'torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [str(full_run / "report.html"), "0 False False"]


def test_full_report_is_complete_and_small(full_run: Path, full_report: Path) -> None:
    path = full_report
    assert path == full_run / "report.html"
    assert path.stat().st_size < 15_000_000
    assert not list(full_run.glob("*.tmp*"))
    page = open_page(path)
    images = page.having("img")
    # 5 rows of base and checkpoint, 5 prompts over 16 of the 41 epochs, 8 examples
    assert len(images) == 5 * 2 + 5 * 16 + 8
    for image in images:
        assert image["alt"]
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2], validate=True))) as decoded:
            decoded.load()
            assert decoded.size == (int(image["width"]), int(image["height"]))
    text = "\n".join(page.texts)
    assert "16 of 41 epochs" in text
    assert "epoch 26 · best loss" in text
    assert "base model" in text
    assert "epoch 40" in text


def test_every_section_is_present_and_in_order(full_report: Path) -> None:
    page = open_page(full_report)
    identifiers = [section["id"] for section in page.having("section") if "id" in section]
    expected = ["learned", "best", "measures", "loss", "timesteps", "samples", "next", "data", "parameters", "schedule"]
    expected += ["environment", "events"]
    assert identifiers == expected
    linked = [link["href"] for link in page.having("a")]
    saved = linked.pop()
    assert linked == [f"#{identifier}" for identifier in expected]
    assert saved.startswith("data:text/plain;charset=utf-8;base64,")
    config = (full_report.parent / "config.toml").read_bytes()
    assert base64.b64decode(saved.partition(",")[2], validate=True) == config
    # loss; by timestep, and its change; learning rate, gradient norm, speed and memory
    assert len([figure for figure in page.having("figure") if "data-chart" in figure]) == 7
    plots = [box for box in page.having("div") if box.get("class") == "plot"]
    assert len(plots) == 7
    assert all(box["aria-label"] and box["tabindex"] == "0" for box in plots)


def test_building_the_report_twice_gives_the_same_bytes(small_run: Path) -> None:
    first = build_report(small_run).read_bytes()
    assert build_report(small_run).read_bytes() == first


def test_hostile_text_is_shown_and_does_nothing(small_run: Path) -> None:
    (small_run / "config.toml").write_text('[run]\n"<script>alert(3)</script>" = "</pre><script>alert(4)</script>"\n')
    rewrite(small_run / "environment.json", command=ATTACK, **{ATTACK: ATTACK})
    rewrite(small_run / "model.json", base=ATTACK, family=ATTACK, notes=[ATTACK])
    rewrite(
        small_run / "data.json",
        dataset=ATTACK,
        examples=[{"file": "data_examples/000.jpg", "caption": ATTACK, "width": 5, "height": 5}],
        credits=[{"photographer": ATTACK, "page": ATTACK}, {"photographer": 3, "page": ["x"]}, {ATTACK: ATTACK}],
        rejected=[{"path": ATTACK, "reason": ATTACK}],
    )
    for index in (small_run / "compare" / "index.json", *small_run.glob("samples/*/index.json")):
        key = "rows" if index.parent.name == "compare" else "images"
        rewrite(index, **{key: [{**row, "prompt": ATTACK} for row in json.loads(index.read_text())[key]]})
    rewrite(small_run / "scores.json", notes=[ATTACK], interval=ATTACK)
    with (small_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 1, "event": ATTACK, "detail": ATTACK, "time": 1}) + "\n")
    named = small_run.rename(small_run.parent / "<script>alert(5)<‌script>")
    path = build_report(named)
    page = open_page(path)
    assert len(page.having("script")) == 1
    shown = escape(ATTACK)
    assert path.read_text(encoding="utf-8").count(shown) > 15


def test_photographers_are_credited_with_links_to_web_pages_only(small_run: Path) -> None:
    page = "https://unsplash.com/photos/"
    credits = [
        {"photographer": "Ann Example", "page": f"{page}-bcdefghijk"},
        {"photographer": "Zoë <b>", "page": f"{page}1"},
        {"photographer": "Ann Example", "page": f'{page}2"onclick="x'},
        {"photographer": "Ann Example", "page": ""},
        *(
            {"photographer": "Eve", "page": bad}
            for bad in ("javascript:alert(1)", "data:text/html,x", "//x", "https:x")
        ),
    ]
    rewrite(small_run / "data.json", credits=credits)
    shown = open_page(build_report(small_run))
    text = "\n".join(shown.texts)
    assert "Credits: 8 photographs by 3 photographers" in text
    assert "Zoë <b>" in text
    assert "javascript:alert(1)" in text
    links = [link for link in shown.having("a") if not link["href"].startswith("#") and "download" not in link]
    assert [link["href"] for link in links] == [f"{page}-bcdefghijk", f'{page}2"onclick="x', f"{page}1"]
    assert all("noreferrer" in link["rel"] and "onclick" not in link for link in links)


def test_only_names_are_counted_as_photographers(small_run: Path) -> None:
    notes = ["pexels.com photo 1317558", "02 flipped", "02 flipped", "see debian/copyright"]
    names = ["2018. Sander Klootwijk", "CLIC 2025", "galen-crout", "Ann", "Ann", ""]
    rewrite(small_run / "data.json", credits=[{"photographer": name, "page": ""} for name in (*notes, *names)])
    text = "\n".join(open_page(build_report(small_run)).texts)
    assert "Credits: 10 photographs by 4 photographers, 1 unnamed, 4 with a note instead of a name" in text


def test_without_credits_there_is_no_table_of_them(small_run: Path) -> None:
    assert "Credits" not in "\n".join(open_page(build_report(small_run)).texts)


def test_files_outside_the_run_are_never_embedded(small_run: Path) -> None:
    Image.new("RGB", (8, 8)).save(small_run.parent / "private.png")
    (small_run / "compare" / "link.png").symlink_to(small_run.parent / "private.png")
    outside = ("../../private.png", str(small_run.parent / "private.png"), "link.png", "", None, 7, "a\0b")
    images = small_run / "samples" / "step-00000000" / "index.json"
    rewrite(images, images=[{"prompt": f"p{place}", "file": name} for place, name in enumerate(outside)])
    names = [name for name in outside if isinstance(name, str)]
    rows = [{"prompt": "p", "place": 0, "seed": 0, "photo": name, "images": {"base": name}} for name in names]
    rewrite(small_run / "compare" / "index.json", rows=rows)
    page = open_page(build_report(small_run))
    text = "\n".join(page.texts)
    # an empty name is no picture
    assert f"{2 * (len(names) - 1)} of {2 * (len(names) - 1)} pictures are missing, damaged or too large" in text
    assert f"{len(outside)} of " in text.partition("The same prompts")[2]
    assert not [image for image in page.having("img") if image["alt"].endswith((": p", ": p0"))]


def test_a_run_that_never_started(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    text = "\n".join(open_page(build_report(tmp_path)).texts)
    assert "No training step has been logged so far." in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    line = (
        re.escape(str(tmp_path)) + " is not a run folder: it has no config.toml; train first, or give a folder such as "
    )
    line += "runs/NAME"
    with pytest.raises(ValueError, match=f"^{line}$"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_run_without_validation_says_so(small_run: Path) -> None:
    lines = (small_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (small_run / "metrics.jsonl").write_text("".join(line for line in lines if '"validation"' not in line))
    text = "\n".join(open_page(build_report(small_run)).texts)
    assert "No validation has been logged" in text
    assert "best held-out loss" not in text


def test_damaged_files_are_named_and_the_rest_is_shown(small_run: Path) -> None:
    (small_run / "data.json").write_text('{"num_photos": 12')
    (small_run / "scores.json").write_text("[1, 2]")
    (small_run / "config.toml").write_text("[run\n")
    (small_run / "compare" / "base-000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (small_run / "evaluation.json").write_text('{"models": []}')
    (small_run / "grids" / "a").mkdir(parents=True)
    (small_run / "grids" / "a" / "index.json").write_text('{"x": {"name": "cfg", "labels": [7]}, "cells": []}')
    with (small_run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99, "loss": NaN}\n{"kind": "train", "ste')
    text = "\n".join(open_page(build_report(small_run)).texts)
    for name in ("data.json could not be read", "scores.json could not be read", "config.toml is not valid TOML"):
        assert name in text
    assert re.search(r"metrics\.jsonl: 1 of \d+ lines could not be read and is left out", text)
    assert "evaluation.json could not be read: num_prompts: Field required" in text
    assert "grids/a/index.json could not be read: x.labels.0: Input should be a valid string" in text
    assert "1 of 4 pictures is missing, damaged or too large for this page" in text
    assert "1 logged step had no finite loss and is left out" in text
    assert "1 logged steps" not in text


def test_missing_folder_is_an_error_with_its_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist; give the folder that `safelight train` wrote"):
        build_report(tmp_path / "nowhere")


def test_the_bases_family_is_named_where_the_run_recorded_it(small_run: Path) -> None:
    base = "runwayml/stable-diffusion-v1-5"
    assert f"from {base}" in open_page(build_report(small_run)).texts
    rewrite(small_run / "model.json", family="Stable Diffusion 1.x")
    assert f"from {base} (Stable Diffusion 1.x)" in open_page(build_report(small_run)).texts


def test_training_from_scratch_is_announced_at_the_top(small_run: Path) -> None:
    rewrite(small_run / "model.json", from_scratch=True)
    texts = open_page(build_report(small_run)).texts
    assert texts.index("Trained from scratch.") < texts.index(learned.TITLE)
    assert "Untrained" in texts


def test_size_holds_for_many_noisy_pictures(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    # noise is the worst case for an image codec; with a smaller budget a few images are enough for the test
    monkeypatch.setattr(learned, "BUDGET_BYTES", 200_000)
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(small_run / "compare" / "noise.png", compress_level=1)
    row = {"prompt": "p", "place": 0, "seed": 0, "images": {"base": "noise.png", "step-1430": "noise.png"}}
    rewrite(small_run / "compare" / "index.json", rows=[row] * 130)
    page = open_page(build_report(small_run))
    pairs = [image for image in page.having("img") if image["alt"].endswith(": p")]
    assert sum(len(image["src"]) for image in pairs) <= 200_000
    assert 0 < len(pairs) < 200
    assert "Shown are 100 of 130 rows" in "\n".join(page.texts)


def test_markup_escapes_all_but_markup() -> None:
    assert tag("p", "<b>", tag("b", "&"), None, ["x", 1], class_='a"b', hidden=True, id=None) == (
        '<p class="a&quot;b" hidden>&lt;b&gt;<b>&amp;</b>x1</p>'
    )
    assert escape("\ud800\x00\x9f\n") == "?\ufffd\ufffd\n"


@pytest.mark.parametrize(
    ("events", "banners"),
    [
        (["diverged"], ["This run diverged"]),
        (["resumed", "diverged"], ["This run diverged"]),
        (["diverged", "resumed", "best so far"], []),
        (["diverged", "resumed", "diverged"], ["This run diverged"]),
        (["held-out loss rose", "diverged", "resumed"], ["Held-out loss rose"]),
    ],
)
def test_a_divergence_is_announced_until_the_run_was_resumed(tmp_path, events, banners):
    (tmp_path / "config.toml").write_text('[run]\ndir = "x"\n')
    rows = [{"kind": "event", "step": 6, "event": name, "detail": name, "time": 1.0} for name in events]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = build_report(tmp_path).read_text()
    assert re.findall(
        r'<div class="alert grave" role="alert"><strong>(This run diverged|Held-out loss rose)', html
    ) == (banners)
