"""The rooms: each folder imports only folders on lower floors, and nothing imports tools or tests.

A room is a folder of Python files. Adding a room means giving it a floor here; importing upwards, or sideways on one
floor, fails. docs/architecture.md is the map in words.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("safelight", "kernels", "data", "trainer", "bench")

# from the ground up; rooms that share a floor do not import each other
FLOORS: tuple[tuple[str, ...], ...] = (
    ("kernels/triton",),
    ("kernels",),
    ("kernels/ops", "kernels/optim", "data", "trainer/registry"),
    ("kernels/unet", "kernels/aot", "trainer/config", "data/sources"),
    ("data/prepare",),
    ("trainer/families", "trainer/distributed", "trainer/metrics"),
    ("trainer/models", "trainer/optim", "trainer/report"),
    ("trainer/adapters", "trainer/live"),
    ("trainer/checkpoint", "trainer/step"),
    ("trainer/run_log",),
    ("trainer/inference", "trainer/captioning"),
    ("trainer/tagging",),
    ("trainer/features",),
    ("trainer/evaluation",),
    ("trainer/memory_plan", "safelight/output"),
    ("trainer/loading",),
    ("trainer/between_steps",),
    ("trainer", "safelight/options"),
    ("trainer/tiny", "bench/core"),
    ("bench/counting", "bench/recipes"),
    ("bench/profile",),
    ("bench/measure",),
    ("bench/all",),
    ("bench",),
    ("safelight",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# data draws with the keyed noise and copies batches on a stream of its own; it knows no kernel
MAY_IMPORT_OF_KERNELS = {"data": {"kernels/philox", "kernels/streams"}}
# modules that every room may import
GROUND = [["safelight", name] for name in ("broken_imports", "errors", "text", "units", "untrusted")]
# what the trainer may never know of
FORBIDDEN = {
    "kernels": ("data", "trainer", "bench", "safelight"),
    "data": ("trainer", "bench", "safelight"),
    "trainer": ("bench", "safelight"),
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parent.as_posix()


def production_files() -> list[Path]:
    return sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Return the dotted names that a file imports, at its top or inside a function; `from a import b` as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, as paths below the root: trainer/step/step."""
    found = set()
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] != "safelight":
            continue
        parts = parts[1:] if len(parts) > 1 and parts[1] in TOPS else parts
        if parts[:2] in GROUND:
            continue
        # a name may be a module or something in it
        candidates = [ROOT.joinpath(*parts[:length]).with_suffix(".py") for length in range(len(parts), 0, -1)]
        module = next((path for path in candidates if path.is_file()), None)
        if module is not None:
            found.add(module.relative_to(ROOT).with_suffix("").as_posix())
        elif parts != ["safelight"] and parts[-1] != "__version__":
            raise AssertionError(f"{path.relative_to(ROOT)} imports {name}, which is not there")
    return found


def is_entry(path: Path) -> bool:
    """Whether a file is `python -m trainer` or `python -m bench`: the command line by another name."""
    return path.name == "__main__.py" and room_of(path) != "safelight"


def test_every_room_has_a_floor():
    assert {room_of(path) for path in production_files()} == set(FLOOR)


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_only_rooms_below(room):
    for path in (ROOT / room).glob("*.py"):
        if is_entry(path):
            assert own_modules(path) == {"safelight/__main__"}
            continue
        for module in own_modules(path):
            other = module.rpartition("/")[0]
            assert other == room or FLOOR[other] < FLOOR[room], f"{path.relative_to(ROOT)} imports {module}, upstairs"


@pytest.mark.parametrize("top", FORBIDDEN)
def test_the_root_folders_know_only_what_they_may(top):
    for path in (ROOT / top).rglob("*.py"):
        if is_entry(path):
            continue
        modules = own_modules(path)
        assert not {m for m in modules if m.partition("/")[0] in FORBIDDEN[top]}, path
        if top in MAY_IMPORT_OF_KERNELS:
            assert {m for m in modules if m.startswith("kernels/")} <= MAY_IMPORT_OF_KERNELS[top], path


def test_only_the_command_line_imports_the_benchmarks():
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in production_files()
        if not path.is_relative_to(ROOT / "bench") and any(m.startswith("bench/") for m in own_modules(path))
    }
    assert importers == {"safelight/commands.py"}


def test_nothing_that_is_installed_imports_tools_or_tests():
    for path in production_files():
        tops = {name.partition(".")[0] for name in imported_names(path)}
        assert not tops & {"tools", "tests"}, path
