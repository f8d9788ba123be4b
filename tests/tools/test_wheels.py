"""The wheels that travel to a machine without network; nothing here uses one."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import wheels

BIG = ("torch", "torchvision", "triton")


def names(lines: list[str]) -> set[str]:
    return {line.partition("==")[0] for line in lines}


@pytest.mark.parametrize("python", wheels.PYTHONS)
def test_the_list_is_complete_and_pinned_and_torch_is_fetched_by_hand(python):
    lines, by_hand = wheels.requirements_of(python, wheels.DEFAULT_EXTRAS)
    assert names(by_hand) == {"torch", "triton"}
    # ours, one that only a library needs, those of the extra, and what the tests need
    expected = {"diffusers", "xformers", "bitsandbytes", "filelock", "sympy", "prodigyopt", "pytest", "pluggy"}
    assert expected <= names(lines)
    assert not names(lines) & {*BIG, "wandb", "playwright"}
    assert not [line for line in lines if line.startswith("nvidia")]
    constraints = (wheels.ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    assert all(line in constraints for line in (*lines, *by_hand))
    assert "wandb" in names(wheels.requirements_of(python, ["wandb"])[0])


def test_markers_are_those_of_the_machine_and_not_of_this_one(monkeypatch):
    needs = {
        "a": ["b; python_version < '3.12'", "c; sys_platform == 'win32'", "d[x]", "e; extra == 'more'"],
        "b": [],
        "d": ["f; extra == 'x'", "torch"],
        "f": None,
        "torch": ["g"],
        "g": [],
    }
    monkeypatch.setattr(wheels.metadata, "requires", needs.__getitem__)
    assert wheels.needed(["a"], wheels.environment_of("3.11")) == ["a", "b", "d", "f", "g", "torch"]
    assert wheels.needed(["a"], wheels.environment_of("3.12")) == ["a", "d", "f", "g", "torch"]


def test_a_package_without_a_version_and_an_unknown_extra_are_refused(monkeypatch):
    with pytest.raises(SystemExit, match="there is no extra 'nothing'; use dev"):
        wheels.requirements_of("3.12", ["nothing"])
    monkeypatch.setattr(wheels, "pins", dict)
    with pytest.raises(SystemExit, match="has no version in constraints"):
        wheels.requirements_of("3.12", [])
    with pytest.raises(SystemExit, match="no-such-package is not installed here"):
        wheels.needed(["no-such-package"], wheels.environment_of("3.12"))


def run(monkeypatch, *arguments: str) -> list[list[str]]:
    """Run the command and return pip's command lines, which are not run."""
    commands = []
    monkeypatch.setattr(sys, "argv", ["wheels", *arguments])
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: commands.append(command) or subprocess.CompletedProcess(command, 0)
    )
    wheels.main()
    return commands


def test_torch_is_never_downloaded(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "wheels"
    ((*command,),) = run(monkeypatch, "--python", "3.13", "--download", str(folder))
    assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    asked = [word for word in command if "==" in word]
    assert not names(asked) & set(BIG)
    for option, value in (("--python-version", "3.13"), ("--only-binary", ":all:"), ("--abi", "cp313")):
        assert command[command.index(option) + 1] == value
    assert {"manylinux_2_35_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64"} <= set(command)
    out = capsys.readouterr().out
    by_hand = [line for line in out.splitlines() if line.startswith("#")]
    assert "torch==" in by_hand[-1]
    assert "triton==" in by_hand[-1]
    assert str(folder) in by_hand[-1]
    # what is installed there
    assert {"torch", "triton", "diffusers"} <= names((folder / "requirements.txt").read_text().splitlines())
    assert run(monkeypatch) == []


def make_wheel(folder: Path, name: str, needs: tuple[str, ...] = ()) -> None:
    stem = "-".join(name.split("-")[:2])
    with zipfile.ZipFile(folder / name, "w") as wheel:
        lines = ["Metadata-Version: 2.1", *(f"Requires-Dist: {need}" for need in needs)]
        wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")


def test_a_folder_is_checked_for_torchs_own_needs_and_the_machines_tags(tmp_path):
    lines = ["pydantic==2.14.3", "numpy==2.4.6", "torch==2.13.0"]

    def missing(python: str = "3.12", glibc: int = 35) -> list[str]:
        return wheels.missing_in(tmp_path, lines, python, glibc)

    assert missing() == ["numpy==2.4.6", "pydantic==2.14.3", "torch==2.13.0"]
    make_wheel(tmp_path, "pydantic-2.14.3-py3-none-any.whl")
    make_wheel(tmp_path, "numpy-2.4.6-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl")
    needs = (
        "nvidia-cublas==13.1.0.3; platform_system == 'Linux'",
        "triton==3.7.1; platform_system == 'Linux'",
        "optree; extra == 'optree'",
        "pywin32; platform_system == 'Windows'",
    )
    make_wheel(tmp_path, "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl", needs)
    assert missing() == ["nvidia-cublas==13.1.0.3", "triton==3.7.1"]
    make_wheel(tmp_path, "nvidia_cublas-13.1.0.3-py3-none-manylinux_2_27_x86_64.whl", ("nvidia-cuda-nvrtc",))
    make_wheel(tmp_path, "triton-3.7.1-cp312-cp312-manylinux_2_99_x86_64.whl")
    # built for a newer system
    assert missing() == ["nvidia-cuda-nvrtc", "triton==3.7.1"]
    make_wheel(tmp_path, "triton-3.7.1-cp312-cp312-manylinux_2_28_x86_64.whl")
    make_wheel(tmp_path, "nvidia_cuda_nvrtc-13.1-py3-none-manylinux2014_x86_64.whl")
    assert missing() == []
    assert missing("3.13") == ["numpy==2.4.6", "torch==2.13.0"]
