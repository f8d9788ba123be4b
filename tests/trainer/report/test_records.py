"""Records of compare, evaluate and grid as the report reads them: of this version, of an earlier one, damaged."""

import json
from pathlib import Path

import pytest

from safelight.trainer.report.build import build_report
from safelight.trainer.report.records import (
    MAX_VALUES,
    read_comparison,
    read_evaluation,
    read_grids,
    read_rate_test,
    read_requested,
)
from safelight.trainer.report.run_reader import read_run_folder
from tests.trainer.report.conftest import PROMPTS, write_run
from tests.trainer.report.evaluated_run import (
    add_comparison,
    add_evaluation,
    add_grid,
    add_rate_test,
    add_requested,
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    comparison = add_comparison(tmp_path, prompts=PROMPTS[:2], edge_px=16, epochs=(20, 26, 40))
    evaluation = add_evaluation(tmp_path, comparison, num_points=9)
    grid = add_grid(tmp_path, "cfg", edge_px=16)
    problems: list[str] = []
    assert read_comparison(tmp_path, problems) == comparison
    assert read_evaluation(tmp_path, problems) == evaluation
    tested = add_rate_test(tmp_path)
    assert read_rate_test(tmp_path, problems) == tested
    requested = add_requested(tmp_path, prompts=PROMPTS[:2], edge_px=16)
    assert read_requested(tmp_path, problems) == requested.images
    [saved] = read_grids(tmp_path, problems)
    assert (saved.grid, saved.name, saved.folder) == (grid, "cfg", "grids/cfg")
    assert problems == []


def test_nothing_is_no_problem(tmp_path: Path) -> None:
    problems: list[str] = []
    assert read_comparison(tmp_path, problems) is None
    assert read_evaluation(tmp_path, problems) is None
    assert read_grids(tmp_path, problems) == []
    assert read_rate_test(tmp_path, problems) is None
    assert read_requested(tmp_path, problems) == ()
    assert problems == []


def test_pairs_of_an_earlier_version_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", prompts=PROMPTS[:2], num_epochs=1, edge_px=16, num_examples=1)
    images = json.loads((run / "compare" / "index.json").read_text())["rows"]
    pairs = [
        {
            "prompt": row["prompt"],
            "seed": 7,
            "cfg": 7.5,
            "num_steps": 30,
            "base": row["images"]["base"],
            "trained": row["images"]["step-1430"],
        }
        for row in images
    ]
    old = {"base": "base", "trained": "trained", "step": 55, "pairs": pairs}
    (run / "compare" / "index.json").write_text(json.dumps(old))
    comparison = read_run_folder(run).comparison
    assert [model.id for model in comparison.models] == ["base", "step-55"]
    assert comparison.rows[0].images == {"base": "base-000.png", "step-55": "step-1430-000.png"}
    html = build_report(run).read_text()
    assert "could not be read" not in html
    # the epoch, which pairs did not record, is the log's
    assert html.count('alt="Epoch 1: ') == 2
    (run / "compare" / "index.json").write_text(json.dumps({**old, "pairs": [3]}))
    assert read_run_folder(run).problems == [
        "compare/index.json could not be read: not pairs as an earlier version wrote them"
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "could not be read: Invalid JSON"),
        (b"[]", "could not be read: Input should be an object"),
        (b'{"models": "x"}', "could not be read: models: Input should be a valid"),
        (b'{"a": [' + b"1," * MAX_VALUES + b"1]}", f"could not be read: it has more than {MAX_VALUES:,} values"),
        (b"[" * 1000, "could not be read: Invalid JSON: recursion limit exceeded"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    others = ("find_lr/result.json", "samples/live/images.json")
    for name in ("compare/index.json", "evaluation.json", "grids/one/index.json", *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    problems: list[str] = []
    assert read_comparison(tmp_path, problems) is None
    assert read_evaluation(tmp_path, problems) is None
    assert read_grids(tmp_path, problems) == []
    assert len(problems) == 3
    if said.startswith("could not be read: models"):
        problems.pop()
    else:
        assert read_rate_test(tmp_path, problems) is None
        assert read_requested(tmp_path, problems) == ()
        assert len(problems) == 5
    assert all(said in problem for problem in problems), problems


def test_records_out_of_the_run_are_not_read(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    add_grid(outside, "one", edge_px=16)
    run.mkdir()
    (run / "grids").symlink_to(outside / "grids")
    (run / "evaluation.json").symlink_to(outside / "grids" / "one" / "index.json")
    problems: list[str] = []
    assert read_grids(run, problems) == []
    assert read_evaluation(run, problems) is None
    assert len(problems) == 2
    assert all("leads out of this folder" in problem for problem in problems)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rates": [1e-5, 1e-6]}, "rates, losses and training are not equally long"),
        ({"rates": [2.0] * 16}, "rates do not ascend"),
        ({"losses": [-1.0] * 16}, "losses.0: Input should be greater than or equal to 0"),
        ({"version": 2}, "version: Input should be 1"),
        ({"proposal": {"rate": 1.0, "low": 2.0, "high": 3.0, "sureness": "clear", "reason": ""}}, "do not go together"),
        (
            {"proposal": {"rate": 1.0, "low": 1.0, "high": None, "sureness": "clear", "reason": ""}},
            "do not go together",
        ),
    ],
)
def test_a_rate_test_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict, said: str) -> None:
    values = json.loads(add_rate_test(tmp_path).to_json())
    (tmp_path / "find_lr" / "result.json").write_text(json.dumps({**values, **changes}))
    problems: list[str] = []
    assert read_rate_test(tmp_path, problems) is None
    assert len(problems) == 1
    assert said in problems[0]
