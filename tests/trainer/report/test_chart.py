"""The charts' markup and data: nothing is lost that a reader looks for, nothing is too large, all is escaped."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from safelight.trainer.report.chart import (
    DISTINCT,
    MAX_POINTS,
    PART,
    RAMP,
    Curve,
    chart,
    is_wide,
    table_of,
    thinned,
)
from safelight.trainer.report.markup import Markup
from safelight.trainer.report.theme import asset
from tests.trainer.report.charts import drawn_charts

NO_TABLE = Markup("")
# uPlot 1.6.32 as its authors published it (npm): dist/uPlot.iife.min.js, dist/uPlot.min.css, LICENSE
UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


def test_the_library_is_the_published_one_and_its_licence_stands_in_every_page() -> None:
    for name, digest in UPLOT.items():
        assert hashlib.sha256(asset(f"uplot/{name}").encode()).hexdigest() == digest, name
    folder = Path(__file__).parents[3] / "trainer" / "report" / "uplot"
    assert sorted(path.name for path in folder.iterdir()) == sorted(UPLOT)
    assert asset("uplot/LICENSE") in PART.js
    assert "Copyright (c) 2022 Leon Sorokin" in PART.js
    assert asset("uplot/uPlot.iife.min.js") in PART.js
    assert "</script" not in PART.js.lower()
    assert "</style" not in PART.css.lower()


def test_every_colour_that_curves_may_have_is_in_the_style_sheets_and_read_by_the_script() -> None:
    css = asset("theme.css") + PART.css
    for name in (*DISTINCT, *RAMP):
        # in light and dark mode and on paper
        assert css.count(f"--{name}:") == 3, name
        assert f".s-{name}{{" in css
        assert f".f-{name}{{" in css
        assert f"'{name}'" in PART.js


@pytest.mark.parametrize("num", [0, 1, 5, MAX_POINTS, MAX_POINTS + 1, 50_000])
def test_thinning_keeps_ends_and_extremes_and_is_bounded(num: int) -> None:
    values = np.random.default_rng(1).normal(size=num)
    if num:
        values[num // 3], values[num // 2] = 99, -99
    chosen = thinned(values)
    assert len(chosen) == min(num, len(chosen)) <= MAX_POINTS
    assert chosen == sorted(set(chosen))
    if num:
        assert (chosen[0], chosen[-1]) == (0, num - 1)
        assert {num // 3, num // 2} <= set(chosen)
    if num <= MAX_POINTS:
        assert chosen == list(range(num))


def test_every_part_of_a_thinned_curve_keeps_its_lowest_and_highest_value() -> None:
    values = np.random.default_rng(2).normal(size=20_000)
    chosen = set(thinned(values, 200))
    for low in range(0, 20_000 - 500, 500):
        # parts have 202 or 203 values: those around the window's middle lie in it as a whole
        inside = [values[i] for i in chosen if low <= i < low + 500]
        assert min(inside) <= np.sort(values[low + 203 : low + 297])[0]
        assert max(inside) >= np.sort(values[low + 203 : low + 297])[-1]


def test_a_stretch_without_finite_values_stays_a_gap() -> None:
    values = np.ones(20_000)
    values[5000:9000] = math.nan
    curve = drawn_charts(chart("x", [Curve("a", range(20_000), values)], NO_TABLE))[0]["curves"][0]
    gap = [x for x, y in zip(curve["x"], curve["y"], strict=True) if y is None]
    assert min(gap) >= 5000 > min(gap) - 20
    assert max(gap) < 9000 < max(gap) + 20
    assert set(curve["y"]) == {1, None}


def test_text_is_escaped_and_values_are_json() -> None:
    attack = '</figure><script>alert(1)</script>" onx="'
    page = chart(
        attack,
        [Curve(attack, [0, 1, 2], [1.0, math.inf, -math.nan], low=[0.5, 1, 1], high=[math.nan, 1, 2])],
        NO_TABLE,
        detail=attack,
        label=attack,
        note=attack,
        x_name=attack,
        unit=attack,
        stages=[(1.0, attack)],
        spans=[(0.0, 1.0, attack)],
        ring=(1.0, 1.0, attack),
    )
    assert "<script" not in page
    assert '" onx="' not in page
    [data] = drawn_charts(page)
    assert data["curves"][0]["name"] == data["x"] == data["ring"][2] == data["stages"][0][1] == attack
    assert data["curves"][0]["y"] == [1, None, None]
    assert data["curves"][0]["high"] == [None, 1, 2]
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize(
    ("values", "power", "said"),
    [([1e-6, 5e-7], -6, "×10⁻⁶"), ([0.0, 9.999e-5], -4, "×10⁻⁴"), ([0.1, 0.2], 0, ""), ([0.0], 0, ""), ([], 0, "")],
)
def test_small_values_are_written_in_powers_of_ten(values: list, power: int, said: str) -> None:
    page = chart("rate", [Curve("a", range(len(values)), values)], NO_TABLE)
    assert drawn_charts(page)[0]["power"] == power
    assert (said in page) if said else "×10" not in page


def test_the_step_of_an_epoch_is_kept_where_its_rate_changes() -> None:
    steps = [(i / 10, i) for i in range(101)] + [(10 + i / 5, 100 + i) for i in range(1, 51)]
    [data] = drawn_charts(chart("x", [Curve("a", [0], [1])], NO_TABLE, steps=steps))
    assert data["steps"] == [[0, 0], [10, 100], [20, 150]]


def test_few_values_are_tabulated_all_and_many_by_their_means() -> None:
    few = table_of([Curve("a", [0, 1], [0.5, 0.25]), Curve("b", [1, 2], [3, math.nan])])
    assert '<th scope="row">1</th><td>0.25000</td><td>3.00000</td>' in few
    assert '<th scope="row">2</th><td>–</td><td>–</td>' in few
    x = np.linspace(0, 16, 1601)
    many = table_of([Curve("a", x, np.where(x > 15, 7.0, 2 * x))])
    assert many.count("<tr>") == 17
    assert '<th scope="row">0 to 1</th><td>1.000 (0.000 to 2.000)</td>' in many
    assert '<th scope="row">15 to 16</th><td>7.000</td>' in many
    assert "Table of these values: mean (lowest to highest) of 16 equal parts" in many


def test_an_interval_stands_beside_its_value_in_the_table() -> None:
    table = table_of([Curve("a", [0, 1], [2.0, 3.0], low=[1.5, 2.5], high=[2.25, 3.5])])
    assert "<td>2.00 (1.50 to 2.25)</td>" in table
    assert "<td>3.00 (2.50 to 3.50)</td>" in table


@pytest.mark.parametrize(
    ("values", "wide"), [([0.1, 0.2], False), ([0.1, 0.9], True), ([0.0, 9.0], False), ([math.nan], False), ([], False)]
)
def test_values_far_apart_are_drawn_on_a_log_scale(values: list, wide: bool) -> None:
    assert is_wide(values) is wide
