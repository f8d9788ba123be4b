"""Spreads a run's steps over processes.

train.accumulate counts the micro-batches of a step over all processes, so that a run has the same steps, learning rate
and noise however many there are; each process takes its share of them.
Validation and drawing are spread by whole batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from safelight.trainer.config.schema import Config
from safelight.trainer.distributed.world import ALONE, World

T = TypeVar("T")


def own_batches(world: World, batches: Sequence[T]) -> list[tuple[int, T]]:
    """Return (place, batch) of those that this process runs a UNet on, in validation and in drawing.

    Whole batches, cut without regard to the number of processes: how many rows are computed at a time changes how each
    of them is rounded. Where processes divide the weights, each holds all of them meanwhile (Models.shown), so that
    they need not run equally many.
    """
    return list(world.share(list(enumerate(batches))))


def num_micro_steps(accumulate: int, num_processes: int) -> int:
    """Return how many of a step's micro-batches each process runs, one after another."""
    return -(-accumulate // num_processes)


def sharers_of(config: Config, world: World) -> World:
    """Return the processes that divide a UNet's optimizer state by parts (distributed.shard), one without that."""
    return world if config.distributed.shard == "states" else ALONE


def text_sharers_of(config: Config, world: World) -> World:
    """Return the same of text encoders, which are never cut."""
    return ALONE if config.distributed.shard == "none" else world


def spread(config: Config, num_processes: int) -> tuple[Config, str]:
    """Return the settings with a micro-batch for each process in every step, and a note if that raised any; else ''."""
    low = sorted({stage.accumulate for stage in config.stages() if stage.accumulate < num_processes})
    if not low:
        return config, ""
    train = config.train.model_copy(update={"accumulate": max(config.train.accumulate, num_processes)})
    stages = [
        stage.model_copy(update={"accumulate": max(stage.accumulate, num_processes)}) if stage.accumulate else stage
        for stage in config.stage
    ]
    changed = config.model_copy(update={"train": train, "stage": stages})
    sizes = sorted({stage.batch_size for stage in config.stages()})
    samples = " or ".join(str(size * num_processes) for size in sizes)
    note = (
        f"train.accumulate is {num_processes} instead of {low[0]}, one micro-batch for each of {num_processes} "
        f"processes: a step has {samples} samples, and a learning rate for larger batches may train faster"
    )
    return changed, note
