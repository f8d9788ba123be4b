"""List the wheels that a machine without network needs for `safelight bench all`, at the versions in constraints.txt.

    python -m tools.wheels --python 3.12                    # what is needed
    python -m tools.wheels --python 3.12 --download wheels  # fetch all but torch and what its CUDA build brings
    python -m tools.wheels --python 3.12 --check wheels     # whether the folder has everything, torch included

The machine is Linux on x86_64 with an NVIDIA GPU. torch, triton and the nvidia packages, gigabytes together, are never
fetched: the list ends with the command that does it. On the machine:

    pip install --no-index --find-links wheels -r wheels/requirements.txt
    pip install --no-index --no-deps --no-build-isolation .

What needs what is read from the packages installed here, without network.
"""

from __future__ import annotations

import argparse
import email
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from tools.pins import pins

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
# the oldest system that the CUDA build of torch runs on has glibc 2.28; Colab and Ubuntu 22.04 have 2.35
DEFAULT_GLIBC = 35
# to install Safelight itself, and to run the tests marked gpu
ALSO = ("setuptools", "pytest", "hypothesis")
DEFAULT_EXTRAS = ("optimizers",)
# torch and what its CUDA build brings
FETCHED_BY_HAND = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)")


def environment_of(python: str) -> dict[str, str]:
    """Return the values of environment markers on the machine. python: `3.12`."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


def needed(requirements: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """Return the canonical names of these requirements and of all that they need, sorted.

    Raises SystemExit for a package that is not installed here, whose needs are therefore unknown.
    """
    found: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for own_extra in ("", *requirement.extras):
            if (name, own_extra) in found:
                continue
            found.add((name, own_extra))
            if FETCHED_BY_HAND.fullmatch(name) and name != "torch":
                continue
            try:
                waiting += [(need, own_extra) for need in metadata.requires(name) or ()]
            except metadata.PackageNotFoundError:
                sys.exit(f"{name} is not installed here, so what it needs is unknown; run `make setup`")
    return sorted({name for name, _ in found})


def requirements_of(python: str, extras: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return (requirements to download, those to fetch by hand), each `name==version`.

    Raises SystemExit for an unknown extra, or a package without a version in constraints.txt.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in known]:
        sys.exit(f"there is no extra {unknown[0]!r}; use {', '.join(known)}")
    asked = [*project["dependencies"], *ALSO, *(text for extra in extras for text in known[extra])]
    versions = pins()
    names = needed(asked, environment_of(python))
    if missing := [name for name in names if name not in versions]:
        sys.exit(f"{missing[0]} has no version in constraints.txt; add it")
    lines = {name: f"{name}=={versions[name]}" for name in names}
    by_hand = [line for name, line in lines.items() if FETCHED_BY_HAND.fullmatch(name)]
    return [line for line in lines.values() if line not in by_hand], by_hand


def platforms(glibc: int) -> list[str]:
    """Return the platform tags of wheels for Linux on x86_64 with glibc 2.`glibc` or later, the newest first."""
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    found = []
    for minor in range(glibc, 4, -1):
        found += [f"manylinux_2_{minor}_x86_64", *([f"{legacy[minor]}_x86_64"] if minor in legacy else [])]
    return [*found, "linux_x86_64"]


def target_options(python: str, glibc: int) -> list[str]:
    """Return pip's options for wheels of the machine."""
    version = python.replace(".", "")
    tags = [option for name in platforms(glibc) for option in ("--platform", name)]
    abis = [option for name in (f"cp{version}", "abi3", "none") for option in ("--abi", name)]
    return ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp", *abis, *tags]


def tags_of(python: str, glibc: int) -> set[Tag]:
    """Return the tags of wheels that the machine can install."""
    major, minor = map(int, python.split("."))
    names = platforms(glibc)
    return {
        *cpython_tags((major, minor), platforms=names),
        *compatible_tags((major, minor), f"cp{major}{minor}", names),
    }


def wheels_in(folder: Path, tags: set[Tag]) -> dict[str, list[tuple[str, Path]]]:
    """Return name -> (version, file) of the wheels in a folder that fit these tags."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for file in sorted(folder.glob("*.whl")):
        try:
            name, version, _, own = parse_wheel_filename(file.name)
        except InvalidWheelFilename:
            continue
        if own & tags:
            found.setdefault(name, []).append((str(version), file))
    return found


def needs_of_wheel(file: Path, environment: Mapping[str, str]) -> Iterator[Requirement]:
    """Yield what a wheel requires on the machine."""
    with zipfile.ZipFile(file) as wheel:
        name = next(name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        headers = email.message_from_bytes(wheel.read(name))
    for text in headers.get_all("Requires-Dist") or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": ""}):
            yield requirement


def missing_in(folder: Path, lines: Iterable[str], python: str, glibc: int) -> list[str]:
    """Return the requirements that no wheel in a folder satisfies: of the lines, and of torch's and its libraries'."""
    wheels, environment = wheels_in(folder, tags_of(python, glibc)), environment_of(python)
    waiting, missing, seen = [Requirement(line) for line in lines], [], set()
    while waiting:
        requirement = waiting.pop(0)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        name = canonicalize_name(requirement.name)
        fitting = [file for version, file in wheels.get(name, ()) if requirement.specifier.contains(version, True)]
        if not fitting:
            missing.append(f"{name}{requirement.specifier}")
        elif FETCHED_BY_HAND.fullmatch(name):
            waiting += needs_of_wheel(fitting[-1], environment)
    return sorted(set(missing))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", choices=PYTHONS, default="3.12", help="the machine's Python (default: 3.12)")
    help_of_glibc = f"minor version of the machine's glibc, as in 2.{DEFAULT_GLIBC} (default: {DEFAULT_GLIBC})"
    parser.add_argument("--glibc", type=int, default=DEFAULT_GLIBC, metavar="MINOR", help=help_of_glibc)
    parser.add_argument("--extra", nargs="*", default=list(DEFAULT_EXTRAS), help="extras of pyproject.toml")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--download", type=Path, metavar="DIR", help="fetch the wheels into a folder")
    action.add_argument("--check", type=Path, metavar="DIR", help="exit with 1 if a folder lacks a wheel")
    options = parser.parse_args()
    if not 28 <= options.glibc <= 99:
        parser.error(f"--glibc {options.glibc} is not 28 to 99: torch's CUDA build needs glibc 2.28")
    lines, by_hand = requirements_of(options.python, options.extra)
    target = target_options(options.python, options.glibc)
    if options.check:
        missing = missing_in(options.check, [*lines, *by_hand], options.python, options.glibc)
        print("\n".join(f"missing: {line}" for line in missing) or f"{options.check} has every wheel")
        sys.exit(int(bool(missing)))
    if options.download:
        options.download.mkdir(parents=True, exist_ok=True)
        (options.download / "requirements.txt").write_text("\n".join([*lines, *by_hand]) + "\n")
        # without dependencies: the list is complete, and those of xformers and bitsandbytes would fetch torch
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(options.download), *target]
        status = subprocess.run([*command, *lines], check=False).returncode
        if status:
            sys.exit(status)
    print("\n".join(lines))
    folder = options.download or "DIR"
    print(f"\n# to be fetched by hand, with the nvidia packages that they need:\n#   {'  '.join(by_hand)}")
    print(f"# pip download --dest {folder} -c constraints.txt {' '.join(target)} {' '.join(by_hand)}")


if __name__ == "__main__":
    main()
