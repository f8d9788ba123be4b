"""Figures that are read together have the same number of decimals, chosen by their intervals."""

import math
import re

import pytest

from safelight.output.evaluation_table import print_evaluation
from safelight.trainer.report.chart import Curve, table_of
from safelight.trainer.report.crop_map import crop_section
from safelight.trainer.report.evaluation import Difference, Estimate, Metric
from safelight.trainer.report.figures import Form, form_of
from safelight.trainer.report.measures import measures_section
from safelight.trainer.report.scores import scores_table
from tests.trainer.report.evaluated_run import crop_divergence
from tests.trainer.report.test_advice import with_evaluation

FIGURE = re.compile(r"(?<![\w.])[+−]?\d[\d,]*(?:\.(\d+))?")


def metric(*estimates: tuple[str, float, float, float], differences=()) -> Metric:
    values = [Estimate(model=model, value=value, low=low, high=high, num=100) for model, value, low, high in estimates]
    real = values.pop() if values[-1].model == "real" else None
    return Metric(
        id="kid", title="KID", meaning="", better="lower", values=tuple(values), real=real, differences=differences
    )


KID = metric(("base", 21.0, 18.0, 24.25), ("step-30", 20.94, 18.0, 23.52), ("real", -0.004, -3.06, 5.0))
MINUS_BASE = Difference(model="step-30", value=-0.06, low=-0.3, high=0.18, p=0.6, wins=0, ties=0, losses=0)


def columns_of(html: str) -> list[list[str]]:
    """Return the columns of all tables but their first, as text."""
    columns = []
    for table in re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL):
        rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("</tr>")[:-1]]
        columns += [[re.sub(r"<[^>]+>", "", cell) for cell in column] for column in zip(*rows, strict=True)]
    return columns


def decimals_in(text: str) -> list[int]:
    return [len(decimals) for decimals in FIGURE.findall(text)]


@pytest.mark.parametrize(
    ("values", "intervals", "written"),
    [
        # the narrowest interval has two digits
        ([21.0, 20.94], [(18.0, 24.25), (18.0, 23.52)], ["21.0", "20.9"]),
        ([21.0, 20.94], [(18.0, 31.25), (18.0, 23.52)], ["21.0", "20.9"]),
        ([21.0, 20.94], [(10.0, 31.25), (9.0, 33.52)], ["21", "21"]),
        ([0.9, 0.8764], [(0.88, 0.93), (0.85, 0.91)], ["0.900", "0.876"]),
        ([1234.5, 999.9], [(1100.0, 1300.0)], ["1,234", "1,000"]),
        # ... but the largest figure no more than five, and one without a width decides nothing
        ([123.456, 1.0], [(123.455, 123.457)], ["123.46", "1.00"]),
        ([1.0, 0.5], [(1.0, 1.0), (0.4, 0.6)], ["1.00", "0.50"]),
        ([1.0, 0.5], [(1.0, 1.0)], ["1.00", "0.50"]),
        # without intervals the largest has three
        ([20.0, 3.14159], [], ["20.0", "3.1"]),
        ([1e-9, 2.5e-8], [], ["1.00e−9", "2.50e−8"]),
        ([0.0, math.nan], [], ["0", "nan"]),
        ([], [], []),
    ],
)
def test_pairs_of_figures_have_the_same_decimals(values, intervals, written):
    form = form_of(values, intervals)
    assert [form.show(value) for value in values] == written


def test_signs_are_those_that_people_write():
    assert [Form(1).show(value, signed=True) for value in (1.25, -1.26, -0.04, 0.0)] == ["+1.2", "−1.3", "0.0", "0.0"]
    assert Form(2).show(-0.004) == "0.00"
    assert Form(None).show(-2.5e-7, signed=True) == "−2.50e−7"
    assert Form(0).show(-1e300) == "−1.00e300"
    assert Form(0).show(math.inf) == "inf"


def test_every_column_of_measured_figures_has_one_number_of_decimals():
    named = KID.model_copy(update={"differences": (MINUS_BASE,)})
    html = measures_section(with_evaluation(metrics=(named,)))
    value, _, interval, difference = columns_of(html)
    assert value == ["21.0", "20.9", "0.0"]
    assert interval == ["18.0 to 24.2", "18.0 to 23.5", "−3.1 to 5.0"]
    assert difference[1] == "−0.06 (−0.30 to +0.18)"


def test_sentences_and_the_terminal_write_them_as_tables_do(capsys):
    run = with_evaluation(metrics=(KID,))
    assert "has 20.9, the base 21.0" in measures_section(run)
    print_evaluation(run.evaluation)
    printed = " ".join(capsys.readouterr().out.split())
    assert "21.0 [18.0, 24.2]" in printed
    assert "20.9 [18.0, 23.5]" in printed
    assert "0.0 [−3.1, 5.0]" in printed


def test_tables_of_crops_have_one_number_of_decimals_a_column():
    crops = crop_divergence(60).model_copy(update={"model": "step-30"})
    html = crop_section(with_evaluation(crops=(crops,)))
    columns = columns_of(html)
    # KL, z, p, MMD², z, p and crops; of single classes behind the class
    pooled, of_class = columns[:7], columns[8:]
    for kl, z, _, mmd, mmd_z, _, _ in (pooled, of_class):
        decimals = [{d for cell in column for d in decimals_in(cell)} for column in (kl, z, mmd, mmd_z)]
        assert decimals == [{2}, {1}, {3}, {1}]


def test_scores_of_base_and_trained_model_have_the_same_decimals():
    rows = [{"what": "hue", "base": [0.5, 0.4, 0.6], "trained": [0.875, 0.8, 0.9], "difference": [0.375, 0.25, 0.5]}]
    (cells,) = [[column[0] for column in columns_of(scores_table({"rows": rows}))[1:]]]
    assert cells == ["base0.500.40 to 0.60", "trained0.880.80 to 0.90", "difference+0.38+0.25 to +0.50"]


def test_tables_of_curves_are_written_by_intervals_or_by_typical_values():
    table = table_of([Curve("a", [0, 1], [2.0, 3.0], low=[1.5, 2.5], high=[2.25, 3.5])])
    assert columns_of(table) == [["2.00 (1.50 to 2.25)", "3.00 (2.50 to 3.50)"]]
    spike = table_of([Curve("a", [0, 1, 2], [0.123456, 0.12, 4321.0]), Curve("b", [1], [0.5])])
    assert columns_of(spike) == [["0.12346", "0.12000", "4,321.00000"], ["–", "0.50000", "–"]]
    rates = table_of([Curve("rate", [0, 1], [1e-6, 5e-7])])
    assert columns_of(rates) == [["1.0000e−6", "5.0000e−7"]]
