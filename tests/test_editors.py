"""Type checkers and editors resolve `safelight.trainer...` in a checkout through typings/ (docs/editors.md)."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "data", "trainer", "bench")
PACKAGE = ROOT / "typings" / "safelight"
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


def test_the_package_of_links_holds_all_that_safelight_holds():
    """A module added to safelight/ needs its link, or a checker would not find it."""
    wanted = {room: ROOT / room for room in ROOMS}
    for path in (ROOT / "safelight").iterdir():
        if path.suffix == ".py" or any(path.glob("*.py")):
            wanted[path.name] = path
    assert {path.name for path in PACKAGE.iterdir()} == set(wanted)
    for name, target in wanted.items():
        link = PACKAGE / name
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == target


def test_both_checkers_are_pointed_at_it():
    assert CONFIG["mypy"]["mypy_path"] == "$MYPY_CONFIG_FILE_DIR/typings"
    # Pyright searches a folder of this name unless told otherwise
    assert "stubPath" not in CONFIG["pyright"]
    assert set(ROOMS) < set(CONFIG["pyright"]["include"])


def is_found(module: str) -> bool:
    """Return whether a checker that searches typings/ finds a module: a file, or a folder even without __init__.py."""
    place = ROOT.joinpath("typings", *module.split("."))
    return place.with_suffix(".py").is_file() or place.is_dir()


@pytest.mark.long
def test_every_import_of_ours_is_found_through_it():
    missing = []
    for folder in ("safelight", *ROOMS, "tools", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                ours = [name for name in names if name.split(".")[0] == "safelight"]
                missing += [f"{path.relative_to(ROOT)}: {name}" for name in ours if not is_found(name)]
    assert missing == []
    assert not is_found("safelight.trainer.nothing_of_this_name")


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed; `make setup` installs it")
@pytest.mark.long
def test_mypy_resolves_every_import_of_ours(tmp_path):
    """It also knows what each module of ours defines; types themselves are not checked."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, "--no-pretty", "--no-color-output"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.search(r"checked (\d+) source files|no issues found in (\d+)", result.stdout)
    assert found, result.stdout[-2000:] + result.stderr[-2000:]
    num_modules = sum(1 for folder in ("safelight", *ROOMS) for _ in (ROOT / folder).rglob("*.py"))
    assert int(found[1] or found[2]) >= num_modules
    unresolved = [
        line for line in result.stdout.splitlines() if "[import-not-found]" in line or 'Module "safelight' in line
    ]
    assert unresolved == []
