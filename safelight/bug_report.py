"""Writes the report on a bug: the traceback, versions, the GPU, and what libraries logged."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import traceback
from datetime import datetime
from pathlib import Path

from safelight import __version__, library_log
from safelight.text import printable_lines

_run_folder: Path | None = None


def belongs_to(run_folder: Path | None) -> None:
    """Set the run folder that this process works on; reports are written there."""
    global _run_folder
    _run_folder = run_folder


def write(error: BaseException, argv: list[str]) -> Path:
    """Write the report on a command's error and return its file.

    It goes to the first of run folder, current folder and temporary folder that can be written to. Raises OSError if
    none can.
    """
    text = _text(error, argv)
    places = [place for place in (_run_folder, Path.cwd()) if place is not None and os.path.isdir(place)]
    for place in places:
        try:
            return _write(place, text)
        except OSError:
            continue
    return _write(Path(tempfile.gettempdir()), text)


def _write(folder: Path, text: str) -> Path:
    name = f"error-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while True:
        path = folder / (f"{name}.log" if number == 1 else f"{name}-{number}.log")
        try:
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return path
        except FileExistsError:
            # an earlier report within the same second
            number += 1


def _text(error: BaseException, argv: list[str]) -> str:
    facts = {
        "command": shlex.join(["safelight", *argv]),
        "time": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
        "safelight": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        **_versions(),
        **_gpu(),
    }
    messages = library_log.lines() or ["none"]
    parts = [
        "\n".join(f"{name}: {value}" for name, value in facts.items()),
        "".join(traceback.format_exception(error)).rstrip(),
        "\n".join(["What libraries logged and warned of:", *messages]),
    ]
    return printable_lines("\n\n".join(parts)) + "\n"


def _versions() -> dict[str, str]:
    """Return the versions of the imported libraries."""
    versions = {}
    for name, module in sorted(sys.modules.items()):
        # not getattr, which would make a lazy module import more
        version = vars(module).get("__version__") if hasattr(module, "__dict__") else None
        if "." not in name and name not in sys.stdlib_module_names and isinstance(version, str) and name != "safelight":
            versions[name] = version
    return versions


def _gpu() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    try:
        return {"GPU": f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"}
    except RuntimeError as error:
        # after an illegal memory access every CUDA call fails
        return {"GPU": f"does not answer: {str(error).splitlines()[0]}"}


def summary(error: BaseException, command: str, file: Path) -> str:
    """Return the two lines that are printed about a bug."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    what = type(error).__name__ + (f": {first}" if first else "")
    # relative to the current folder if possible, which is shorter
    shown = os.path.relpath(file) if file.is_relative_to(Path.cwd()) else file
    return (
        f"safelight {command}: this is a bug in Safelight, not a mistake of yours: {what}\n"
        f"The details are in {shown}; please open an issue on the project's page and attach that file."
    )
