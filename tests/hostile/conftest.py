"""The corpus as modules, and a command run as a user runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from safelight.__main__ import main


def load(name: str):
    """Return a file of this folder as a module; pytest's importlib mode has no packages of tests."""
    module_name = f"hostile_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, Path(__file__).with_name(f"{name}.py"))
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[module_name]


CORPUS = {"picture": ("pictures", ("PICTURES", "CAPTIONS")), "mistake": ("mistakes", ("MISTAKES",)), "damage": ("damages", ("DAMAGES",))}  # fmt: skip


def cases_of(argument: str) -> list:
    module, names = CORPUS[argument]
    return [case for name in names for case in getattr(load(module), name)]


def pytest_generate_tests(metafunc) -> None:
    """A test that takes a `picture`, `mistake` or `damage` is run with each of the corpus."""
    for argument in CORPUS:
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases_of(argument), ids=lambda case: case.name)


@pytest.fixture(scope="session")
def corpus_names() -> list[str]:
    return [case.name for argument in CORPUS for case in cases_of(argument)]


@dataclass(frozen=True)
class Called:
    """What a command left: exit status and both streams."""

    status: int
    out: str
    err: str

    def line(self, part: str) -> str:
        """Return the one line of standard error that holds a part."""
        found = [line for line in self.err.split("\n") if part in line]
        assert len(found) == 1, f"{part!r} stands on {len(found)} lines of:\n{self.err}"
        return found[0]

    def assert_refused(self, command: str, part: str) -> None:
        """Exit 2, and one line of ours that says why, the last."""
        assert self.status == 2, self.err
        lines = self.err.removesuffix("\n").split("\n")
        assert lines[-1].startswith(f"safelight {command}: ")
        assert part in lines[-1]
        assert sum(line.startswith("safelight ") for line in lines) == 1
        assert "Traceback" not in self.err


@pytest.fixture
def call():
    """A function that runs a command in this process and returns what it left; an error of ours is raised as it is."""

    def run(*argv: object) -> Called:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([str(word) for word in argv])
            except SystemExit as end:
                status = end.code
        return Called(status, out.getvalue(), err.getvalue())

    yield run
    # a command silences logging for its process; here that is the tests' own
    logging.disable(logging.NOTSET)
