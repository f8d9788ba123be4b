"""Starts a command in several processes: `--gpus` of cache, sample, compare, grid and evaluate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.distributed.started import check_not_started

if TYPE_CHECKING:
    from safelight.trainer.config.schema import Config


def launched(name: str, argv: list[str], gpus: int | None, run: Config | Path) -> int | None:
    """Run a command in as many processes as --gpus says and return their exit status; None if there is to be one.

    run: the settings that say on which device, or the folder of the run that has them. Raises UserError for a number
    that cannot be.
    """
    if gpus is None:
        return None
    if gpus < 1:
        raise UserError(f"--gpus {gpus} is less than 1; give the number of GPUs to use")
    check_not_started()
    if gpus == 1:
        return None
    import torch

    from safelight.options.parsing import without_options
    from safelight.trainer.config.toml import load_config, require_run
    from safelight.trainer.distributed.launch import check_cores, launch, threads_each

    if isinstance(run, Path):
        require_run(run)
        run = load_config(run / "config.toml")
    num_gpus = 0 if run.run.device == "cpu" else torch.cuda.device_count()
    if not num_gpus:
        check_cores(gpus)
        threads = counted(threads_each(gpus), "thread")
        print(f"no GPU is used: {gpus} processes on the CPU, with {threads} each", file=sys.stderr)
    elif gpus > num_gpus:
        raise UserError(f"--gpus {gpus}: this machine has {counted(num_gpus, 'GPU')}; use --gpus {num_gpus}")

    def say_lost(what: str) -> None:
        print(f"safelight {name}: {what}; what is done is kept, and the same command does the rest", file=sys.stderr)

    return launch("safelight.rank", [name, *without_options(argv, (), ("--gpus",))], gpus, 0, say_lost)
