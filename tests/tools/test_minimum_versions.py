"""The declared minimums: every dependency has one, the pins are above it, and the environment holds each at its own."""

import tomllib

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.minimum_versions import ROOT, constraints, minimums
from tools.pins import pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = pins()


def test_every_dependency_declares_a_minimum_that_its_pin_reaches():
    found = minimums(PROJECT)
    assert {"torch", "safetensors", "pyarrow", "pillow-heif", "onnxruntime", "prodigyopt", "wandb"} <= set(found)
    assert {name: v for name, v in found.items() if Version(PINS[name]) < Version(v)} == {}
    # older ones hold the interpreter lock for a whole write
    assert Version(found["safetensors"]) >= Version("0.8")
    assert "ruff" not in found


def test_the_environment_holds_every_dependency_at_its_minimum_but_those_named():
    lines = dict(line.split("==") for line in constraints(PROJECT, PINS, ["torch"]))
    tools = {canonicalize_name(line) for line in PROJECT["optional-dependencies"]["dev"]}
    assert {name: v for name, v in lines.items() if name not in tools} == {**minimums(PROJECT), "torch": PINS["torch"]}
    assert {name: lines[name] for name in tools} == {name: PINS[name] for name in tools}


def test_what_is_no_minimum_is_refused():
    with pytest.raises(ValueError, match="'numpy' declares no minimum: write numpy>=VERSION"):
        minimums({"dependencies": ["numpy"], "optional-dependencies": {}})
    with pytest.raises(ValueError, match="flask is not a dependency"):
        constraints(PROJECT, PINS, ["flask"])
