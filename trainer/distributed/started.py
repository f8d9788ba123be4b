"""How this process was started: alone, as one of several by torchrun, or by `--gpus` of a command (launch.py).

Read from the environment, without torch.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from safelight.errors import UserError

# set by `--gpus`: the number of processes, and the folder through which launcher and processes exchange files
GPUS, LAUNCH_FOLDER = "SAFELIGHT_GPUS", "SAFELIGHT_LAUNCH_FOLDER"
# exit statuses that starting the run again would not change: done, a mistake of the user, diverged, interrupted
FINAL_STATUSES = (0, 2, 3, 130)


def world_size() -> int:
    """Return how many processes torchrun has started for this run, 1 without it.

    Raises UserError if WORLD_SIZE is no number, or if RANK is no number while WORLD_SIZE is not 1.
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
    """Return whether WORLD_SIZE is more than 1; False if it is no number, for which world_size raises."""
    size = os.environ.get("WORLD_SIZE", "1")
    return _is_number(size) and int(size) > 1


def rank() -> int:
    """Return the rank of this process; 0 if RANK is no number: error reporting calls this, so it must not raise."""
    text = os.environ.get("RANK", "0")
    return int(text) if _is_number(text) else 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def check_not_started() -> None:
    """Raise UserError if --gpus is given in a process that torchrun has started."""
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
    """Return the launcher's folder if `--gpus` started this process, else None."""
    folder = os.environ.get(LAUNCH_FOLDER)
    return None if folder is None else Path(folder)


def note_that_said() -> None:
    """Tell the launcher of `--gpus` that the processes have reported how they ended, so that it need not."""
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
