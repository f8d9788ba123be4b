"""The check that figures in README and docs come from result lines."""

import tomllib
from pathlib import Path

import pytest

from safelight.bench.core.results import append
from tests.docs.quoted_figures import QUOTED, check, is_recorded, quotes, recorded

ROOT = Path(__file__).resolve().parents[2]


def test_every_quoted_figure_is_in_a_result_line():
    missing, too_many = check(ROOT)
    places = [f"{quote.file}:{quote.line}: {quote.text}" for quote in missing]
    assert places == [], "commit the result line (bench --append), or declare the figure in bench/results/quoted.toml"
    assert too_many == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("took 148 s (x)", [("148", "s")]),
        ("in 2 min 37 s,", [("157", "s")]),
        ("33.68 images/s, 1.27 GiB at most", [("33.68", "images/s"), ("1.27", "GiB")]),
        ("| 78 % [66, 87] |", [("78", "%"), ("66", "%"), ("87", "%")]),
        ("3,278 launches and 13.4 GB", [("3278", "launches"), ("13.4", "GB")]),
        ("`--minutes 8 s` of 512 px, SD1.5 s", []),
        ("text\n\n    8 s of code\n\nmore 9 s\n    in a list 7 s", [("9", "s"), ("7", "s")]),
        ("```\n5 s\n```\n6 s", [("6", "s")]),
    ],
)
def test_figures_with_units_are_extracted(text, expected):
    assert [(q.value, q.unit) for q in quotes(text, "x.md")] == expected


def test_an_invented_figure_is_reported_and_a_declared_one_passes(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("It makes 43.1 images/s here and 987.65 images/s there, in 12345 s.\n")
    declared = tmp_path / "quoted.toml"
    declared.write_text("")
    missing, too_many = check(tmp_path, declared)
    assert [q.text for q in missing] == ["987.65 images/s", "12345 s"]
    assert too_many == []
    declared.write_text(
        '[[definition]]\ntext = "987.65 images/s there"\nwhy = "made up"\n'
        '[[unrecorded]]\nfile = "README.md"\nat_most = 0\ntexts = ["12345 s"]\n'
    )
    missing, too_many = check(tmp_path, declared)
    assert missing == []
    assert too_many == ["README.md: 1 figures without a result line, 0 declared"]


@pytest.mark.parametrize(
    "predicted",
    [
        {"figures": {"exact none 1": {"predicted_images_per_s": 4.436}}},
        {"figures": {"predicted": {"images_per_s": 4.436}}},
        {"figures": {"images_per_s": 4.436}, "note": "a prediction; no GPU was measured"},
    ],
)
def test_a_prediction_does_not_count_as_recorded(predicted, tmp_path):
    (quote,) = quotes("A T4 makes 4.44 images/s.", "README.md")
    measured = {"figures": {"images_per_s": 4.4361}, "note": "a T4"}
    append(tmp_path / "r.jsonl", predicted)
    assert not is_recorded(quote, recorded(tmp_path))
    append(tmp_path / "r.jsonl", measured)
    assert is_recorded(quote, recorded(tmp_path))


def test_every_declared_definition_says_why():
    tables = tomllib.loads(QUOTED.read_text())
    assert all(entry["text"] and entry["why"] for entry in tables["definition"])
