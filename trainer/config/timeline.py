"""Stages, epochs, steps and learning rates of a run, all known before it starts.

Does not import torch, so that the report works without it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from safelight.data.epochs import Placed, Span, count_batches
from safelight.errors import UserError
from safelight.trainer.config.schema import Config, ResolvedStage, TextEncoder
from safelight.trainer.registry.schedules import SCHEDULES, learning_rate


@dataclass(frozen=True)
class StageSteps:
    """The optimizer steps of a stage. numbers: of each of its epochs, or a single one if all have equally many."""

    epochs: int
    numbers: tuple[int, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return [0, *accumulate(self.numbers)]

    @property
    def total(self) -> int:
        return self.before(self.epochs)

    def before(self, epoch: int) -> int:
        """Return the steps of the stage's first `epoch` epochs."""
        return epoch * self.numbers[0] if len(self.numbers) == 1 else self._ends[epoch]

    def of_epoch(self, epoch: int) -> int:
        """Return the steps of an epoch, counted from 0 within the stage; beyond its end, those of the last one."""
        if not self.numbers:
            return 0
        return self.numbers[min(epoch, len(self.numbers) - 1)]

    def epoch_at(self, step: int) -> int:
        """Return the epoch of a step, both counted from 0 within the stage."""
        return step // self.numbers[0] if len(self.numbers) == 1 else bisect_right(self._ends, step) - 1


@dataclass(frozen=True)
class Timeline:
    """The stages of a run and the steps of each. Epochs and steps are 0-based and count across stages.

    planned_steps: of each stage as it was planned, for its schedule, where stages ended early; empty if none did.
    planned_stages: the steps of all stages as the settings have them, for the text encoder's schedule; empty likewise.
    """

    stages: tuple[ResolvedStage, ...]
    stage_steps: tuple[StageSteps, ...]
    max_steps: int
    planned_steps: tuple[int, ...] = ()
    planned_stages: tuple[StageSteps, ...] = ()

    @classmethod
    def of(cls, config: Config, samples: Sequence[Placed], ended: Sequence[tuple[int, int]] = ()) -> Timeline:
        """Return the timeline of a run. samples: those trained on, or their placements.

        ended: (stage, epochs) of the stages that ended before their planned epochs (`Position.ended`).

        A group's last micro-batch of an epoch may be smaller, and so may an epoch's last step. Raises UserError if no
        epoch has a step.
        """
        stages, planned = tuple(config.stages()), tuple(config.stages())
        for index, epochs in ended:
            stages[index].epochs = epochs

        def steps_of(some: Sequence[ResolvedStage]) -> tuple[StageSteps, ...]:
            spans = [Span(stage.epochs, stage.batch_size) for stage in some]
            counts = count_batches(samples, spans, seed=config.run.seed, carries=config.data.carries)
            return tuple(
                StageSteps(stage.epochs, tuple(-(-num // stage.accumulate) for num in numbers[: stage.epochs]))
                for stage, numbers in zip(some, counts, strict=True)
            )

        steps = steps_of(stages)
        totals = [one.total for one in steps]
        for index, epochs in ended:
            # a stage that never began has no learning rate
            if epochs:
                totals[index] = steps_of([*stages[:index], planned[index]])[-1].total
        whole = steps_of(planned) if ended else ()
        timeline = cls(stages, steps, config.train.max_steps, tuple(totals) if ended else (), whole)
        if samples and not timeline.total_steps:
            raise UserError(
                "the run has no step: its buckets never fill a batch that data.short_batches carry would train, or all "
                "photographs have repeats 0; set data.short_batches keep, a smaller train.batch_size or other repeats"
            )
        return timeline

    @property
    def num_epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages, whatever max_steps."""
        return sum(steps.total for steps in self.stage_steps)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, limited by max_steps."""
        return min(self.total_steps, self.max_steps) if self.max_steps else self.total_steps

    @property
    def epochs_begun(self) -> int:
        """Epochs that the run begins: max_steps may end it before the others."""
        if self.num_steps == self.total_steps:
            return self.num_epochs
        return self.place_of(self.num_steps)[0] + 1 if self.num_steps else 0

    @property
    def cut_words(self) -> str:
        """Where max_steps ends the run, '' if it is as long as its epochs."""
        if self.num_steps == self.total_steps:
            return ""
        return f"train.max_steps {self.max_steps} ends the run in epoch {self.epochs_begun} of {self.num_epochs}"

    def stage_of(self, epoch: int) -> int:
        """Return the stage of an epoch; the last stage for an epoch past the end."""
        for index, end in enumerate(accumulate(stage.epochs for stage in self.stages)):
            if epoch < end:
                return index
        return len(self.stages) - 1

    def stage_of_step(self, step: int) -> int:
        """Return the stage of an optimizer step, counted from 1."""
        ends = accumulate(steps.total for steps in self.stage_steps)
        return next((index for index, end in enumerate(ends) if step <= end), len(self.stages) - 1)

    def first_epoch(self, stage: int) -> int:
        return sum(s.epochs for s in self.stages[:stage])

    def steps_of(self, epoch: int) -> int:
        """Return the optimizer steps of an epoch; past the end, those of the last one."""
        stage = self.stage_of(epoch)
        return self.stage_steps[stage].of_epoch(epoch - self.first_epoch(stage))

    def place_of(self, step: int) -> tuple[int, int]:
        """Return the epoch of an optimizer step, counted from 1, and how many steps of it come before."""
        stage = self.stage_of_step(step)
        steps = self.stage_steps[stage]
        before = step - 1 - sum(one.total for one in self.stage_steps[:stage])
        epoch = steps.epoch_at(before)
        return self.first_epoch(stage) + epoch, before - steps.before(epoch)

    def how_to_extend(self, step: int, has_tables: bool) -> str:
        """Return options that make a run longer that is finished at a step. has_tables: its settings have [[stage]]."""
        if step < self.total_steps:
            return f"--train.max-steps {self.total_steps}"
        last, number = self.stages[-1], len(self.stages) - 1
        if not last.epochs or (self.planned_steps and self.planned_steps[-1] != self.stage_steps[-1].total):
            # it ended early, or never began: only another stage trains on
            planned = last.config.stage[number].epochs if has_tables else last.config.train.epochs
            own = "" if has_tables else f"--stage.{number}.epochs {planned} "
            options = f"{own}--stage.{number + 1}.epochs {planned}"
        elif not SCHEDULES[last.schedule].depends_on_length:
            name = f"stage.{number}" if has_tables else "train"
            options = f"--{name}.epochs {2 * last.epochs}"
        else:
            # a stage with a schedule ends where that does
            own = "" if has_tables else f"--stage.{number}.epochs {last.epochs} "
            options = f"{own}--stage.{number + 1}.epochs {last.epochs}"
        return f"{options} --train.max-steps 0" if self.max_steps else options

    def holds(self, step: int, epoch: int, step_in_epoch: int, stage: int) -> bool:
        """Return whether a run reaches this position after `step` steps, the last of them in `stage`.

        max_steps is ignored: it may have changed since.
        """
        if not (0 <= epoch <= self.num_epochs and 0 <= stage < len(self.stages)):
            return False
        done = self.steps_before(epoch)
        in_epoch = 0 if epoch == self.num_epochs else self.steps_of(epoch)
        last_epoch = epoch if step_in_epoch > 0 else max(0, epoch - 1)
        return step == done + step_in_epoch and 0 <= step_in_epoch <= in_epoch and stage == self.stage_of(last_epoch)

    def text_learning_rate(self, settings: TextEncoder, epoch: int, step_in_epoch: int) -> float:
        """Return the text encoder's learning rate at a step. Its schedule spans the epochs in which it is trained.

        They are those of the planned run, so that a stage that ends early changes no rate.
        """
        planned = self.planned_stages or self.stage_steps
        num_epochs = settings.trained_epochs(sum(stage.epochs for stage in planned))
        num_steps, step = _steps_before(planned, num_epochs), self.steps_before(epoch) + step_in_epoch
        # epochs that took the place of planned ones may have more steps: they have the rate of the last planned step
        return learning_rate(settings, min(step, max(0, num_steps - 1)), num_steps)

    def steps_before(self, epoch: int) -> int:
        """Return the optimizer steps of the run's first `epoch` epochs, whatever max_steps."""
        return _steps_before(self.stage_steps, epoch)

    def learning_rate(self, epoch: int, step_in_epoch: int) -> float:
        """Return the learning rate of a step. A schedule spans its whole stage, even if max_steps cuts it short."""
        index = self.stage_of(epoch)
        stage, steps = self.stages[index], self.stage_steps[index]
        step = steps.before(epoch - self.first_epoch(index)) + step_in_epoch
        return learning_rate(stage, step, self.planned_steps[index] if self.planned_steps else steps.total)


def _steps_before(stages: Sequence[StageSteps], epoch: int) -> int:
    done, left = 0, epoch
    for steps in stages:
        num = min(steps.epochs, left)
        done, left = done + steps.before(num), left - num
    return done


def stage_records(timeline: Timeline) -> list[dict]:
    """Return what data.json holds of a run's stages.

    epochs, steps_per_epoch: a single number of steps where all epochs are alike. planned_steps: of the whole stage,
    which its schedule spans, for one that ended early.
    """
    rows = [{"epochs": steps.epochs, "steps_per_epoch": steps.numbers} for steps in timeline.stage_steps]
    for row, steps, planned in zip(rows, timeline.stage_steps, timeline.planned_steps, strict=False):
        if planned != steps.total:
            row["planned_steps"] = planned
    return rows
