"""The page's pictures and panels in Chromium: handle, choice of checkpoint, epochs, map, print, hostile records."""

import json
from pathlib import Path

import pytest

from safelight.trainer.report.build import build_report
from tests.trainer.report.chromium import LOW_CONTRAST, MIN_CONTRAST, OVERFLOW, SIZES, assert_sound
from tests.trainer.report.conftest import PROMPTS, write_run
from tests.trainer.report.evaluated_run import (
    add_comparison,
    add_evaluation,
    add_grid,
    add_rate_test,
    add_requested,
)
from tests.trainer.report.hostile_run import make_hostile

NAUGHTY_FILE = "<img src=x onerror=window.pwned=8>'\".png"


def write_full_run(run: Path) -> Path:
    write_run(run, prompts=PROMPTS[:3], num_epochs=40, edge_px=168, sample_every=20, num_examples=3)
    add_evaluation(run, add_comparison(run, prompts=PROMPTS[:3], edge_px=168))
    add_grid(run, edge_px=168)
    add_rate_test(run)
    add_requested(run, prompts=PROMPTS[:2], edge_px=168)
    return run


def with_large_figures(run: Path) -> Path:
    """Add CLIPScore by other features, by which its figures have four digits before the point."""
    record = json.loads((run / "evaluation.json").read_text())
    found = next(metric for metric in record["metrics"] if metric["id"] == "clip_score")
    values = [{**value, "value": 3449.0, "low": 2233.0, "high": 4990.0} for value in found["values"]]
    moved = [{**one, "value": -3306.0, "low": -4968.0, "high": -1724.0} for one in found["differences"]]
    again = {**found, "id": "clip_score_vae", "features": "the run's autoencoder"}
    record["metrics"].append({**again, "values": values, "differences": moved})
    (run / "evaluation.json").write_text(json.dumps(record))
    return run


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Reports of a run with every record, and of the same with hostile text in all of them."""
    root = tmp_path_factory.mktemp("content")
    full, hostile = write_full_run(root / "full"), write_full_run(root / "hostile")
    make_hostile(hostile)
    index = hostile / "compare" / "index.json"
    compared = json.loads(index.read_text())
    photo = compared["rows"][0]["photo"]
    (hostile / "compare" / photo).rename(hostile / "compare" / NAUGHTY_FILE)
    compared["rows"][0]["photo"] = NAUGHTY_FILE
    index.write_text(json.dumps(compared))
    large = with_large_figures(write_full_run(root / "large"))
    return {"full": build_report(full), "hostile": build_report(hostile), "large": build_report(large)}


@pytest.mark.parametrize("size", SIZES)
def test_intervals_and_differences_lie_within_the_page(open_report, reports, size):
    page = open_report(reports["large"], size).page
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    tables = page.locator("#measures .scroll:has(.measured), #burn .scroll").all()
    # CLIPScore stands twice, by two kinds of features
    assert len(tables) == 6
    assert "−3,306 (−4,968 to −1,724)" in tables[4].inner_text().replace("\n", " ")
    assert [box.evaluate("e => e.scrollWidth - e.clientWidth") for box in tables] == [0] * 6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["full", "hostile"])
def test_a_page_with_everything_is_sound(open_report, reports, name, size):
    opened = open_report(reports[name], size)
    page = opened.page
    assert page.locator("main > section").evaluate_all("all => all.map(e => e.id)") == [
        *(
            "learned",
            "best",
            "measures",
            "loss",
            "timesteps",
            "checkpoints",
            "samples",
            "requested",
            "grids",
            "burn",
            "memorisation",
            "crops",
        ),
        *("next", "data", "parameters", "schedule", "rate-test", "environment", "events"),
    ]
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.locator(".missing, .empty").count() == 0
    assert page.locator("header .alert li").all_inner_texts() == []
    assert_sound(opened)
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.scripts.length") == 1


def test_hostile_text_is_shown_in_every_section(open_report, reports):
    page = open_report(reports["hostile"]).page
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    for section in (
        "learned",
        "best",
        "measures",
        "samples",
        "requested",
        "grids",
        "burn",
        "memorisation",
        "crops",
        "data",
        "rate-test",
    ):
        assert "<script>window" in page.locator(f"#{section}").inner_text(), section
    assert "<script>window" in page.locator("h1").inner_text()
    assert "\n" not in page.locator("h1").inner_text()
    assert "<script>window" in page.locator(".author").inner_text()
    # of the picture with the naughty name, which is embedded and never named
    assert page.locator("#learned .photo img").count() == 2
    attributes = "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).map(a => a.name)"
    assert page.evaluate(f"{attributes}.filter(name => name.startsWith('on'))") == []


def shown_share(page) -> float:
    """Return from where on the first row's trained picture is shown, in percent of its width."""
    inset = page.locator(".stage .now img").first.evaluate("e => getComputedStyle(e).clipPath")
    return float(inset.rpartition(" ")[2].strip("%)") or 0)


@pytest.mark.parametrize("size", SIZES)
def test_the_handle_divides_base_and_trained(open_report, reports, size):
    page = open_report(reports["full"], size).page
    handle = page.locator(".handle").first
    handle.scroll_into_view_if_needed()
    assert shown_share(page) == 50
    assert handle.get_attribute("aria-label").startswith("Divide between base and Epoch 26: ")
    picture, box = page.locator(".stage .before img").first.bounding_box(), handle.bounding_box()
    # the track is half a thumb longer on each side, so that the handle reaches the picture's edges
    assert box["x"] == pytest.approx(picture["x"] - 14, abs=1)
    assert box["x"] >= 0
    assert box["width"] == pytest.approx(picture["width"] + 28, abs=1)
    assert box["height"] == pytest.approx(picture["height"], abs=3)
    y = picture["y"] + picture["height"] / 2
    if size == "desk":
        page.mouse.move(picture["x"] + picture["width"] / 2, y)
        page.mouse.down()
        page.mouse.move(picture["x"] + picture["width"] * 0.2, y, steps=4)
        page.mouse.up()
    else:
        page.touchscreen.tap(picture["x"] + picture["width"] * 0.2, y)
    assert shown_share(page) == pytest.approx(20, abs=3)
    handle.focus()
    page.keyboard.press("End")
    assert shown_share(page) == 100
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert shown_share(page) == 1
    assert handle.get_attribute("aria-valuetext") == "1 % of the base shown"
    assert page.locator(".handle").nth(1).input_value() == "50"


def test_no_two_sliders_or_regions_are_called_the_same(open_report, reports):
    page = open_report(reports["full"]).page
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    names = page.locator("[role=region], input[type=range]").evaluate_all(
        "all => all.map(e => e.getAttribute('aria-label'))"
    )
    assert len(names) > 15
    assert [name for name in names if names.count(name) > 1 or not name] == []


def test_another_checkpoint_is_chosen_with_the_keyboard(open_report, reports):
    opened = open_report(reports["full"])
    page = opened.page
    options = page.locator(".choose label")
    assert options.all_inner_texts() == ["epoch 10", "epoch 20", "epoch 26 suggested", "epoch 40"]
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "learned":
            break
    assert page.evaluate("document.activeElement.value") == "step-1430"
    page.keyboard.press("ArrowRight")
    visible = page.locator(".stage .after:visible")
    assert set(visible.locator("figcaption").all_inner_texts()) == {"Epoch 40"}
    assert visible.count() == 3
    assert page.locator(".handle").first.get_attribute("aria-label").startswith("Divide between base and Epoch 40: ")
    page.locator(".enlarge").first.click()
    captions = page.locator("dialog figcaption").all_inner_texts()
    assert captions == ["Base", "Epoch 40", "Photograph"]
    assert_sound(opened)


def test_the_slider_switches_the_epoch_of_all_prompts(open_report, reports):
    opened = open_report(reports["full"])
    page = opened.page
    slider, output = page.locator(".epoch-slider input"), page.locator(".epoch-slider output")
    frames = page.locator(".frames:not(.requested) li:visible img")
    assert output.inner_text() == "epoch 40"
    assert frames.count() == 3
    slider.focus()
    page.keyboard.press("Home")
    assert output.inner_text() == "base model"
    assert {alt.partition(":")[0] for alt in frames.evaluate_all("all => all.map(e => e.alt)")} == {"base model"}
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == output.inner_text() == "epoch 20"
    page.locator(".epoch-slider button").click()
    assert frames.count() == 3 * 3
    assert slider.is_disabled()
    page.locator(".epoch-slider button").click()
    assert frames.count() == 3
    assert_sound(opened)


def test_the_map_shows_the_sets_and_the_class_that_are_chosen(open_report, reports):
    page = open_report(reports["full"]).page
    shown = page.locator(".crop-map path:visible")
    # three sets of six classes
    assert shown.count() == 18
    page.locator(".map-switches input[value=BM]").uncheck()
    assert shown.count() == 12
    page.locator(".map-switches select").select_option("0")
    assert shown.count() == 2
    assert {path.get_attribute("data-set") for path in shown.all()} == {"OD", "TM"}


def test_a_cell_of_a_grid_is_enlarged_with_its_place(open_report, reports):
    page = open_report(reports["full"]).page
    page.locator(".xyz .zoom").nth(5).focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog figcaption").inner_text() == "cfg 5, steps 20, checkpoint base"
    assert page.locator("dialog img").bounding_box()["width"] > 400


@pytest.mark.parametrize("size", SIZES)
def test_without_script_everything_is_there(open_report, reports, size):
    page = open_report(reports["full"], size, java_script_enabled=False).page
    assert page.locator(".handle, .stage").count() == 0
    first = page.locator(".compared").first
    at_once, folded = (first.locator(f"{where} > .side figcaption") for where in (".sides", ".others .more"))
    assert at_once.all_text_contents() == ["Base", "Epoch 26", "Photograph"]
    assert folded.all_text_contents() == ["Epoch 10", "Epoch 20", "Epoch 40"]
    widths = first.locator(".sides > .side img").evaluate_all("all => all.map(e => e.clientWidth)")
    assert min(widths) > 90
    right = "all => Math.max(...all.map(e => e.getBoundingClientRect().right))"
    assert page.locator(".frames img").evaluate_all(right) <= page.viewport_size["width"]
    assert page.locator(".frames:not(.requested) li:visible").count() == 3 * 3
    for hidden in (".choose", ".epoch-slider", ".map-switches select"):
        assert not page.locator(hidden).is_visible()


def test_print_shows_all_and_cuts_nothing(open_report, reports, tmp_path):
    page = open_report(reports["full"]).page
    folded = page.locator("details:not([open])").count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    # tables that stand for charts, and what the run's own files hold
    kept = page.locator("figure.chart details, details.in-file")
    assert page.locator("details:not([open])").count() == kept.count() < folded
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 680, "height": 1000})
    assert page.evaluate(LOW_CONTRAST, MIN_CONTRAST)[1] == []
    assert page.evaluate(OVERFLOW) == [0]
    visible = "all => all.filter(e => e.getBoundingClientRect().width > 20).length"
    assert page.locator(".compared .side img").evaluate_all(visible) == 3 * 5 + 2
    assert page.locator(".stage .after img").evaluate_all(
        "all => all.every(e => getComputedStyle(e).clipPath === 'none')"
    )
    assert page.locator(".frames:not(.requested) img").evaluate_all(visible) == 3 * 3
    assert page.locator(".xyz img").evaluate_all(visible) == 24
    right = "all => Math.max(...all.map(e => e.getBoundingClientRect().right))"
    assert page.locator("img, table").evaluate_all(right) <= 681
    sides = page.locator(".compared .side img").evaluate_all("all => all.map(e => e.getBoundingClientRect().width)")
    assert min(sides) > 100
    for hidden in (".handle", ".choose", ".epoch-slider", ".enlarge", ".map-switches select"):
        assert not page.locator(hidden).first.is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == folded
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 100_000
