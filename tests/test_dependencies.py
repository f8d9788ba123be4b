"""Declared dependencies are those that the code imports, and constraints.txt pins all that they bring along."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from safelight.trainer.registry.optimizers import OPTIMIZERS
from tools.pins import pins

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ("safelight", "kernels", "data", "trainer", "bench")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# the import name where it is not the distribution's
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}
# extras that users may go without; what needs one says so with the pip line
OPTIONAL = [line for name, lines in PROJECT["optional-dependencies"].items() if name != "dev" for line in lines]
# torch.utils.tensorboard imports tensorboard for us
INDIRECT = {"torch.utils.tensorboard": "tensorboard"}
# used where users have installed it themselves: flash-attn-4, a beta for two generations of GPUs
BY_USERS = {"flash_attn"}
# started as programs, or loaded by pytest; the other development tools are imported by the tests
PROGRAMS = {"ruff", "mypy", "pytest-xdist"}


# by name: the registry of optimizers says which class of which library
BY_NAME = {spec.library.split(":")[0].split(".")[0] for spec in OPTIMIZERS.values() if spec.library}


def imports(*folders: str) -> dict[str, Path]:
    """Return every imported top-level name but the standard library's and ours, with a file that imports it."""
    found = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            is_skip = isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip"
            if is_skip and isinstance(node.args[0], ast.Constant):
                names = [node.args[0].value]
            for name in names:
                found[name.split(".")[0]] = path
                if name in INDIRECT:
                    found[INDIRECT[name]] = path
    return {
        name: path
        for name, path in found.items()
        if name not in {*sys.stdlib_module_names, *PACKAGED, "tests", "tools"}
    }


def declared(lines: list[str]) -> dict[str, str]:
    """Return the import name of each requirement by its distribution's name."""
    names = [canonicalize_name(Requirement(line).name) for line in lines]
    return {name: IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    imported, names = imports(*PACKAGED), declared([*PROJECT["dependencies"], *OPTIONAL])
    undeclared = {name: str(path.relative_to(ROOT)) for name, path in imported.items() if name not in names.values()}
    assert undeclared.keys() == BY_USERS
    assert set(names.values()) >= BY_NAME
    assert {name for name, module in names.items() if module not in imported.keys() | BY_NAME} == set()


def test_all_of_the_extra_for_development_is_used():
    imported = imports("tests", "tools")
    names = declared(PROJECT["optional-dependencies"]["dev"])
    assert {name for name, module in names.items() if module not in imported} == PROGRAMS
    known = {*names.values(), *declared([*PROJECT["dependencies"], *OPTIONAL]).values()}
    # packaging comes with pytest, tokenizers with transformers, google.protobuf with tensorboard; tests that need
    # one of the others skip without it
    brought = {"packaging", "tokenizers", "google"}
    assert set(imported) - known - brought <= {"nbclient", "nbformat", "sklearn", "torch_fidelity"}


def closure(lines: list[str]) -> set[str]:
    """Return the names of the requirements and of all that they need here, by the metadata of what is installed."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(requirement.name)
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            # a development tool may be missing; its own requirements are then not known here
            continue
        for line in needed:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                inner.marker = None
                waiting.append(inner)
    return found


# what mypy needs, for where it is not installed
OF_MYPY = {"ast-serialize", "librt", "mypy-extensions", "pathspec"}


def test_constraints_pin_the_closure_and_nothing_else():
    pinned = pins()
    assert [version for version in pinned.values() if not re.fullmatch(r"[\w.+!]+", version)] == []
    # setuptools builds the project
    wanted = (
        closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"], *OPTIONAL, "setuptools"]) | OF_MYPY
    )
    # CUDA's own packages come pinned by the CUDA build of torch
    from_torch = {name for name in wanted if name.startswith(("nvidia-", "cuda-"))}
    assert set(pinned) == wanted - from_torch
