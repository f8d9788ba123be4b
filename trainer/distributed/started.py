"""How this process was started: alone, as one of several by torchrun, or by `--gpus` of a command (launch.py).

Read from the environment, without torch.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from safelight.errors import UserError

# set by `--gpus`: how many processes, and the folder through which they and it speak
GPUS, LAUNCH_FOLDER = "SAFELIGHT_GPUS", "SAFELIGHT_LAUNCH_FOLDER"
# how a run ends that starting it again would not change: done, what the user must mend, diverged, interrupted
FINAL_STATUSES = (0, 2, 3, 130)


def world_size() -> int:
    """Return how many processes torchrun has started for this run, 1 without it.

    Raises UserError if WORLD_SIZE is no number, or RANK is none beside it.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    for variable, text in (("WORLD_SIZE", size), ("RANK", os.environ.get("RANK", "0"))):
        if not _is_number(text) and size != "1":
            raise UserError(
                f"{variable} is {text!r} in the environment, where torchrun sets a number: unset it, or start the run "
                "with torchrun"
            )
    return int(size)


def is_one_of_several() -> bool:
    """Return whether there is more than one process; what is no number, which world_size refuses, means no."""
    size = os.environ.get("WORLD_SIZE", "1")
    return _is_number(size) and int(size) > 1


def rank() -> int:
    """Return the rank of this process. It is asked for while errors are told, so it raises none: see world_size."""
    text = os.environ.get("RANK", "0")
    return int(text) if _is_number(text) else 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def check_not_started() -> None:
    """Raise UserError if this process is one of several already, so that --gpus must not start more."""
    if world_size() > 1:
        raise UserError(
            f"--gpus starts the processes itself, but WORLD_SIZE is {world_size()}: torchrun has started them, or the "
            "shell has it set. Leave out --gpus, or unset WORLD_SIZE"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("--gpus starts the processes itself, and torchrun has already: leave out one of the two")


def is_main_process() -> bool:
    """Return whether this is the process that writes the run folder, before or after the world is joined."""
    return rank() == 0


def host() -> str:
    return socket.gethostname()


def restart_count() -> int:
    """Return how often this machine's processes have been started again after a fault."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def max_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def options_to_resume() -> tuple[str, ...]:
    """Return what `safelight train RUN --resume` needs besides to start as many processes as now."""
    if GPUS in os.environ:
        return ("--gpus", os.environ[GPUS])
    on_one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return ("--gpus", str(world_size())) if world_size() > 1 and on_one_machine else ()


def launch_folder() -> Path | None:
    """Return the folder of the `--gpus` that started this process; None if none did."""
    folder = os.environ.get(LAUNCH_FOLDER)
    return None if folder is None else Path(folder)


def note_that_said() -> None:
    """Note for `--gpus` that this start of the processes has told how it ended."""
    if (folder := launch_folder()) is not None and folder.is_dir():
        said_file(folder, restart_count()).touch()


def said_file(folder: Path, count: int) -> Path:
    return folder / f"said-{count}"


def pid_file(folder: Path, number: int) -> Path:
    return folder / f"pid-{number}"


def status_file(folder: Path, number: int) -> Path:
    return folder / f"status-{number}"


def stop_file(folder: Path) -> Path:
    """The file that is there once the user has asked all processes to stop: none is to start again."""
    return folder / "stopped"
