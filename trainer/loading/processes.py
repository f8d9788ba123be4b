"""How the processes of a run come together: what must be equal in them, and what they say when one of them fails."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safelight
from safelight.errors import UserError
from safelight.trainer.checkpoint.changed_settings import flattened
from safelight.trainer.checkpoint.files import list_checkpoints, resume_command
from safelight.trainer.checkpoint.identity import PLACES
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import load_config, require_run
from safelight.trainer.distributed import started
from safelight.trainer.distributed.meeting import name
from safelight.trainer.distributed.outputs import say_on_terminal
from safelight.trainer.distributed.world import ALONE, World, join_world, leave_world
from safelight.trainer.loading.dataset import Dataset
from safelight.trainer.loading.resolve import ResolvedRun
from safelight.trainer.models.base_record import UNET
from safelight.trainer.models.device import pick_device
from safelight.trainer.run_log.terminal import Terminal

# of which all processes need the same version
PACKAGES = ("torch", "diffusers", "transformers")
# paths, which may have other names on another machine: what they lead to is compared instead
PATHS = ("run.dir", "data.path", *PLACES)


def join(command: str, config: Config, terminal: Terminal) -> World:
    """Return the world of this process, a single one without torchrun. Raises as join_world does.

    command: the name of what its processes run together, such as train.
    """
    run_dir = Path(config.run.dir)

    def say(text: str) -> None:
        terminal.pause()
        say_on_terminal(text)

    return join_world(
        pick_device(config.run.device).type,
        config.distributed.timeout_s,
        {setting: str(value) for setting, value in flattened(config).items() if setting not in PATHS},
        {"safelight": safelight.__version__} | {package: importlib.metadata.version(package) for package in PACKAGES},
        say,
        command,
        lambda status: outlook(command, run_dir, status),
    )


@contextmanager
def joined(command: str, run: Config | Path, terminal: Terminal) -> Iterator[World]:
    """Join the world of this process inside the block, for a command that several processes run together.

    run: the command's settings, or the folder of the run. Raises as join_world does, and UserError for a folder that
    is no run's.
    """
    if started.world_size() == 1:
        yield ALONE
        return
    if isinstance(run, Path):
        require_run(run)
        run = load_config(run / "config.toml")
    world = join(command, run, terminal)
    yield world
    leave_world(world, 0)


def outlook(command: str, run_dir: Path, status: int) -> str:
    """Return what comes after a command has ended with an exit status: a restart, or the command that goes on."""
    if command != "train":
        return "what is done is kept, and the same command does the rest"
    checkpoints = list_checkpoints(run_dir)
    if (count := started.restart_count()) < started.max_restarts() and status not in started.FINAL_STATUSES:
        since = f"step {checkpoints[-1]}, the newest checkpoint" if checkpoints else "step 0"
        return f"all processes start again from {since} (restart {count + 1} of {started.max_restarts()})"
    if not checkpoints and not (run_dir / "config.toml").exists():
        # it ended before it wrote its folder, so there is no config.toml to resume from
        return "nothing is written yet; give the same command again"
    newest = f"the newest checkpoint is of step {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
    return f"{newest}; go on with: {resume_command(run_dir, [], '')}"


def check_same_everywhere(world: World, run: ResolvedRun, dataset: Dataset) -> None:
    """Raise UserError if a process has another dataset or another base than rank 0."""
    if world.size == 1:
        return
    halves = {"training": dataset.train, "held-out": dataset.validation}
    mine = {
        "base": run.base_record[UNET],
        **{half: [len(samples), run.identity(samples).data] for half, samples in halves.items()},
    }
    everyone = world.gather(mine)
    rank = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    if rank is None:
        return
    ours, theirs = everyone[0], everyone[rank]
    other, main, path = name(world.peers, rank), name(world.peers, 0), run.user_config.data.path
    for half in halves:
        if ours[half][0] != theirs[half][0]:
            raise UserError(
                f"data.path {path} has {theirs[half][0]} {half} photographs on {other}, but {ours[half][0]} on {main}; "
                "give all machines the same dataset"
            )
        if ours[half] != theirs[half]:
            raise UserError(
                f"data.path {path} has other {half} photographs or captions on {other} than on {main}; give all "
                "machines the same dataset"
            )
    raise UserError(
        f"model.base {run.user_config.model.base!r} has other weights on {other} than on {main}; give all machines the "
        "same base"
    )
