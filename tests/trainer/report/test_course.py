"""Stage starts and learning rates of the graphs, compared with the schedule step by step."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from safelight.trainer.config.timeline import Timeline
from safelight.trainer.report.course import learning_rates, stage_starts
from safelight.trainer.report.curves import schedule_section
from safelight.trainer.report.run_reader import read_run_folder
from tests.trainer.report.charts import drawn_charts

# 10 + 3 photographs: 4 steps per epoch in batches of 4, 3 steps in batches of 8
BUCKETS = [{"num_train": 10, "num_validation": 1}, {"num_train": 3, "num_validation": 0}]
CONFIG = """[train]
batch_size = 4
[optimizer]
lr = 3e-4
[[stage]]
epochs = 12
warmup_steps = 5
[[stage]]
epochs = 8
lr = 5e-5
schedule = "cosine"
batch_size = 8
"""
NUM_STEPS = 12 * 4 + 8 * 3


def schedule() -> list[tuple[float, float, int]]:
    """Return (epoch at the end, learning rate, stage) of every step, from the formulas."""
    first = [((i + 1) / 4, 3e-4 * min(1.0, (i + 1) / 6), 0) for i in range(48)]
    return first + [(12 + (i + 1) / 3, 5e-5 * 0.5 * (1 + np.cos(np.pi * i / 24)), 1) for i in range(24)]


def write(
    folder: Path, every: int = 10, last: int = NUM_STEPS, config: str = CONFIG, has_event: bool = True, **changes
):
    """Write a run that is logged every so many steps, as train.py would, and return it as read."""
    lines = []
    for step, (epoch, lr, stage) in enumerate(schedule()[:last], start=1):
        if step == 49 and has_event:
            lines.append({"kind": "event", "step": 49, "event": "stage began", "detail": "2 of 2: 8 epochs, lr 5e-05"})
        if step % every == 0 or step == last:
            row = {"kind": "train", "step": step, "epoch": round(epoch, 6), "stage": stage, "loss": 0.1, "lr": lr}
            lines.append(row | changes)
    (folder / "config.toml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data.json").write_text(json.dumps({"buckets": BUCKETS}))
    return read_run_folder(folder)


@pytest.mark.parametrize("has_event", [True, False])
def test_a_stage_begins_at_the_epoch_given_by_the_settings(tmp_path: Path, has_event: bool) -> None:
    # the next logged step is 50, in epoch 12.67
    assert stage_starts(write(tmp_path, has_event=has_event)) == [(12.0, 1)]


def test_a_stage_that_was_not_reached_is_not_marked(tmp_path: Path) -> None:
    assert stage_starts(write(tmp_path, last=45)) == []
    assert stage_starts(write(tmp_path, last=48)) == []


def test_stage_starts_ignore_settings_that_contradict_the_log(tmp_path: Path) -> None:
    other = CONFIG.replace("epochs = 12", "epochs = 5")
    # the event is at step 49; step 48 is four fifths of the way from step 40 (epoch 10) to step 50 (epoch 12.67)
    [(epoch, stage)] = stage_starts(write(tmp_path, config=other))
    assert stage == 1
    assert epoch == pytest.approx(10 + 0.8 * (12 + 2 / 3 - 10), abs=1e-5)
    assert stage_starts(write(tmp_path, config=other, has_event=False)) == [(pytest.approx(12 + 2 / 3, abs=1e-5), 1)]


@pytest.mark.parametrize("last", [NUM_STEPS, 60, 48, 7, 1])
def test_every_steps_learning_rate_is_drawn(tmp_path: Path, last: int) -> None:
    epochs, rates = learning_rates(write(tmp_path, last=last))
    expected = schedule()[:last]
    np.testing.assert_allclose(epochs, [epoch for epoch, _, _ in expected], rtol=1e-12)
    np.testing.assert_allclose(rates, [lr for _, lr, _ in expected], rtol=1e-12)


def test_the_curve_of_a_long_run_is_thinned_but_keeps_its_corners(tmp_path: Path) -> None:
    config = "[optimizer]\nlr = 1e-4\n[train]\nbatch_size = 1\n"
    config += "[[stage]]\nepochs = 1000\nwarmup_steps = 7\n[[stage]]\nepochs = 10\n"
    line = {"kind": "train", "step": 13_000, "epoch": 1000.0, "stage": 0, "loss": 0.1, "lr": 1e-4}
    (tmp_path / "metrics.jsonl").write_text(
        f"{json.dumps(line)}\n{json.dumps({**line, 'step': 13_130, 'epoch': 1010.0, 'stage': 1})}\n"
    )
    (tmp_path / "config.toml").write_text(config)
    (tmp_path / "data.json").write_text(json.dumps({"buckets": BUCKETS}))
    epochs, rates = learning_rates(read_run_folder(tmp_path))
    assert 600 < len(epochs) < 800
    by_step = dict(zip(np.round(epochs * 13).astype(int).tolist(), rates.tolist(), strict=True))
    assert {1, 7, 8, 13_000, 13_001, 13_130} <= set(by_step)
    assert by_step[7] == pytest.approx(1e-4 * 7 / 8)
    assert by_step[8] == 1e-4
    assert by_step[13_001] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG.replace("3e-4", "2e-4"), {}),  # changed at a resume
        (CONFIG.replace("batch_size = 8", "batch_size = 4"), {}),
        (CONFIG.replace("epochs = 8", "epochs = 7"), {}),
        (CONFIG + "unknown = 1\n", {}),
        ("", {}),
        (CONFIG, {"lr": None}),
    ],
)
def test_settings_that_contradict_the_logged_rates_are_not_drawn(tmp_path: Path, config: str, changes: dict) -> None:
    run = write(tmp_path, config=config, **changes)
    assert learning_rates(run) is None
    html = schedule_section(run)
    assert ("The learning rate is drawn from the logged steps alone" in html) is ("lr" not in changes)


def test_a_run_without_its_buckets_is_drawn_as_logged(tmp_path: Path) -> None:
    write(tmp_path)
    for damaged in ("{}", '{"buckets": [{"num_train": 0}]}', '{"buckets": [{"num_train": "x"}]}'):
        (tmp_path / "data.json").write_text(damaged)
        assert learning_rates(read_run_folder(tmp_path)) is None


def learning_rate_curve(html: str) -> dict:
    """Return the one curve of the learning rate's chart."""
    [curve] = drawn_charts(html)[0]["curves"]
    return curve


def test_the_learning_rate_changes_in_a_step_not_a_ramp(tmp_path: Path) -> None:
    flat = CONFIG.replace("warmup_steps = 5\n", "").replace('schedule = "cosine"\n', "")
    rates = iter([3e-4] * 4 + [5e-5] * 4)
    run = write(tmp_path, config=flat)
    for index in range(len(run.metrics.train["lr"])):
        run.metrics.train["lr"][index] = next(rates)
    curve = learning_rate_curve(schedule_section(run))
    # each value holds back to the end of the step before
    assert curve["look"] == "steps"
    assert (curve["x"][0], curve["x"][-1]) == (0, 20)
    changes = [x for (x, y), (_, then) in pairwise(zip(curve["x"], curve["y"], strict=True)) if y != then]
    assert changes == [12]


def test_the_logged_learning_rate_breaks_where_a_stage_begins(tmp_path: Path) -> None:
    run = write(tmp_path, config="")
    curve = learning_rate_curve(schedule_section(run))
    # steps 10 to 40 and 50 to 72 are separate lines
    gap = curve["y"].index(None)
    assert curve["y"].count(None) == 1
    assert curve["x"][gap - 1] == 10 < curve["x"][gap] < curve["x"][gap + 1]


def test_the_timeline_has_the_steps_that_these_tests_assume(tmp_path: Path) -> None:
    from safelight.trainer.report.course import _timeline

    timeline = _timeline(write(tmp_path))
    assert isinstance(timeline, Timeline)
    assert timeline.num_steps == NUM_STEPS
    assert [steps.numbers for steps in timeline.stage_steps] == [(4,), (3,)]
