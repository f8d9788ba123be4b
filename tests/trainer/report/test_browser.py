"""The report in Chromium: desktop and phone width, light and dark mode, print."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safelight.trainer.report.build import build_report
from tests.trainer.report.chromium import (
    ARGUMENTS,
    LOW_CONTRAST,
    MIN_CONTRAST,
    OVERFLOW,
    SIZES,
    SVG_TEXTS,
    WATCH,
    Opened,
    assert_sound,
    find_chromium,
)
from tests.trainer.report.hostile_run import HEBREW, keep_lines, make_hostile, rewrite

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

MAX_OPENING_MS = 3000
MIN_FONT_PX = 9.5
ROSE = (
    "step 110: the held-out loss 0.5510 is 4.0 times the base's 0.1385 and rising: the run is making the model worse; "
    "stop it and use a lower learning rate"
)
DIVERGED = (
    "step 165: the loss has not been finite since step 160: the learning rate 0.001 is probably too high; go on from "
    "step 110, the last sound checkpoint, with a smaller rate: mv runs/unsplash/checkpoints/step-00000165 "
    "runs/unsplash/checkpoints/step-00000165.diverged && safelight train runs/unsplash/config.toml --resume "
    "--optimizer.lr 0.0003"
)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = find_chromium()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def open_(path: Path, size: str = "desk", **options: object) -> Opened:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, has_touch=size == "phone", is_mobile=size == "phone", **options
        )
        contexts.append(context)
        context.add_init_script(WATCH)
        opened = Opened(context.new_page())
        page = opened.page
        page.on("console", lambda message: opened.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: opened.messages.append(f"error: {error}"))
        page.on("requestfailed", lambda request: opened.messages.append(f"failed: {request.url[:80]}"))
        page.on("dialog", lambda dialog: (opened.messages.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: opened.requests.append(request.url[:80]))
        page.goto(path.as_uri())
        return opened

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory, write_run) -> dict[str, Path]:
    """Reports of a full-size run of 40 epochs, of runs with much missing, and of one full of hostile text."""
    root = tmp_path_factory.mktemp("browser")
    prompts = tuple(f"a red fox standing in tall grass at the edge of forest {i}, photography" for i in range(8))
    write_run(root / "whole", prompts=prompts, sample_every=4, num_sampled=4, num_examples=12)
    small = {"edge_px": 48, "prompts": prompts[:2], "num_examples": 3}
    start = write_run(root / "at-step-0", num_epochs=1, scores=False, **small)
    keep_lines(start, lambda line: line["step"] == 0)
    shutil.rmtree(start / "compare")
    shutil.rmtree(start / "samples" / "step-00000055")
    bare = write_run(root / "no-validation-samples-captions", num_epochs=3, scores=False, **small)
    keep_lines(bare, lambda line: line["kind"] != "validation")
    shutil.rmtree(bare / "compare")
    shutil.rmtree(bare / "samples")
    examples = json.loads((bare / "data.json").read_text())["examples"]
    rewrite(bare / "data.json", num_captions=0, examples=[{**example, "caption": ""} for example in examples])
    one = write_run(root / "one-photo", num_epochs=1, **small)
    bucket = {"width": 512, "height": 512, "num_train": 1, "num_validation": 0}
    rewrite(
        one / "data.json",
        num_photos=1,
        num_train=1,
        num_validation=0,
        num_captions=1,
        buckets=[bucket],
        examples=examples[:1],
        rejected=[],
    )
    (root / "empty").mkdir()
    (root / "empty" / "config.toml").touch()
    make_hostile(write_run(root / "hostile", num_epochs=3, **small))
    with (write_run(root / "diverged", num_epochs=3, **small) / "metrics.jsonl").open("a") as log:
        for name, detail in (("held-out loss rose", ROSE), ("diverged", DIVERGED)):
            log.write(json.dumps({"kind": "event", "step": 165, "event": name, "detail": detail, "time": 1.7e9}) + "\n")
    return {run.name: build_report(run) for run in root.iterdir()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["whole", "at-step-0", "no-validation-samples-captions", "one-photo", "empty", "hostile", "diverged"]
)
def test_every_state_is_sound(open_report, reports, name, size):
    opened = open_report(reports[name], size)
    opened.page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert_sound(opened)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_divergence_is_said_above_everything_else(open_report, reports, size, scheme):
    page = open_report(reports["diverged"], size, color_scheme=scheme).page
    banners = page.locator(".grave").all()
    assert [banner.locator("p").inner_text() for banner in banners] == [f"S{DIVERGED[1:]}", f"S{ROSE[1:]}"]
    below = page.locator(".lead").bounding_box()["y"]
    for banner in banners:
        box = banner.bounding_box()
        assert box["y"] + box["height"] <= below
        assert box["x"] + box["width"] <= SIZES[size][0]
    assert banners[0].bounding_box()["y"] < 400
    assert page.evaluate(LOW_CONTRAST, MIN_CONTRAST)[1] == []


def test_a_report_of_40_epochs_opens_within_3_s(open_report, reports):
    opened = open_report(reports["whole"])
    # 8 pairs, 4 prompts at 11 steps, 12 photographs
    assert opened.page.evaluate("document.images.length") == 8 * 2 + 4 * 11 + 12
    took = []
    for _ in range(3):
        opened.page.reload()
        took.append(opened.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    # the fastest of three: other work on this machine must not count
    assert 0 < min(took) <= MAX_OPENING_MS, took


@pytest.mark.parametrize("size", SIZES)
def test_the_graphs_can_be_read(open_report, reports, size):
    page = open_report(reports["whole"], size).page
    graphs = [svg for svg in page.locator("svg.graph").all() if svg.is_visible()]
    # the two large ones in the version for this size, and four small ones
    assert len(graphs) == 6
    for svg in graphs:
        box = svg.bounding_box()
        assert box["width"] >= 330
        assert box["height"] >= 170
        texts = svg.evaluate(SVG_TEXTS)
        assert min(text["px"] for text in texts) >= MIN_FONT_PX
        for index, one in enumerate(texts):
            left, top, right, bottom = one["box"]
            assert left >= 0
            assert right <= SIZES[size][0]
            for other in texts[:index]:
                a, b, c, d = other["box"]
                assert right <= a or c <= left or bottom <= b or d <= top, (one["text"], other["text"])
    loss = page.locator("#loss svg.graph:visible")
    assert loss.bounding_box()["height"] >= 250
    shown = {text["text"] for text in loss.evaluate(SVG_TEXTS)}
    assert {"loss (mean squared error)", "epoch (step number below)", "best: epoch 26", "stage 1"} <= shown
    for graph, name in zip(graphs[3:], ("learning rate", "gradient norm", "throughput", "memory"), strict=False):
        texts = [text["text"] for text in graph.evaluate(SVG_TEXTS)]
        assert "epoch" in texts, name
    read_off_the_loss(page, size)


def read_off_the_loss(page, size: str) -> None:
    """Hover over the graph at epoch 26, or tap it, and compare the values shown with the metrics."""
    figure = page.locator("#loss figure.wide")
    assert figure.locator("output").inner_text() == "Hover over the graph, or tap it, to read its values."
    svg = figure.locator("svg.graph:visible")
    svg.scroll_into_view_if_needed()
    frame = json.loads(figure.get_attribute("data-series"))["frames"]["narrow" if size == "phone" else "wide"]
    share = (26 - frame["first_epoch"]) / (frame["last_epoch"] - frame["first_epoch"])
    box, width = svg.bounding_box(), float(svg.get_attribute("viewBox").split()[2])
    x = box["x"] + (frame["left"] + share * (frame["right"] - frame["left"])) * box["width"] / width
    y = box["y"] + box["height"] / 2
    if size == "phone":
        page.touchscreen.tap(x, y)
    else:
        page.mouse.move(x, y)
    shown = figure.locator("output span").all_inner_texts()
    assert shown[0].startswith("training (smoothed) 0.1")
    # the losses that write_run wrote
    held_out, trained_on = (f"{loss:.4f} (epoch 26, step 1,430)" for loss in (0.1302, 0.1274))
    assert sorted(shown[1:]) == [f"held out {held_out}", f"training photographs {trained_on}"]


def test_hostile_text_is_shown_and_does_nothing(open_report, reports):
    opened = open_report(reports["hostile"])
    page = opened.page
    page.locator(".zoom").first.click()
    assert "<script>window.pwned=1</script>" in page.locator("dialog").inner_text()
    page.keyboard.press("Escape")
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.images.length") == 2 * 2 + 2 * 4 + 3 + 2  # two in the dialog
    assert page.evaluate("[...document.links].map(a => a.getAttribute('href')).filter(h => h[0] !== '#')") == []
    attributes = "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).map(a => a.name)"
    assert page.evaluate(f"{attributes}.filter(name => name.startsWith('on'))") == []
    text = page.locator("body").inner_text()
    assert "{{7*7}} ${window.pwned=6} <%= 7*7 %>" in text
    assert "49 " not in text.partition("By timestep")[0]
    # a word of 10 KB is cut and its length given, and the character that reverses text is replaced
    assert "W" * 2500 not in text
    assert "characters)" in text
    assert "\u202e" not in text
    assert page.locator(f".prompt:has-text('{HEBREW}')").evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert_sound(opened)


def test_the_policy_refuses_injected_content(open_report, reports):
    opened = open_report(reports["one-photo"])
    opened.page.evaluate("""() => {
      const add = (name, fill) => { const e = document.createElement(name); fill(e); document.body.append(e) };
      add('script', e => e.textContent = 'window.pwned = 1');
      add('script', e => e.src = 'https://example.invalid/a.js');
      add('style', e => e.textContent = 'body { color: red !important }');
      add('img', e => e.src = 'https://example.invalid/a.png');
      add('iframe', e => e.src = 'https://example.invalid/');
      add('div', e => e.setAttribute('onclick', 'window.pwned = 2'));
      add('p', e => e.setAttribute('style', 'color: red'));
      document.body.lastElementChild.previousElementSibling.click();
      setTimeout('window.pwned = 3', 0);
      fetch('https://example.invalid/').catch(() => {});
    }""")
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.pwned") is None
    refused = {
        "script-src-elem",
        "style-src-elem",
        "img-src",
        "frame-src",
        "script-src-attr",
        "style-src-attr",
        "script-src",
        "connect-src",
    }
    assert refused <= set(opened.violations())
    assert opened.page.evaluate("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
    # the browser reports refused requests, but never sends them
    assert not [
        line for line in opened.messages if line.startswith("failed:") and "csp" not in line and "example" not in line
    ]


def test_pictures_can_be_enlarged_with_the_keyboard(open_report, reports):
    opened = open_report(reports["one-photo"])
    page = opened.page
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "zoom":
            break
    first = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert first.startswith("Enlarge: Base: a red fox")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    dialog = page.locator("dialog")
    for key, scheme in (("Enter", "light"), ("Space", "dark")):
        page.emulate_media(color_scheme=scheme)
        page.keyboard.press(key)
        assert dialog.is_visible()
        assert page.evaluate(LOW_CONTRAST, MIN_CONTRAST)[1] == []
        images = dialog.locator("img").all()
        assert len(images) == 2
        for image in images:
            box = image.bounding_box()
            assert box["width"] > 500
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 1280
        text = dialog.inner_text()
        page.keyboard.press("ArrowRight")
        assert dialog.inner_text() != text
        page.keyboard.press("ArrowLeft")
        assert dialog.inner_text() == text
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == first
    assert_sound(opened)


def test_a_pair_is_enlarged_on_a_phone(open_report, reports):
    page = open_report(reports["one-photo"], "phone").page
    button = page.locator(".zoom").first
    before = button.bounding_box()["width"]
    button.tap()
    boxes = [image.bounding_box() for image in page.locator("dialog img").all()]
    assert all(box["width"] > 1.7 * before for box in boxes)
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    assert page.evaluate(OVERFLOW)[0] == 0
    page.touchscreen.tap(5, 800)
    assert not page.locator("dialog").is_visible()


def test_printing_uses_white_paper_even_in_dark_mode(open_report, reports):
    opened = open_report(reports["whole"], color_scheme="dark")
    page = opened.page
    page.emulate_media(media="print")
    # A4 with margins of 15 mm
    page.set_viewport_size({"width": 680, "height": 1000})
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(LOW_CONTRAST, MIN_CONTRAST)[1] == []
    assert page.evaluate(OVERFLOW) == [0]
    right = "e => e.getBoundingClientRect().right"
    assert max(image.evaluate(right) for image in page.locator(".strip img").all()) <= 680
    assert not page.locator("nav").is_visible()
    assert page.locator("#loss svg.wide").is_visible()
    assert not page.locator("#loss svg.narrow").is_visible()


def test_nothing_moves_by_itself(open_report, reports):
    page = open_report(reports["one-photo"], reduced_motion="reduce").page
    page.locator(".zoom").first.click()
    moving = """() => [...document.querySelectorAll('*')].filter(e => { const s = getComputedStyle(e);
      return s.transitionDuration !== '0s' || s.animationName !== 'none' || s.scrollBehavior !== 'auto' }).length"""
    assert page.evaluate(moving) == 0
    assert page.evaluate("document.getAnimations().length") == 0
