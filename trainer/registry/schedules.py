"""The registry of learning rate schedules: every value of `optimizer.schedule`, as a function of the step.

A schedule gives the learning rate as a fraction of its peak at each point of a stage. It is a pure function, so that a
resumed run, the plan and the report agree on it. Does not import torch. A new schedule is a row here; its own settings,
if it has any, are fields of [optimizer], [[stage]] and [text_encoder] in trainer/config/schema.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class ScheduleSettings(Protocol):
    """What a schedule reads of a resolved stage or of the text encoder's settings (trainer/config/schema.py)."""

    lr: float
    schedule: str
    warmup_steps: int
    lr_start: float
    lr_end: float
    lr_rise: float
    lr_cycles: int
    lr_cycle_decay: float
    lr_power: float


@dataclass(frozen=True)
class ScheduleSpec:
    """A schedule.

    name: as in optimizer.schedule. help: its line in the config's help. fraction: returns the fraction of the peak
    when a fraction `done` of the steps after the warm-up is done, 0 <= done < 1. settings: those that it reads.
    corners: returns the `done` at which the curve has a corner or a jump.
    """

    name: str
    help: str
    fraction: Callable[[float, ScheduleSettings], float]
    settings: tuple[str, ...] = ()
    corners: Callable[[ScheduleSettings], list[float]] = lambda settings: []

    @property
    def depends_on_length(self) -> bool:
        """Whether a stage that becomes longer has other learning rates from its start."""
        return self.fraction is not _constant


def _constant(done: float, settings: ScheduleSettings) -> float:
    return 1.0


def _linear(done: float, settings: ScheduleSettings) -> float:
    return _between(1 - done, settings.lr_end)


def _half_cosine(done: float) -> float:
    """Return 1 at 0, falling along a cosine to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _cosine(done: float, settings: ScheduleSettings) -> float:
    """Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts."""
    return _between(_half_cosine(done), settings.lr_end)


def _cosine_restarts(done: float, settings: ScheduleSettings) -> float:
    """Loshchilov and Hutter 2016, arXiv:1608.03983, with cycles of equal length."""
    cycle = math.floor(settings.lr_cycles * done)
    peak = max(settings.lr_end, settings.lr_cycle_decay**cycle)
    return _between(_half_cosine(settings.lr_cycles * done - cycle), settings.lr_end, peak)


def _polynomial(done: float, settings: ScheduleSettings) -> float:
    return _between((1 - done) ** settings.lr_power, settings.lr_end)


def _one_cycle(done: float, settings: ScheduleSettings) -> float:
    """Smith and Topin 2017, arXiv:1708.07120, in two phases, both along a cosine."""
    if done < settings.lr_rise:
        return _between(1 - _half_cosine(done / settings.lr_rise), settings.lr_start)
    return _between(_half_cosine((done - settings.lr_rise) / (1 - settings.lr_rise)), settings.lr_end)


def _between(height: float, low: float, high: float = 1.0) -> float:
    # exact at low 0, which runs from before there was lr_end have
    return low + (high - low) * height


_SPECS = (
    ScheduleSpec("constant", "the peak all along", _constant),
    ScheduleSpec("linear", "a straight line down to lr_end", _linear, ("lr_end",)),
    ScheduleSpec("cosine", "half a cosine down to lr_end", _cosine, ("lr_end",)),
    ScheduleSpec(
        "cosine_restarts",
        "lr_cycles times such a cosine, each with a peak lr_cycle_decay times the last one's",
        _cosine_restarts,
        ("lr_end", "lr_cycles", "lr_cycle_decay"),
        lambda settings: [cycle / settings.lr_cycles for cycle in range(1, settings.lr_cycles)],
    ),
    ScheduleSpec("polynomial", "down to lr_end by (1 - progress)^lr_power", _polynomial, ("lr_end", "lr_power")),
    ScheduleSpec(
        "one_cycle",
        "up from lr_start in the first lr_rise of the stage, then down to lr_end, both along a cosine",
        _one_cycle,
        ("lr_start", "lr_rise", "lr_end"),
        lambda settings: [settings.lr_rise],
    ),
)

SCHEDULES: dict[str, ScheduleSpec] = {spec.name: spec for spec in _SPECS}
# every setting that belongs to some of the schedules only
SCHEDULE_SETTINGS = tuple(dict.fromkeys(name for spec in _SPECS for name in spec.settings))
# what the settings are worth in runs from before they existed
DEFAULTS = {
    "lr_end": 0.0,
    "lr_start": 0.04,
    "lr_rise": 0.3,
    "lr_cycles": 3,
    "lr_cycle_decay": 1.0,
    "lr_power": 2.0,
}


def unused_settings(schedule: str) -> set[str]:
    """Return the settings that belong to other schedules only."""
    return set(SCHEDULE_SETTINGS) - set(SCHEDULES[schedule].settings)


def learning_rate(settings: ScheduleSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of a stage of num_steps.

    It rises linearly over settings.warmup_steps to where the schedule begins, which then spans the steps that are left:
    it would reach its end at num_steps, the step after the last.
    """
    spec, warmup_steps = SCHEDULES[settings.schedule], settings.warmup_steps
    if step < warmup_steps:
        return settings.lr * spec.fraction(0.0, settings) * (step + 1) / (warmup_steps + 1)
    return settings.lr * spec.fraction((step - warmup_steps) / max(1, num_steps - warmup_steps), settings)


def corner_steps(settings: ScheduleSettings, num_steps: int) -> set[int]:
    """Return the steps (0-based) beside corners and jumps of a stage's learning rate, which a thinned curve keeps."""
    warmup_steps = settings.warmup_steps
    span = max(1, num_steps - warmup_steps)
    at = [warmup_steps + span * done for done in SCHEDULES[settings.schedule].corners(settings)]
    # a `done` such as 2 / 3 may be rounded to either side of its step
    beside = {step for x in at for step in range(round(x) - 1, round(x) + 2)}
    return {step for step in {warmup_steps - 1, warmup_steps} | beside if 0 <= step < num_steps}


def help_text() -> str:
    """Return the help of the `schedule` settings, which describes each schedule."""
    rows = ";\n".join(f"{spec.name}: {spec.help}" for spec in _SPECS)
    return (
        "Course of the learning rate over a stage; of [text_encoder], over all epochs in which that is trained.\n"
        f"{rows}."
    )
