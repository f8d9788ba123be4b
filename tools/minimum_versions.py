"""Makes an environment of the oldest versions that pyproject.toml allows, and runs the fast tests in it.

    python -m tools.minimum_versions                        # the fast tests
    python -m tools.minimum_versions -- tests/data -x       # some of them
    python -m tools.minimum_versions --pinned torch triton  # these two at the versions in constraints.txt

Every dependency, those of the extras too, is installed at its declared minimum; what they bring along is pip's choice,
and the development tools have the versions in constraints.txt. pip fails where two minimums exclude each other.
`make minimums` keeps torch, whose download is gigabytes, at its pinned version; `make minimums PINNED=` does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.pins import pins

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "minimums"
# the extra that is installed at its pins: development tools declare no minimum
DEVELOPMENT = "dev"
FAST = ("-q", "-m", "not slow and not long")
# these compare constraints.txt with what the installed packages require, which differs on purpose here
NOT_HERE = (
    "tests/test_dependencies.py::test_constraints_pin_the_closure_and_nothing_else",
    "tests/tools/test_wheels.py",
)


def minimums(project: dict) -> dict[str, str]:
    """Return the declared minimum of each dependency and of each extra's, by canonical name.

    project: the [project] table of pyproject.toml. Raises ValueError for a dependency without exactly one `>=`.
    """
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name, of in extras.items() if name != DEVELOPMENT for line in of)]
    found = {}
    for line in lines:
        requirement = Requirement(line)
        versions = [part.version for part in requirement.specifier if part.operator == ">="]
        if len(versions) != 1:
            raise ValueError(f"{line!r} declares no minimum: write {requirement.name}>=VERSION")
        found[canonicalize_name(requirement.name)] = versions[0]
    return found


def constraints(project: dict, pins: dict[str, str], at_pin: list[str]) -> list[str]:
    """Return the lines of a pip constraints file: dependencies at their minimum, at_pin and development tools at pins.

    Raises ValueError for a name in at_pin that is no dependency.
    """
    versions = minimums(project)
    for name in map(canonicalize_name, at_pin):
        if name not in versions:
            raise ValueError(f"{name} is not a dependency of pyproject.toml")
        versions[name] = pins[name]
    for line in project["optional-dependencies"][DEVELOPMENT]:
        name = canonicalize_name(Requirement(line).name)
        versions[name] = pins[name]
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


def make_environment(folder: Path, lines: list[str], extras: list[str]) -> Path:
    """Make a virtual environment in a folder with safelight at the versions in `lines`; return its Python."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    file = folder / "minimums.txt"
    file.write_text("\n".join(lines) + "\n")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", file]
    # named with its version, so that pip looks for no other build of it
    subprocess.run([*install, next(line for line in lines if line.startswith("torch=="))], check=True)
    subprocess.run([*install, "setuptools"], check=True)
    subprocess.run([*install, "--no-build-isolation", "-e", f"{ROOT}[{','.join(extras)}]"], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pinned", nargs="*", default=[], metavar="NAME", help="at the version in constraints.txt")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of the environment (default: {FOLDER})")
    parser.add_argument("--keep", action="store_true", help="use the environment that an earlier call made")
    parser.add_argument("tests", nargs="*", help="arguments of pytest, after --")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = constraints(project, pins(), arguments.pinned)
    python = arguments.folder / "bin" / "python"
    if not (arguments.keep and python.exists()):
        make_environment(arguments.folder, lines, sorted(project["optional-dependencies"]))
    print("\n".join(lines), flush=True)
    deselected = [f"--deselect={test}" for test in NOT_HERE]
    command = [python, "-m", "pytest", *FAST, *deselected, *arguments.tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
