"""Measure how often over-fitting is said where there is none, and how soon where there is, on drawn validations.

    python -m tools.over_fitting [--runs 2000] [--append FILE]

False alarms: held-out losses that fall, stay level, or fall ever more slowly, about which validations scatter; the loss
on training photographs falls all along, so that nothing else keeps the test from raising an alarm. A run counts if it
is said to over-fit after any of its validations. Besides independent normal scatter, which the bound is for: scatter
that all ranges share, with heavy tails, that carries over from one validation to the next, and as recorded: carrying
over, with the correlations of a run of the tiny base on four photographs.

Found: held-out losses that turn after the eighth validation and rise by so much a validation. Reported are the
validations from the turn to the alarm, and how often the turn lies in the interval that is given for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from safelight.bench.core.results import append, make_record
from safelight.output.show import print_table
from safelight.trainer.metrics.over_fitting import (
    CARRIED,
    CONFIDENCE,
    FALSE_ALARMS,
    MIN_WINDOW,
    PARTS,
    Curve,
    due_tests,
    evidence,
    over_fitting,
)

NUM_RANGES, TURN, SEED = 4, 8, 19
LENGTHS = (10, 24, 50, 100)
SCATTERS = (0.0005, 0.002, 0.01, 0.05, 0.1)
# name -> relative loss after so many validations
SHAPES = {
    "falls": lambda t: 1 - 0.05 * (1 - np.exp(-t / 4)),
    "falls far": lambda t: 0.3 + 0.7 * np.exp(-t / 3),
    "level": lambda t: np.ones_like(t),
    "slow": lambda t: 1 - 0.1 * t / (t + 20),
}
KINDS = ("independent", "shared", "heavy tails", "carries over", "as recorded")
# of a run of the tiny base at 3e-4, two steps an epoch, validated every second one: scatter relative to its mean of the
# ranges of held-out and of training photographs, correlations of the ranges, and of held-out with training photographs
RECORDED_SCATTER = np.array([[0.6, 0.9, 0.75, 1.75], [1.6, 1.4, 1.25, 2.5]])
RECORDED_RANGES = np.array([[1, 0.7, 0.5, 0], [0.7, 1, 0.5, 0], [0.5, 0.5, 1, 0], [0, 0, 0, 1]])
RECORDED_BOTH = np.array([0.48, 0.48, 0.48, 0.92])
RISES = (0.002, 0.005, 0.02)


def scatter_of(kind: str, runs: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """Return scatter of held-out and training photographs, (2, runs, num, ranges), of held-out ones of variance 1."""
    shape = (2, runs, num, NUM_RANGES)
    if kind == "shared":
        return np.broadcast_to(rng.standard_normal((1, runs, num, 1)), shape)
    if kind == "heavy tails":
        return rng.standard_t(3, shape) / np.sqrt(3)
    if kind == "as recorded":
        alike = scatter_of("carries over", runs, num, rng)[0]
        apart = scatter_of("carries over", runs, num, rng)
        drawn = (np.sqrt(RECORDED_BOTH) * alike + np.sqrt(1 - RECORDED_BOTH) * apart) @ np.linalg.cholesky(
            RECORDED_RANGES
        ).T
        return drawn * RECORDED_SCATTER[:, None, None]
    drawn = rng.standard_normal(shape)
    if kind == "carries over":
        for place in range(1, num):
            drawn[:, :, place] = CARRIED * drawn[:, :, place - 1] + np.sqrt(1 - CARRIED**2) * drawn[:, :, place]
    return drawn


def first_alarms(epochs: np.ndarray, held_out: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """Return the number of validations after which each run is first said to over-fit, one more than it has if never.

    held_out, subset: (runs, N, ranges).
    """
    held_out, subset = held_out / held_out[:, :1], subset / subset[:, :1]
    num = len(epochs)
    first, left = np.full(len(held_out), num + 1), np.arange(len(held_out))
    for place in range(MIN_WINDOW, num + 1):
        found = np.zeros(len(left), dtype=bool)
        if tests := due_tests(place):
            curves = held_out[left, :place], subset[left, :place]
            found = evidence(epochs[:place], *curves, tests).is_over_fitting.any(axis=-1)
        first[left[found]] = place
        left = left[~found]
    return first


def false_alarms(shape: str, kind: str, scatter: float, runs: int, rng: np.random.Generator) -> dict:
    """Return the share of runs of each length that are said to over-fit."""
    epochs = np.arange(LENGTHS[-1], dtype=np.float64)
    means = np.stack([SHAPES[shape](epochs), 1 - 0.3 * epochs / (epochs + 30)])
    drawn = means[:, None, :, None] * (1 + scatter * scatter_of(kind, runs, len(epochs), rng))
    first = first_alarms(epochs, *drawn)
    shares = {str(num): float(np.mean(first <= num)) for num in LENGTHS}
    return {"shape": shape, "kind": kind, "scatter_share": scatter, "false_alarm_share": shares}


def detection(rise: float, scatter: float, runs: int, rng: np.random.Generator, kind: str = KINDS[0]) -> dict:
    """Return how soon runs are found to over-fit that do so from TURN on, and how good the given epochs are."""
    epochs = np.arange(LENGTHS[-1], dtype=np.float64)
    after = np.maximum(0, epochs - TURN)
    means = np.stack([1 - 0.05 * (1 - np.exp(-np.minimum(epochs, TURN) / 4)) + rise * after, 1 - 0.005 * epochs])
    drawn = means[:, None, :, None] * (1 + scatter * scatter_of(kind, runs, len(epochs), rng))
    first = first_alarms(epochs, *drawn)
    told = []
    for run in np.flatnonzero((first <= len(epochs)) & (first > TURN + 1))[:300]:
        one = over_fitting(Curve(epochs, *drawn[:, run]).upto(int(first[run])))
        told.append((abs(one.epoch - TURN), one.between[0] <= TURN <= one.between[1], np.ptp(one.between)))
    error, is_inside, width = np.array(told, dtype=np.float64).T if told else np.full((3, 1), np.nan)
    waits = np.sort(first - 1 - TURN)
    return {
        "rise_share": rise,
        "kind": kind,
        "scatter_share": scatter,
        "found_share": float(np.mean(first <= len(epochs))),
        "early_alarm_share": float(np.mean(first <= TURN + 1)),
        "validations_to_alarm_p50_p90": [int(waits[len(waits) // 2]), int(waits[len(waits) * 9 // 10])],
        "error_of_epoch_p50_p90": [float(np.quantile(error, q)) for q in (0.5, 0.9)],
        "turn_in_interval_share": float(is_inside.mean()),
        "interval_width_p50": float(np.median(width)),
    }


def measure(runs: int) -> dict:
    """Return all figures."""
    rng = np.random.default_rng(SEED)
    alarms = [false_alarms(shape, "independent", scatter, runs, rng) for shape in SHAPES for scatter in SCATTERS]
    alarms += [
        false_alarms(shape, kind, scatter, runs, rng)
        for kind in KINDS[1:]
        for shape in ("falls", "level")
        for scatter in (0.002, 0.01, 0.05)
    ]
    few = max(100, runs // 4)
    found = [detection(rise, scatter, few, rng) for rise in RISES for scatter in SCATTERS[:4]]
    found += [detection(rise, scatter, few, rng, KINDS[-1]) for rise in RISES for scatter in SCATTERS[2:4]]
    return {"false_alarms": alarms, "detection": found}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="runs of each kind; a quarter of them for what is found")
    parser.add_argument("--append", type=Path, help="append the figures to this file of result lines")
    parser.add_argument("--note", default="", help="a note for the result line")
    options = parser.parse_args()
    figures = measure(options.runs)
    rows = [
        (
            row["shape"],
            row["kind"],
            f"{100 * row['scatter_share']:g} %",
            *(f"{100 * share:.2f} %" for share in row["false_alarm_share"].values()),
        )
        for row in figures["false_alarms"]
    ]
    columns = ("held-out loss", "scatter is", "scatter", *(f"{num} validations" for num in LENGTHS))
    print_table("runs without over-fitting that are said to over-fit", columns, rows)
    rows = [
        (
            f"{100 * row['rise_share']:g} %",
            row["kind"],
            f"{100 * row['scatter_share']:g} %",
            f"{100 * row['found_share']:.1f} %",
            " / ".join(map(str, row["validations_to_alarm_p50_p90"])),
            " / ".join(f"{value:g}" for value in row["error_of_epoch_p50_p90"]),
            f"{100 * row['turn_in_interval_share']:.0f} %",
        )
        for row in figures["detection"]
    ]
    columns = ("rise", "scatter is", "scatter", "found", "validations until then", "error of the epoch", "turn inside")
    print_table("runs that over-fit (half / nine tenths of them)", columns, rows)
    if options.append:
        config = {
            "runs": options.runs,
            "ranges": NUM_RANGES,
            "seed": SEED,
            "turn": TURN,
            "bound_share": FALSE_ALARMS,
            "confidence_share": CONFIDENCE,
            "carried": CARRIED,
            "parts": {str(length): part for length, part in PARTS.items()},
        }
        append(options.append, make_record("over_fitting", config, figures, torch.device("cpu"), options.note))


if __name__ == "__main__":
    main()
