"""The comparison at the end of `train`: what base, best and last checkpoint draw for the run's sample prompts."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from safelight.errors import UserError
from safelight.trainer.distributed.world import World
from safelight.trainer.inference.compare import compare
from safelight.trainer.inference.compared_prompts import sampled_prompts
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.pictures import Progress, Say
from safelight.trainer.inference.which_checkpoint import best_and_last
from safelight.trainer.report.comparison import Comparison


def compare_after_training(
    run_dir: Path,
    last_step: int,
    progress: Progress,
    say: Say,
    world: World = World(),  # noqa: B008  it is frozen
) -> Comparison | None:
    """Compare base, best and last checkpoint of a run that has just ended; None if it has no samples to compare.

    last_step: that of the run, whose samples it drew just before; they and those of step 0 are not drawn again.
    progress, say: as for `compare`. world: whose processes draw together. A comparison that cannot be drawn is said,
    and is no reason for a run to fail.
    """
    # what training held goes before another UNet is loaded, also where it refers to itself
    gc.collect()
    try:
        run = open_run(run_dir, world=world)
        sample = run.config.sample
        if not sample.compare_at_end or not sample.every_epochs:
            return None
        prompts = sampled_prompts(run, say)
        if not prompts:
            return None
        steps = best_and_last(run_dir)
        return compare(run, steps, prompts, sampled=(0, last_step), progress=progress, say=say)
    except (UserError, OSError) as error:
        say(f"base and trained are not compared: {error}")
    except torch.OutOfMemoryError:
        say("base and trained are not compared: the GPU has too little free memory to load a UNet")
    return None
