"""Parametrizes the tests with the cases of pictures.py, mistakes.py and damages.py; runs commands as a user would."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests import called


def load(name: str):
    """Return a file of this folder as a module. In pytest's importlib mode the tests are not a package."""
    module_name = f"hostile_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, Path(__file__).with_name(f"{name}.py"))
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[module_name]


CORPUS = {
    "picture": ("pictures", ("PICTURES", "CAPTIONS")),
    "mistake": ("mistakes", ("MISTAKES",)),
    "damage": ("damages", ("DAMAGES",)),
}


def cases_of(argument: str) -> list:
    module, names = CORPUS[argument]
    return [case for name in names for case in getattr(load(module), name)]


def pytest_generate_tests(metafunc) -> None:
    """Run a test that takes a `picture`, `mistake` or `damage` once for each case of the corpus."""
    for argument in CORPUS:
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases_of(argument), ids=lambda case: case.name)


@pytest.fixture(scope="session")
def corpus_names() -> list[str]:
    return [case.name for argument in CORPUS for case in cases_of(argument)]


@pytest.fixture
def call():
    """A function that runs a command in this process and returns its exit status and output."""
    return called.call
