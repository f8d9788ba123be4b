"""Layout: no root folder shadows another package, imports have no side effects, the wheel is complete."""

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from safelight.__main__ import COMMANDS, main
from safelight.trainer.models.base import EMBEDDED

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "data", "trainer", "bench")
PACKAGED = ("safelight", *ROOMS)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def call(*command: object, cwd: Path = ROOT, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command in a plain environment, PYTHONPATH set to `path` or not at all."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_root_folders_are_not_packages():
    """A root package named `kernels` would shadow Hugging Face's."""
    for room in ROOMS:
        assert (ROOT / room).is_dir()
        assert not (ROOT / room / "__init__.py").exists()


def imported_modules(path: Path) -> set[str]:
    """Return every module that a file imports anywhere, `from a import b` as both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not resolved here; write the full name"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.long
def test_nothing_is_imported_by_its_bare_folder_name():
    """`import kernels` would find our folder in the checkout and Hugging Face's package elsewhere."""
    for path in python_files(*PACKAGED, "tests"):
        tops = {name.partition(".")[0] for name in imported_modules(path)}
        assert not tops & set(ROOMS), path


IMPORT_EVERYTHING = """
import importlib, json, logging, os, signal, sys, threading, warnings
import torch
# imported before the comparison: their side effects are not ours
import tyro, pydantic, rich, matplotlib, PIL.Image, safetensors.torch, scipy.special

def refuse(*args, **kwargs):
    raise AssertionError("CUDA was queried at import")

for name in ("is_available", "device_count", "get_device_capability", "current_device", "get_device_name", "init"):
    setattr(torch.cuda, name, refuse)

def state():
    return {
        "rng": torch.get_rng_state().tolist(), "threads": torch.get_num_threads(), "env": dict(os.environ),
        "handlers": list(logging.root.handlers), "level": logging.root.level, "filters": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(), "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(), "path": list(sys.path),
        "running": threading.active_count(), "cwd": os.getcwd(), "backend": matplotlib.rcParams["backend"],
    }

before = state()
# Windows has neither
posix = {name: sys.modules.pop(name, None) for name in ("resource", "fcntl")}
sys.modules.update(dict.fromkeys(posix))
for module in sys.argv[1:]:
    importlib.import_module(module)
for name, module in posix.items():
    del sys.modules[name]
    if module is not None:
        sys.modules[name] = module
after = state()
changed = [name for name in before if before[name] != after[name]]
torch.cuda.is_available = lambda: False
from transformers import CLIPTextModel
json.dump({"changed": changed, "from": CLIPTextModel.__module__}, sys.stdout)
"""


@pytest.fixture(scope="module")
def imported() -> dict:
    """Import all our modules, then transformers, in a process in the checkout; return the global state that changed."""
    modules = []
    for path in python_files(*PACKAGED):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path.stem not in ("__init__", "__main__"):
            modules.append(".".join(parts if parts[0] == "safelight" else ("safelight", *parts)))
    assert "safelight.trainer.train" in modules
    result = call(sys.executable, "-c", IMPORT_EVERYTHING, *modules)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.long
def test_imports_have_no_side_effects(imported):
    assert imported["changed"] == []


@pytest.mark.long
def test_transformers_can_be_imported_from_the_checkout(imported):
    assert imported["from"] == "transformers.models.clip.modeling_clip"


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, safelight.__main__; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = call(sys.executable, "-c", code).stdout.split()
    assert "safelight" in loaded
    assert not {"torch", "diffusers", "transformers", "numpy", "PIL", "pydantic", "tyro", "rich"} & set(loaded)


HELPED = [*COMMANDS, "bench step"]
# a forked child a command, so that none sees what another has imported; what all import is imported once
SHOW_HELP = """
import contextlib, io, json, os, sys
import safelight.options.arguments
from safelight.__main__ import main

for command in json.loads(sys.argv[1]):
    if os.fork() == 0:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                code = main([*command.split(), "--help"])
            except SystemExit as end:
                code = end.code
        heavy = [name for name in ("torch", "numpy") if name in sys.modules]
        print(json.dumps([command, code, out.getvalue(), heavy]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, tuple[int, str, list[str]]]:
    """By command: exit status and text of its help, and what heavy was imported for it."""
    result = call(sys.executable, "-c", SHOW_HELP, json.dumps(HELPED))
    assert result.returncode == 0, result.stderr
    return {command: tuple(rest) for command, *rest in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("command", HELPED)
def test_the_help_of_a_command_needs_neither_torch_nor_numpy(command, helped):
    code, text, heavy = helped[command]
    assert text.startswith(f"usage: safelight {command}")
    assert (code, heavy) == (0, [])
    # Python's None does not show up in metavars
    assert "{None}" not in text


def test_help_takes_less_than_a_second_of_cpu():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = call(sys.executable, "-m", "safelight", "--help")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
    assert result.returncode == 0
    output = " ".join(result.stdout.split())
    assert all(f" {name} {text}" in output for name, text in COMMANDS.items())


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ((sys.executable, "-m", "safelight", "--help"), "Safelight fine-tunes Stable Diffusion"),
        ((Path(sys.executable).with_name("safelight"), "--help"), "Safelight fine-tunes Stable Diffusion"),
        ((sys.executable, "-m", "trainer", "--help"), "usage: safelight train"),
        ((sys.executable, "-m", "bench", "--help"), "usage: safelight bench"),
    ],
)
def test_every_way_to_start_it_works_from_the_checkout(command, first):
    result = call(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(first)
    assert result.stderr == ""


def test_a_call_without_arguments_shows_the_usage_and_exits_2(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("Safelight fine-tunes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of this checkout: files left behind by an earlier build would be packed too."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    for name in PACKAGED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    result = call(
        sys.executable, "-m", "pip", "wheel", copy, "--no-deps", "--no-build-isolation", "-q", "-w", folder, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_nothing_at_the_top(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"safelight", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    for path in python_files(*PACKAGED):
        relative = path.relative_to(ROOT).as_posix()
        assert (relative if relative.startswith("safelight/") else f"safelight/{relative}") in names
    embedded = [ROOT / "safelight" / folder for folder in (*EMBEDDED.values(), "tiny_captioner")]
    assert all(list(folder.rglob("*.safetensors")) for folder in embedded)
    for path in [path for folder in embedded for path in folder.rglob("*") if path.is_file()]:
        assert path.relative_to(ROOT).as_posix() in names
    report = ROOT / "trainer/report"
    for path in [*report.glob("*.css"), *report.glob("*.js"), *(report / "uplot").iterdir()]:
        assert f"safelight/{path.relative_to(ROOT).as_posix()}" in names


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    points = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "safelight = safelight.__main__:main" in points
    # -S disables site hooks, among them that of the editable install; dependencies are on PYTHONPATH
    code = (
        "import sys, safelight.trainer.report.build as build, safelight.trainer.models.base as models\n"
        "print(build.__file__)\nprint(models.tiny_folder())\n"
        "from safelight.__main__ import main\nsys.exit(main(['init', 'tiny', '-o', 'run.toml']))"
    )
    packages = Path(pytest.__file__).parent.parent
    result = call(sys.executable, "-S", "-c", code, cwd=elsewhere, path=f"{site}{os.pathsep}{packages}")
    assert result.returncode == 0, result.stderr
    build, tiny = result.stdout.splitlines()[:2]
    assert build == str(site / "safelight/trainer/report/build.py")
    assert tiny == str(site / "safelight/tiny")
    assert tomllib.loads((elsewhere / "run.toml").read_text())["model"]["base"] == "tiny"
    result = call(
        sys.executable, "-S", "-m", "safelight", "--help", cwd=elsewhere, path=f"{site}{os.pathsep}{packages}"
    )
    assert result.stdout.startswith("Safelight fine-tunes"), result.stderr


def test_dependencies_leave_an_installed_torch_alone():
    """Colab and others come with torch: any version from 2.10 works. Packages for CUDA are required on Linux only."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {line.split(";")[0].split(">")[0].split("=")[0].strip(): line for line in project["dependencies"]}
    assert requirements["torch"] == "torch>=2.10"
    for name in ("triton", "xformers", "bitsandbytes"):
        specifier, marker = requirements[name].split(";")
        assert marker.strip() == "platform_system == 'Linux'"
        assert specifier.strip().startswith(f"{name}>=")
        assert not any(sign in specifier for sign in ("==", "<", "~", ","))
    assert not any("==" in line.split(";")[0] or "<" in line for line in project["dependencies"])
    assert project["requires-python"] == ">=3.11"
