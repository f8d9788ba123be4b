"""The report's figures and verdicts, compared with values computed from the metrics independently."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from safelight.trainer.report.build import planned_epochs, render, tiles
from safelight.trainer.report.facts import (
    evenly_chosen,
    format_duration,
    headline_facts,
    over_fitting_verdict,
    run_time_s,
    smooth,
)
from safelight.trainer.report.plots import band_names
from safelight.trainer.report.run_reader import Validation, read_run_folder


def curve(*losses: float) -> list[Validation]:
    return [Validation(100 * i, float(i), loss, (), 10) for i, loss in enumerate(losses)]


def test_tiles_equal_the_metrics(full_run: Path) -> None:
    rows = [json.loads(line) for line in (full_run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    held_out = [row for row in rows if row.get("split") == "held_out"]
    best = min(held_out, key=lambda row: row["loss"])
    run = read_run_folder(full_run)
    html = tiles(run, headline_facts(run.metrics))
    for value in (
        ">496<",
        ">40<small> of 40<",
        f">{train[-1]['step']:,} steps<",
        f">{best['loss']:.4f}<",
        f">at epoch {best['epoch']:g}<",
        f">−{100 * (1 - best['loss'] / held_out[0]['loss']):.1f} %<",
        f">{sum(row['images_per_s'] for row in train) / len(train):.3g}<small> images/s<",
        f">{max(row['memory_gib'] for row in train):.2f}<small> GiB<",
        # 40 epochs of 70 s; the ten minutes between the interruption and the resume do not count
        ">46 min 40 s<",
    ):
        assert value in html, value


def test_the_later_of_two_lines_on_one_step_counts(tmp_path: Path, write_metrics) -> None:
    line = {"kind": "train", "step": 5, "epoch": 0.5, "stage": 0, "loss": 9.0, "images_per_s": 1.0, "time": 0}
    write_metrics(tmp_path, [line, {**line, "step": 10, "epoch": 1.0}, {**line, "loss": 1.0}])
    metrics = read_run_folder(tmp_path).metrics
    assert metrics.train["step"].tolist() == [5, 10]
    assert metrics.train["loss"].tolist() == [1.0, 9.0]
    assert (metrics.last_step, metrics.last_epoch) == (10, 1.0)


@pytest.mark.parametrize(("epochs", "num_lines"), [(0.02, 1), (1, 1), (3, 2), (0.4, 3000), (400, 3000)])
def test_runs_of_any_length_can_be_drawn(tmp_path: Path, write_metrics, epochs: float, num_lines: int) -> None:
    lines = [
        {
            "kind": "train",
            "step": i + 1,
            "epoch": epochs * (i + 1) / num_lines,
            "stage": 0,
            "loss": 0.1,
            "lr": 0.0,
            "images_per_s": 1.0,
            "memory_gib": 0.0,
            "time": float(i),
        }
        for i in range(num_lines)
    ]
    bands = {"loss_by_timestep": [0.0] * 10}
    lines += [
        {"kind": "validation", "split": "held_out", "step": 0, "epoch": 0.0, "loss": 0.1, **bands},
        {"kind": "validation", "split": "held_out", "step": num_lines, "epoch": epochs, "loss": 0.1, **bands},
    ]
    write_metrics(tmp_path, lines)
    html = render(read_run_folder(tmp_path))
    assert html.count('<svg class="graph') == 7
    assert "NaN" not in html.split("<script>")[0]


def test_overfitting_if_held_out_loss_rises_and_the_gap_grows() -> None:
    verdict = over_fitting_verdict(curve(0.20, 0.16, 0.15, 0.16, 0.18), curve(0.20, 0.16, 0.145, 0.13, 0.12))
    assert verdict.kind == "overfitting"
    assert verdict.is_warning
    assert verdict.text == (
        "Overfitting since epoch 2: held-out loss was lowest at epoch 2 (0.1500) and has risen by 20.0 % since, to "
        "0.1800, while on the training photographs it fell by 17.2 % (the gap went from +0.0050 to +0.0600). "
        "Use the checkpoint of epoch 2."
    )


def test_a_loss_that_still_falls_is_not_overfitting() -> None:
    verdict = over_fitting_verdict(curve(0.20, 0.18, 0.17, 0.16), curve(0.20, 0.17, 0.15, 0.13))
    assert verdict.kind == "improving"
    assert not verdict.is_warning
    assert "lowest (0.1600) at the last validation, epoch 3" in verdict.text


def test_both_losses_rising_is_not_overfitting() -> None:
    verdict = over_fitting_verdict(curve(0.20, 0.15, 0.16, 0.18), curve(0.20, 0.14, 0.16, 0.18))
    assert verdict.kind == "worsening"
    assert verdict.text.startswith("Not overfitting, but getting worse: held-out loss was lowest at epoch 1")


@pytest.mark.parametrize(
    ("held_out", "kind"),
    [
        ((), "unknown"),
        ((0.2, 0.1), "unknown"),
        ((0.2, 0.15, 0.1501), "level"),
        ((0.2, 0.15, 0.18), "rising"),
        ((0.2, 0.21, 0.25), "no-gain"),
        ((0.2, 0.2, 0.2), "no-gain"),
    ],
)
def test_verdicts_without_a_training_subset(held_out: tuple[float, ...], kind: str) -> None:
    assert over_fitting_verdict(curve(*held_out), []).kind == kind


def test_the_report_opens_with_the_verdict(full_report: Path) -> None:
    text = full_report.read_text(encoding="utf-8")
    assert "was lowest at epoch 26: 6.0 % below that of the base model. The model has been overfitting since." in text
    assert "Overfitting since epoch 26: held-out loss was lowest at epoch 26 (0.1302) and has risen by 3.4 %" in text


def test_run_time_leaves_out_the_pause_before_a_resume() -> None:
    assert run_time_s([(0.0, ""), (10.0, ""), (500.0, "resumed"), (505.0, ""), (504.0, ""), (506.0, "")]) == 16.0
    assert run_time_s([(0.0, ""), (math.nan, "")]) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (86_399, "1 d 0 h"),
        (9e4, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_before_the_first_step_only_the_base_is_known(tmp_path: Path, write_metrics) -> None:
    start = {"kind": "validation", "split": "held_out", "step": 0, "epoch": 0.0, "loss": 0.1}
    write_metrics(tmp_path, [start])
    html = render(read_run_folder(tmp_path))
    assert html.count("No training step has been logged yet. The base model&#x27;s held-out loss is 0.1000.") == 2
    assert '<svg class="graph' not in html
    assert "change from step 0" not in html
    assert ">of the base model<" in html
    write_metrics(tmp_path, [start, {"kind": "train", "step": 5, "epoch": 0.5, "stage": 0, "loss": 0.2}])
    html = render(read_run_folder(tmp_path))
    assert "The base model&#x27;s held-out loss is 0.1000; it has not been measured since." in html
    assert '<svg class="graph wide"' in html


def test_validations_without_a_logged_step_can_be_drawn(tmp_path: Path, write_metrics) -> None:
    points = [
        {"kind": "validation", "split": "held_out", "step": 9 * i, "epoch": float(i), "loss": 0.1} for i in (0, 1)
    ]
    write_metrics(tmp_path, points)
    assert '<svg class="graph wide"' in render(read_run_folder(tmp_path))


def test_smooth_ignores_values_that_are_not_finite() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(smooth(values, 1), [1.0, 2.0, 4.0, 4.0])
    assert np.isnan(smooth(np.array([np.nan]), 3)).all()
    assert len(smooth(np.array([]), 2)) == 0


@pytest.mark.parametrize("num_all", [0, 1, 5, 12, 13, 41, 1000])
def test_evenly_chosen_keeps_both_ends(num_all: int) -> None:
    chosen = evenly_chosen(num_all, 12)
    assert len(chosen) == min(num_all, 12)
    assert chosen == sorted(set(chosen))
    if num_all:
        assert (chosen[0], chosen[-1]) == (0, num_all - 1)


def test_planned_epochs() -> None:
    assert planned_epochs({"stage": [{"epochs": 30}, {"epochs": 10}], "train": {"epochs": 3}}) == 40
    assert planned_epochs({"train": {"epochs": 3}}) == 3
    assert planned_epochs({"train": {"max_steps": 3}}) is None
    assert planned_epochs({"stage": [{"lr": 1.0}]}) is None


def test_band_names_span_the_schedule() -> None:
    assert band_names(4) == ["0–25", "25–50", "50–75", "75–100"]
    assert band_names(10, short=True)[0] == "10"


@pytest.mark.parametrize(("losses", "is_log"), [((0.14, 0.13, 0.135), False), ((0.9, 0.3, 0.1), True)])
def test_loss_that_falls_by_a_large_factor_is_drawn_on_a_log_scale(
    tmp_path: Path, write_metrics, losses: tuple[float, ...], is_log: bool
) -> None:
    lines = [
        {"kind": "validation", "split": "held_out", "step": 9 * i, "epoch": float(i), "loss": loss}
        for i, loss in enumerate(losses)
    ]
    write_metrics(tmp_path, lines)
    assert ("loss (mean squared error, log scale)" in render(read_run_folder(tmp_path))) is is_log
