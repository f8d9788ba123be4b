"""Field names in the JSON output of commands are lower case, words joined by _."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator

import pytest

from safelight.__main__ import main
from safelight.bench.command_line import COMMANDS as BENCHMARKS
from safelight.bench.core.results import RESULTS
from safelight.options import arguments
from safelight.output.plan_json import with_json_names
from tests.trainer.report.evaluated_run import add_comparison, add_evaluation

# fields whose keys are data: names of packages, operator classes, layers, kernels, parts of a model
DATA = {"machine", "classes", "classes_ms", "stretches_ms", "layers", "kernels", "saved_by_block_mib", "scores"} | {
    "num_flagged"
}
# benchmarks without a result line in bench/results
WITHOUT_A_LINE = {
    "compare": "tested by itself",
    "report": "tested by itself",
    "aot": "kernels by target",
    "attention": "a case by backend",
}


def field_names(value: object) -> Iterator[str]:
    """Yield the keys of nested plain values, except those that are data."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key not in DATA:
                yield from field_names(item)
            elif isinstance(item, dict):
                for inner in item.values():
                    yield from field_names(inner)
    elif isinstance(value, list):
        for item in value:
            yield from field_names(item)


def wrong(value: object) -> set[str]:
    return {name for name in field_names(value) if not re.fullmatch(r"[a-z0-9_]+", name)}


def test_wrong_names_are_found():
    assert wrong({"a": [{"B": 1, "machine": {"Pillow": 1, "x": {"y z": 2}}}]}) == {"B", "y z"}


def test_a_plan_without_a_card(tmp_path, capsys):
    """A plan for a GPU takes longer; test_planner covers it."""
    toml = tmp_path / "run.toml"
    assert main(["init", "tiny", "-o", str(toml)]) == 0
    capsys.readouterr()
    assert main(["plan", str(toml), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert wrong(printed) == set()
    assert printed["bytes"]["peak"] == sum(size for part, size in printed["bytes"].items() if part != "peak")


def test_two_fields_of_one_name_are_refused():
    with pytest.raises(AssertionError, match="the same name in JSON"):
        with_json_names({"peak of these": 1, "peak": 2})


def test_benchmarks():
    """Result lines of benchmarks, printed with --json and stored with --append."""
    lines = [json.loads(line) for path in RESULTS.glob("*.jsonl") for line in path.read_text().splitlines()]
    measured = {line["bench"]: line for line in lines if "figures" in line}
    with_json = {
        name for name, (shape, _) in BENCHMARKS.items() if "json" in {f.name for f in dataclasses.fields(shape)}
    }
    # a baseline's line is a step's
    assert with_json - measured.keys() - {"baseline"} == WITHOUT_A_LINE.keys()
    for name in with_json & measured.keys():
        assert wrong(measured[name]) == set(), name
    assert wrong(measured["profile"]) == set()


def test_compare(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text((RESULTS / "cpu.jsonl").read_text())
    assert main(["bench", "compare", str(path), str(path), "--json"]) == 0
    assert wrong(json.loads(capsys.readouterr().out)) == set()


def test_report(capsys):
    assert main(["bench", "report", str(RESULTS / "roofline.jsonl"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert wrong(printed) == set()
    assert printed["goals"]


def test_an_evaluation(tmp_path):
    comparison = add_comparison(tmp_path, edge_px=32)
    evaluation = add_evaluation(tmp_path, comparison, num_points=20)
    assert wrong(evaluation.model_dump(mode="json")) == set()


def test_every_command_with_json_is_covered():
    shapes = [s for s in vars(arguments).values() if dataclasses.is_dataclass(s) and "json" in s.__annotations__]
    # and those with a config: cache, plan, profile. test_cli covers prepare and cache, test_planner a GPU's plan,
    # test_demo the demo, test_command caption
    others = {"CacheArguments", "PlanArguments", "ProfileArguments"}
    assert {s.__name__ for s in shapes} == {"Prepare", "Caption", "Evaluate", "Demo", *others}
