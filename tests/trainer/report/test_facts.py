"""The report's figures and verdicts, compared with values computed from the metrics independently."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from safelight.trainer.report.build import render, tiles
from safelight.trainer.report.course import planned_end
from safelight.trainer.report.curves import band_names
from safelight.trainer.report.facts import (
    evenly_chosen,
    format_duration,
    headline_facts,
    over_fitting_verdict,
    run_time_s,
    smooth,
    steps_averaged,
)
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
        # every line is the mean of 5 steps
        f">{len(train) / sum(1 / row['images_per_s'] for row in train):.3g}<small> images/s<",
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
    assert html.count("data-chart=") == 5
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


def test_what_scatter_may_explain_is_possibly_overfitting() -> None:
    """The rule of the run's own warning: with enough validations to tell how they scatter, it says how sure it is."""

    def points(losses: np.ndarray) -> list[Validation]:
        return [Validation(i, float(i), loss, (loss, loss / 2), 10) for i, loss in enumerate(losses.tolist())]

    rng, epochs = np.random.default_rng(2), np.arange(24)
    held_out, subset = 0.2 - 0.01 * np.minimum(epochs, 4), 0.2 - 0.003 * epochs
    wild = held_out * (1 + 0.05 * rng.standard_normal(24))
    wild[-1] = 0.175
    verdict = over_fitting_verdict(points(wild), points(subset))
    assert verdict.kind == "rising"
    assert verdict.text.startswith("Possibly overfitting: held-out loss was lowest at epoch ")
    assert verdict.text.endswith(("scatter too much to tell.", " of 100 runs."))
    warned = over_fitting_verdict(points(wild), points(subset), is_warned=True)
    assert warned.kind == "overfitting"
    clear = held_out + 0.002 * np.maximum(0, epochs - 4)
    assert over_fitting_verdict(points(clear), points(subset)).kind == "overfitting"


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
    assert (
        "was lowest at epoch 26: 6.0\u00a0% below that of the base model. The model has been overfitting since." in text
    )
    assert (
        "Overfitting since epoch 26: held-out loss was lowest at epoch 26 (0.1302) and has risen by 3.4\u00a0%" in text
    )


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
    assert html.count("No training step has been logged so far. The base model&#x27;s held-out loss is 0.1000.") == 2
    assert "data-chart=" not in html
    assert "change from step 0" not in html
    assert ">of the base model<" in html
    write_metrics(tmp_path, [start, {"kind": "train", "step": 5, "epoch": 0.5, "stage": 0, "loss": 0.2}])
    html = render(read_run_folder(tmp_path))
    assert "The base model&#x27;s held-out loss is 0.1000; it has not been measured since." in html
    assert "data-chart=" in html


def test_validations_without_a_logged_step_can_be_drawn(tmp_path: Path, write_metrics) -> None:
    points = [
        {"kind": "validation", "split": "held_out", "step": 9 * i, "epoch": float(i), "loss": 0.1} for i in (0, 1)
    ]
    write_metrics(tmp_path, points)
    assert "data-chart=" in render(read_run_folder(tmp_path))


def test_smooth_ignores_values_that_are_not_finite() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    # nearness 3, 2, 1 over at most five values
    expected = [(3 * 1 + 1 * 3) / 4, (2 * 1 + 2 * 3 + 1 * 5) / 5, (1 * 1 + 3 * 3 + 2 * 5) / 6, (2 * 3 + 3 * 5) / 5]
    np.testing.assert_allclose(smooth(values, 1), expected)
    np.testing.assert_allclose(smooth(values, 1, at=[0, 3]), [expected[0], expected[3]])
    assert np.isnan(smooth(np.array([np.nan]), 3)).all()
    assert len(smooth(np.array([]), 2)) == 0


def test_a_smoothed_curve_of_equal_values_is_level_to_its_ends() -> None:
    np.testing.assert_allclose(smooth(np.full(50, 0.2), 4, np.linspace(0.1, 3, 50)), 0.2)


def test_the_last_logged_value_counts_by_the_steps_that_it_averages(tmp_path: Path, write_metrics) -> None:
    # the run ends one step after its last full line: that line holds one step, the others ten
    steps = [10 * (i + 1) for i in range(20)] + [201]
    lines = [
        {"kind": "train", "step": step, "epoch": step / 100, "stage": 0, "loss": 5.0 if step == 201 else 1.0}
        for step in steps
    ]
    write_metrics(tmp_path, lines)
    metrics = read_run_folder(tmp_path).metrics
    weights = steps_averaged(metrics)
    assert weights.tolist() == [10.0] * 20 + [1.0]
    # nearness 5 of the last, 4, 3, 2 and 1 of those before it
    [end] = smooth(metrics.train["loss"], 2, weights, at=[20])
    assert end == pytest.approx((5 * 1 * 5.0 + (4 + 3 + 2 + 1) * 10 * 1.0) / (5 * 1 + 10 * 10))
    assert end < 1.2


def smoothed_by_formula(values: np.ndarray, weights: np.ndarray, half_width: int) -> list[float]:
    """Return the means written out, term by term."""
    means = []
    for i in range(len(values)):
        near = [(j, 2 * half_width + 1 - abs(i - j)) for j in range(len(values)) if abs(i - j) <= 2 * half_width]
        total = sum(share * weights[j] for j, share in near)
        means.append(sum(share * weights[j] * values[j] for j, share in near) / total)
    return means


def test_smoothing_is_the_weighted_mean_that_it_says() -> None:
    generator = np.random.default_rng(5)
    values, weights = generator.normal(size=31), generator.uniform(0.5, 10, 31)
    np.testing.assert_allclose(smooth(values, 3, weights), smoothed_by_formula(values, weights, 3), rtol=1e-12)


@pytest.mark.parametrize("num_all", [0, 1, 5, 12, 13, 41, 1000])
def test_evenly_chosen_keeps_both_ends(num_all: int) -> None:
    chosen = evenly_chosen(num_all, 12)
    assert len(chosen) == min(num_all, 12)
    assert chosen == sorted(set(chosen))
    if num_all:
        assert (chosen[0], chosen[-1]) == (0, num_all - 1)


@pytest.mark.parametrize(
    ("config", "planned"),
    [
        ("[[stage]]\nepochs = 30\n[[stage]]\nepochs = 10\n", (None, 40)),
        ("[train]\nepochs = 3\n", (None, 3)),
        ("[train]\nmax_steps = 3\n", (3, None)),
        ("[[stage]]\nlr = 1.0\n", (None, None)),
        ("", (None, None)),
    ],
)
def test_the_planned_end_without_the_runs_buckets(tmp_path: Path, config: str, planned: tuple) -> None:
    (tmp_path / "config.toml").write_text(config)
    assert planned_end(read_run_folder(tmp_path)) == planned


def test_a_limit_of_steps_is_the_planned_end(tmp_path: Path, write_metrics) -> None:
    (tmp_path / "config.toml").write_text("[train]\nbatch_size = 1\nepochs = 4\nmax_steps = 15\n")
    (tmp_path / "data.json").write_text('{"buckets": [{"num_train": 10, "num_validation": 1}]}')
    assert planned_end(read_run_folder(tmp_path)) == (15, 1.5)
    for step, note in ((15, "15 steps, as many as train.max_steps allows"), (14, "14 steps")):
        write_metrics(tmp_path, [{"kind": "train", "step": step, "epoch": step / 10, "stage": 0, "loss": 0.1}])
        run = read_run_folder(tmp_path)
        assert f">{note}<" in tiles(run, headline_facts(run.metrics))


def test_band_names_span_the_schedule() -> None:
    assert band_names(4) == ["0–25", "25–50", "50–75", "75–100"]


@pytest.mark.parametrize(("losses", "is_log"), [((0.14, 0.13, 0.135), False), ((0.9, 0.3, 0.1), True)])
def test_loss_that_falls_by_a_large_factor_is_drawn_on_a_log_scale(
    tmp_path: Path, write_metrics, losses: tuple[float, ...], is_log: bool
) -> None:
    lines = [
        {"kind": "validation", "split": "held_out", "step": 9 * i, "epoch": float(i), "loss": loss}
        for i, loss in enumerate(losses)
    ]
    write_metrics(tmp_path, lines)
    assert ("mean squared error, log scale" in render(read_run_folder(tmp_path))) is is_log
