"""What the report says of a learning rate test and of pictures drawn on request."""

import dataclasses
import json
import re

import pytest

from safelight.trainer.report.build import render
from safelight.trainer.report.rate_panel import rate_section
from safelight.trainer.report.rate_test_record import ProposedRate
from safelight.trainer.report.requested_panel import MAX_SHOWN, requested_section
from safelight.trainer.report.run_reader import RunFolder, read_run_folder
from tests.trainer.report.conftest import PROMPTS, write_run
from tests.trainer.report.evaluated_run import add_rate_test, add_requested, rate_test
from tests.trainer.report.test_panels import text_of

NONE = ProposedRate(rate=None, low=None, high=None, sureness="none", reason="the loss neither falls nor rises")
GUESS = ProposedRate(rate=1e-6, low=1e-7, high=3e-6, sureness="guess", reason="no rate lowers the loss")
OWN = {"optimizer": {"name": "adamw8bit", "lr": 1e-6}, "train": {"batch_size": 8, "accumulate": 1}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    folder = write_run(
        tmp_path_factory.mktemp("rates") / "run", prompts=PROMPTS[:1], num_epochs=2, edge_px=16, num_examples=1
    )
    add_rate_test(folder)
    add_requested(folder, prompts=PROMPTS[:2], edge_px=16)
    return read_run_folder(folder)


def said_of(run: RunFolder, config: dict, **changes) -> str:
    return text_of(rate_section(dataclasses.replace(run, config=config, rate_test=rate_test(**changes))))


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (OWN, {}, "proposed 4.4e-06 (clear: the fall is far above the scatter of the curve): the loss falls by 5.9 %"),
        (OWN, {}, "Rates from 1.5e-06 to 1.3e-05 are about as good."),
        (OWN, {}, "This run trained with optimizer.lr 1e-06, 4.4 times lower than proposed."),
        ({**OWN, "optimizer": {"lr": 1e-4}}, {}, "optimizer.lr 0.0001, 23 times higher than proposed."),
        ({**OWN, "stage": [{"lr": 2e-6}]}, {}, "This run trained with optimizer.lr 2e-06, which is among them."),
        (OWN, {"proposal": NONE}, "proposed no rate: the loss neither falls nor rises."),
        (OWN, {"proposal": GUESS}, "proposed 1e-06 (a guess: the curve has no fall)"),
        (OWN, {"optimizer": "adamw"}, "The test is of other settings than the run: it trained with adamw8bit at batch"),
        ({**OWN, "stage": [{"batch_size": 2}]}, {}, "it trained with adamw8bit at batch size 2."),
        (OWN, {}, "Not drawn: 3 rates after which the loss is over 1.25 times the first, or not finite."),
        (
            OWN,
            {},
            "8 held-out photographs at 4 timesteps each, after 1 step at each rate with adamw8bit at batch size 8.",
        ),
    ],
)
def test_it_says_what_was_proposed_and_how_the_run_compares(run, config, changes, said):
    assert said in said_of(run, config, **changes)


def test_it_says_nothing_that_is_not_known(run):
    said = said_of(run, {"optimizer": {"lr": "x", "name": 3}, "train": [], "stage": [{"lr": []}]})
    assert "This run" not in said
    assert "other settings" not in said


def test_the_chart_marks_the_proposal_at_its_place_among_the_rates(run):
    data = json.loads(
        re.search(r'data-chart="([^"]*)"', rate_section(run)).group(1).replace("&quot;", '"').replace("&#x27;", "'")
    )
    at, loss, name = data["ring"]
    # 4.4e-6 lies between 3.2e-6 and 5.6e-6, the seventh and the eighth rate
    assert 6 < at < 7
    assert 0.1345 < loss < 0.136
    assert name == "proposed 4.4e-06"
    assert data["ticks"][:3] == ["1e-7", "1.8e-7", "3.2e-7"]
    ((low, high, _),) = data["spans"]
    assert low < at < high
    assert data["curves"][0]["y"][-3:] == [None] * 3


def test_a_run_without_a_test_has_no_section(run):
    assert rate_section(dataclasses.replace(run, rate_test=None)) is None
    assert 'id="rate-test"' in render(run)


def test_pictures_on_request_stand_by_prompt_with_the_step_they_were_drawn_at(run):
    html = requested_section(run)
    assert html.count("<img") == 4
    assert html.count("<figure") == 2
    said = text_of(html)
    assert "asked for 4 pictures; all in full size, with their settings: samples/live/index.html." in said
    assert said.count("step 550") == said.count("step 1,100") == 2
    assert "seed 7, cfg 7, 25 steps, DPM++ 2M" in said


def test_of_many_pictures_on_request_the_newest_are_shown_and_missing_ones_are_counted(run):
    [first, *_] = run.requested
    many = dataclasses.replace(run, requested=(first.model_copy(update={"file": "gone.png"}),) * MAX_SHOWN * 2)
    said = text_of(requested_section(many))
    assert f"asked for 96 pictures, of which the newest {MAX_SHOWN} are shown" in said
    assert f"{MAX_SHOWN} of them are missing or damaged." in said
    assert requested_section(dataclasses.replace(run, requested=())) is None
