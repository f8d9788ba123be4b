"""Starts a command in several processes: `--gpus` of train, cache, sample, compare, grid and evaluate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.distributed.started import check_not_started

if TYPE_CHECKING:
    from safelight.trainer.config.schema import Config


def launched(name: str, argv: list[str], gpus: int | None, run: Config | Path, max_restarts: int = 0) -> int | None:
    """Run a command in as many processes as --gpus says and return their exit status.

    None without --gpus, or for --gpus 1 without restarts: this process then runs the command itself. run: the settings,
    or the folder of the run that has them; run.device decides between GPUs and the CPU. max_restarts: how often the
    processes are started again after a fault. Raises UserError for numbers that this machine or these options do not
    allow.
    """
    if gpus is None:
        if max_restarts:
            raise UserError(f"--max-restarts {max_restarts} needs --gpus; torchrun has its own --max-restarts")
        return None
    if gpus < 1:
        raise UserError(f"--gpus {gpus} is less than 1; give the number of GPUs to use")
    if max_restarts < 0:
        raise UserError(f"--max-restarts {max_restarts} is less than 0; 0 never starts the processes again")
    check_not_started()
    if gpus == 1 and not max_restarts:
        return None
    import torch

    from safelight.options.parsing import without_options
    from safelight.trainer.config.toml import load_config, require_run
    from safelight.trainer.distributed.fault import EXIT_FAULT
    from safelight.trainer.distributed.launch import check_cores, launch, threads_each
    from safelight.trainer.loading.processes import outlook
    from safelight.trainer.models.device import pick_device

    if isinstance(run, Path):
        require_run(run)
        run = load_config(run / "config.toml")
    num_gpus = 0 if run.run.device == "cpu" else torch.cuda.device_count()
    if not num_gpus:
        # raises UserError if run.device is cuda
        pick_device(run.run.device)
        check_cores(gpus)
        why = "run.device is cpu" if run.run.device == "cpu" else "there is no GPU here"
        processes, threads = counted(gpus, "process"), counted(threads_each(gpus), "thread")
        print(f"{why}: {processes} on the CPU, with {threads} each, over gloo", file=sys.stderr)
    elif gpus > num_gpus:
        raise UserError(f"--gpus {gpus}: this machine has {counted(num_gpus, 'GPU')}; use --gpus {num_gpus}")

    def say_lost(what: str) -> None:
        print(f"safelight {name}: {what}; {outlook(name, Path(run.run.dir), EXIT_FAULT)}", file=sys.stderr)

    words = without_options(argv, (), ("--gpus", "--max-restarts"))
    return launch("safelight.rank", [name, *words], gpus, max_restarts, say_lost)
