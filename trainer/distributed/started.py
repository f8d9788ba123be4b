"""How this process was started: alone, as one of several by torchrun, or by `--gpus` of a command (launch.py).

Read from the environment, without torch.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

# set by `--gpus`: how many processes, and the folder through which they and it speak
GPUS, LAUNCH_FOLDER = "SAFELIGHT_GPUS", "SAFELIGHT_LAUNCH_FOLDER"
# how a run ends that starting it again would not change: done, what the user must mend, diverged, interrupted
FINAL_STATUSES = (0, 2, 3, 130)


def world_size() -> int:
    """Return how many processes torchrun has started for this run, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


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
