"""Stages, epochs, steps and learning rates of a run, all known before it starts.

Does not import torch, so that the report works without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from safelight.trainer.config.schema import Config, ResolvedStage


def learning_rate(schedule: str, peak: float, step: int, num_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of a stage of num_steps.

    It rises linearly to `peak` at step warmup_steps, then stays constant, or decays (linear or cosine) to zero at
    num_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(f"schedule {schedule!r} is unknown; use constant, linear or cosine")


if TYPE_CHECKING:
    # this module imports torch
    from safelight.data.cache import Sample


def steps_per_epoch(samples: Sequence[Sample], batch_size: int, accumulation: int) -> int:
    """Return the optimizer steps of one epoch. A bucket's last micro-batch may be smaller, and so may the last step."""
    return steps_of_counts(Counter(s.bucket for s in samples).values(), batch_size, accumulation)


def steps_of_counts(counts: Iterable[int], batch_size: int, accumulation: int) -> int:
    """Return the optimizer steps of one epoch. counts: the number of samples in each bucket."""
    num_micro = sum(-(-count // batch_size) for count in counts)
    return -(-num_micro // accumulation)


@dataclass(frozen=True)
class Timeline:
    """The stages of a run and the steps per epoch of each. Epochs and steps are 0-based and count across stages."""

    stages: tuple[ResolvedStage, ...]
    stage_steps_per_epoch: tuple[int, ...]
    max_steps: int

    @classmethod
    def of(cls, config: Config, samples: Sequence[Sample]) -> Timeline:
        stages = tuple(config.stages())
        steps = tuple(steps_per_epoch(samples, s.batch_size, s.accumulate) for s in stages)
        return cls(stages, steps, config.train.max_steps)

    @property
    def num_epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, limited by max_steps."""
        total = sum(s.epochs * n for s, n in zip(self.stages, self.stage_steps_per_epoch, strict=True))
        return min(total, self.max_steps) if self.max_steps else total

    def stage_of(self, epoch: int) -> int:
        """Return the stage of an epoch; the last stage for an epoch past the end."""
        for index, end in enumerate(accumulate(stage.epochs for stage in self.stages)):
            if epoch < end:
                return index
        return len(self.stages) - 1

    def stage_of_step(self, step: int) -> int:
        """Return the stage of an optimizer step, counted from 1."""
        ends = accumulate(s.epochs * n for s, n in zip(self.stages, self.stage_steps_per_epoch, strict=True))
        return next((index for index, end in enumerate(ends) if step <= end), len(self.stages) - 1)

    def first_epoch(self, stage: int) -> int:
        return sum(s.epochs for s in self.stages[:stage])

    def how_to_extend(self, step: int, has_tables: bool) -> str:
        """Return options that make a run longer that is finished at a step. has_tables: its settings have [[stage]]."""
        total = sum(s.epochs * n for s, n in zip(self.stages, self.stage_steps_per_epoch, strict=True))
        if step < total:
            return f"--train.max-steps {total}"
        last, number = self.stages[-1], len(self.stages) - 1
        if last.schedule == "constant":
            name = f"stage.{number}" if has_tables else "train"
            options = f"--{name}.epochs {2 * last.epochs}"
        else:
            # a stage with a schedule ends where it reaches 0
            own = "" if has_tables else f"--stage.{number}.epochs {last.epochs} "
            options = f"{own}--stage.{number + 1}.epochs {last.epochs}"
        return f"{options} --train.max-steps 0" if self.max_steps else options

    def holds(self, step: int, epoch: int, step_in_epoch: int, stage: int) -> bool:
        """Return whether a run reaches this position after `step` steps, the last of them in `stage`.

        max_steps is ignored: it may have changed since.
        """
        if not (0 <= epoch <= self.num_epochs and 0 <= stage < len(self.stages)):
            return False
        done, before = 0, epoch
        for one, per_epoch in zip(self.stages, self.stage_steps_per_epoch, strict=True):
            num = min(one.epochs, before)
            done, before = done + num * per_epoch, before - num
        in_epoch = 0 if epoch == self.num_epochs else self.stage_steps_per_epoch[self.stage_of(epoch)]
        last_epoch = epoch if step_in_epoch > 0 else max(0, epoch - 1)
        return step == done + step_in_epoch and 0 <= step_in_epoch <= in_epoch and stage == self.stage_of(last_epoch)

    def learning_rate(self, epoch: int, step_in_epoch: int) -> float:
        """Return the learning rate of a step. A schedule spans its whole stage, even if max_steps cuts it short."""
        index = self.stage_of(epoch)
        stage, per_epoch = self.stages[index], self.stage_steps_per_epoch[index]
        step = (epoch - self.first_epoch(index)) * per_epoch + step_in_epoch
        return learning_rate(stage.schedule, stage.lr, step, stage.epochs * per_epoch, stage.warmup_steps)
