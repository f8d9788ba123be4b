"""The live report in Chromium: what changes while a run goes on, and what stays as the reader left it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.data.lock import FolderLock
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.live import live_page
from tests.conftest import SMALL_RUN
from tests.trainer.live.client import serving
from tests.trainer.report.chromium import BROKEN_IMAGES, LOW_CONTRAST, MIN_CONTRAST, OVERFLOW, SIZES
from tests.trainer.report.conftest import (
    PROMPTS,
    STEPS_PER_EPOCH,
    _write_samples,
    metrics_lines,
    write_metrics,
    write_run,
)
from tests.trainer.report.evaluated_run import add_comparison

WAIT_MS = 20_000
TITLE = ".chart-title strong"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    for name in ("LOOK_EVERY_S", "MIN_PAUSE_S", "PAUSE_PER_RENDERING"):
        monkeypatch.setattr(live_page, name, 0)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that has come to epoch 10 of 40, with samples every 5 epochs and a comparison."""
    run = write_run(tmp_path / "run", prompts=PROMPTS[:2], num_epochs=10, edge_px=48, sample_every=5, num_examples=2)
    add_comparison(run, prompts=PROMPTS[:2], edge_px=48, epochs=(5, 10))
    return run


def train_on(run: Path, to_epoch: int) -> None:
    write_metrics(run, metrics_lines(to_epoch))
    _write_samples(run, PROMPTS[:2], to_epoch, 48, 0.5)


def ask_often(page) -> None:
    """Ask the server ten times a second, as if the reader kept coming back to the page, which itself asks every 3 s."""
    page.evaluate("setInterval(() => document.dispatchEvent(new Event('visibilitychange')), 100)")


def assert_quiet(opened, address: str) -> None:
    assert opened.messages == []
    assert opened.violations() == []
    origin = address.rsplit("/", 2)[0]
    assert [url for url in opened.requests if not url.startswith((origin, "data:"))] == []
    assert opened.page.evaluate(BROKEN_IMAGES) == 0


@pytest.mark.parametrize("size", SIZES)
def test_newer_parts_come_in_and_what_the_reader_has_set_stays(open_report, run, size):
    with serving(run) as client, FolderLock(run, ""):
        opened = open_report(client.server.address, size)
        page = opened.page
        ask_often(page)
        page.evaluate("window.isSamePage = true")
        assert page.locator(".live .says").inner_text() == "Training goes on: epoch 10 of 40, step 550"
        loss = page.locator("#loss figure.chart").first
        # a curve switched off, zoom, a table unfolded, another checkpoint, the divider moved, an earlier epoch
        loss.locator("button.curve", has_text="as logged").click()
        loss.locator(".plot").press("+")
        loss.locator("details").first.evaluate("one => one.open = true")
        page.locator("#learned .choose label", has_text="epoch 5").click()
        page.locator("#learned .handle").first.evaluate(
            "one => { one.value = 20; one.dispatchEvent(new Event('input')) }"
        )
        slider = page.locator("#samples .epoch-slider input")
        slider.evaluate("one => { one.value = 1; one.dispatchEvent(new Event('input')) }")
        assert page.locator("#samples .epoch-slider output").inner_text().startswith("epoch 5")
        loss.locator(".plot").focus()
        page.locator("#loss h2").evaluate("one => scrollTo(0, one.getBoundingClientRect().top + scrollY - 100)")
        top = page.locator("#loss h2").bounding_box()["y"]
        canvas = loss.locator("canvas").element_handle()

        train_on(run, 16)
        said = page.locator(".live .says", has_text="epoch 16 of 40, step 880")
        said.wait_for(timeout=WAIT_MS)
        page.wait_for_function("canvas => !canvas.isConnected", arg=canvas, timeout=WAIT_MS)
        page.wait_for_function("document.querySelector('#events summary') !== null", timeout=WAIT_MS)
        page.wait_for_timeout(300)

        assert page.evaluate("window.isSamePage")
        assert abs(page.locator("#loss h2").bounding_box()["y"] - top) < 2
        loss = page.locator("#loss figure.chart").first
        assert loss.locator("button.curve", has_text="as logged").get_attribute("aria-pressed") == "false"
        assert loss.locator("button", has_text="Whole run").is_enabled()
        assert loss.locator("details").first.evaluate("one => one.open")
        assert page.evaluate("document.activeElement.className") == "plot"
        assert page.locator("#learned .choose input:checked").get_attribute("value") == f"step-{5 * STEPS_PER_EPOCH}"
        assert page.locator("#learned .side.now").first.get_attribute("data-model") == f"step-{5 * STEPS_PER_EPOCH}"
        assert page.locator("#learned .handle").first.input_value() == "20"
        assert page.locator("#samples .epoch-slider output").inner_text().startswith("epoch 5")
        assert page.locator("#samples .frames li").count() == 2 * 4
        assert page.locator(".tiles .value", has_text="16 of 40").count() == 1
        # one chart in each figure, none left of the older parts
        assert page.locator("#loss figure.chart").count() == page.locator("#loss .uplot").count()
        # pictures that came in are enlarged as the first ones are
        page.locator("#samples .frames li.now .zoom").first.click()
        assert page.locator("dialog img").count() == 1
        page.keyboard.press("Escape")
        # another zoom is one of all charts, new and old
        page.locator("#loss figure.chart").first.locator("button", has_text="Whole run").click()
        assert page.locator("#schedule button", has_text="Whole run").first.is_disabled() or size == "phone"
        assert page.evaluate(OVERFLOW) == [0]
        assert_quiet(opened, client.server.address)


def test_nothing_changes_under_a_pressed_pointer_or_an_enlarged_picture(open_report, run):
    with serving(run) as client, FolderLock(run, ""):
        page = open_report(client.server.address).page
        ask_often(page)
        page.locator("#samples .frames li.now .zoom").first.click()
        train_on(run, 12)
        page.locator(".live .says", has_text="epoch 12 of 40").wait_for(timeout=WAIT_MS)
        page.wait_for_timeout(300)
        assert page.locator(".tiles .value", has_text="10 of 40").count() == 1
        page.keyboard.press("Escape")
        page.locator(".tiles .value", has_text="12 of 40").wait_for(timeout=WAIT_MS)


@pytest.mark.long
def test_the_end_of_a_run_and_of_the_server_are_said(open_report, run):
    with serving(run) as client:
        with FolderLock(run, ""):
            opened = open_report(client.server.address)
            bar = opened.page.locator(".live")
            assert bar.get_attribute("data-state") == "running"
            train_on(run, 40)
        opened.page.locator(".live .says", has_text="Finished").wait_for(timeout=WAIT_MS)
        assert bar.get_attribute("data-state") == "finished"
        assert bar.locator(".when").inner_text().startswith("· changed ")
        opened.page.locator(".tiles .value", has_text="40").first.wait_for(timeout=WAIT_MS)
        assert_quiet(opened, client.server.address)
        server = client.server
        server.shutdown()
        server.server_close()
        opened.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        opened.page.locator(".live.lost .says", has_text="No answer since").wait_for(timeout=WAIT_MS)
        assert bar.locator(".is-live").inner_text() == "Not live"
        assert opened.page.locator("#loss .uplot").count() > 0


@pytest.mark.parametrize("size", SIZES)
def test_the_list_of_runs_leads_to_each_and_back(open_report, run, size):
    with serving(run.parent) as client:
        opened = open_report(client.server.address, size)
        page = opened.page
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(LOW_CONTRAST, MIN_CONTRAST)[1] == []
        assert page.evaluate(OVERFLOW) == [0]
        page.locator("table.listed a").click()
        page.locator("#loss .uplot").first.wait_for(timeout=WAIT_MS)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(LOW_CONTRAST, MIN_CONTRAST)[1] == []
        page.locator(".live a").click()
        page.locator("table.listed").wait_for(timeout=WAIT_MS)
        assert page.url == client.server.address
        assert_quiet(opened, client.server.address)


@pytest.mark.slow
def test_a_run_that_really_trains_is_followed_to_its_end(open_report, tiny_dataset, tmp_path):
    """The command itself, and a tiny run beside it in a process of its own."""
    settings = {**SMALL_RUN, "stage": [{"epochs": 12}], "log": {"tensorboard": False, "every_steps": 1}}
    settings |= {"run": {"dir": str(tmp_path / "runs" / "tiny")}, "data": {"resolution": 64, "path": str(tiny_dataset)}}
    (tmp_path / "run.toml").write_text(to_toml(parse_config(settings, "test")))
    (tmp_path / "runs").mkdir()
    safelight = [sys.executable, "-m", "safelight"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [*safelight, "report", str(tmp_path / "runs"), "--serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    training = None
    try:
        address = server.stdout.readline().strip()
        opened = open_report(address)
        page = opened.page
        page.locator(".live .says", has_text="No run yet").wait_for(timeout=WAIT_MS)
        training = subprocess.Popen([*safelight, "train", str(tmp_path / "run.toml")], env=environment)
        page.locator("table.listed .running").wait_for(timeout=120_000)
        page.locator("table.listed a").click()
        page.locator("#loss .uplot").first.wait_for(timeout=120_000)
        page.evaluate("window.isSamePage = true")
        seen = set()
        while training.poll() is None:
            page.wait_for_timeout(1000)
            seen.add(page.locator(".tiles .meta", has_text="step").first.inner_text())
        assert training.returncode == 0
        assert len(seen) > 2, seen
        page.locator(".live .says", has_text="Finished").wait_for(timeout=60_000)
        page.locator(".tiles .value", has_text="12").first.wait_for(timeout=60_000)
        assert page.evaluate("window.isSamePage")
        assert_quiet(opened, address)
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
        assert (server.returncode, out) == (0, "")
        assert err.startswith("next: open it in a browser on this computer; Ctrl-C ends it.")
        assert "Traceback" not in err
        # read-only: what training wrote is all that there is
        assert not list((tmp_path / "runs").glob("*.html"))
        assert json.loads((tmp_path / "runs" / "tiny" / "model.json").read_text())["base"] == "tiny"
    finally:
        for process in (server, training):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
