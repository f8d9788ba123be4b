"""Which checkpoints of a run a word names: last, best, a step, an epoch, all of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from safelight.errors import UserError
from safelight.trainer.checkpoint.files import CheckpointGone, Position, list_checkpoints, read_position
from safelight.trainer.config.toml import load_config
from safelight.untrusted import path_in, read_json_object

# a number without sign, of digits that int takes
_NUMBER = re.compile("(step-|epoch-)?0*([0-9]{1,8})")
_SUM = re.compile(r"[0-9]{1,8}(\+[0-9]{1,8})+")
# epochs that are named in a message
MAX_NAMED = 12
# how often checkpoints are chosen that a run replaces before they are read
MAX_CHOICES = 5

Chosen, Made = TypeVar("Chosen"), TypeVar("Made")


def with_chosen(
    choose: Callable[[], Chosen], make: Callable[[Chosen], Made], say: Callable[[str], None] | None = None
) -> Made:
    """Return make(choose()), choosing again if a run that still trains has replaced what was chosen.

    say: called with a line then. Raises CheckpointGone if there is no other choice, as with a checkpoint named by its
    step, or if the run replaces them faster than they are read.
    """
    gone: CheckpointGone | None = None
    for _ in range(MAX_CHOICES):
        try:
            # which reads checkpoints, too
            chosen = choose()
        except CheckpointGone as error:
            gone = error
            continue
        except UserError as error:
            raise gone or error from None
        if gone is not None and say is not None:
            say("note: the run, which still trains, has replaced the checkpoint meanwhile; taking the newest")
        try:
            return make(chosen)
        except CheckpointGone as error:
            gone = error
    assert gone is not None
    raise gone


def pick_step(run_dir: Path, checkpoint: str, allow_base: bool = True) -> int | None:
    """Return the step of a checkpoint; None for `base`, if that is allowed.

    checkpoint: `last`, `best`, or a number: a step if there is such a checkpoint, else an epoch; `step-300` and
    `epoch-27` say which. `30+4` is 4 epochs into the stage after one of 30. Raises UserError if there is none.
    """
    steps = list_checkpoints(run_dir)
    if checkpoint == "base" and allow_base:
        return None
    if not steps:
        command = f"safelight train {shlex.quote(str(run_dir))} --resume"
        raise UserError(f"{run_dir} has no checkpoint yet; wait until the run saves one, or go on with it: {command}")
    if checkpoint == "last":
        return steps[-1]
    if checkpoint == "best":
        best = best_step(run_dir)
        if best is None:
            position = read_position(run_dir, steps[-1], to_resume=False)
            reason = (
                "the base has the lowest validation loss" if position.best_step == 0 else "the run has not validated"
            )
            raise UserError(
                f"{run_dir} has no best checkpoint: {reason}; use last or one of {', '.join(map(str, steps))}"
            )
        return best
    if match := _NUMBER.fullmatch(checkpoint):
        kind, number = match[1], int(match[2])
        if kind != "epoch-" and number in steps:
            return number
        step = None if kind == "step-" else _after_epochs(run_dir, steps, number)
        if step is not None:
            return step
    elif _SUM.fullmatch(checkpoint):
        step = _after_epochs(run_dir, steps, _added(run_dir, checkpoint))
        if step is not None:
            return step
    names = "last, best, base" if allow_base else "last, best"
    raise UserError(
        f"checkpoint {checkpoint!r} is not in {run_dir}; use {names} or one of {', '.join(map(str, steps))}"
        f"{_named_epochs(run_dir, steps)}"
    )


def pick_steps(run_dir: Path, checkpoints: str) -> list[int]:
    """Return the steps of the checkpoints that a list names, ascending: words of `pick_step`, or `all`, with commas.

    The base is always compared, so it may be named and adds nothing. Raises UserError as `pick_step`.
    """
    words = [word.strip() for word in checkpoints.split(",")]
    steps: set[int] = set()
    for word in words:
        if word == "all":
            pick_step(run_dir, "last")
            steps |= set(list_checkpoints(run_dir))
        elif (step := pick_step(run_dir, word)) is not None:
            steps.add(step)
    return sorted(steps)


def best_and_last(run_dir: Path) -> list[int]:
    """Return the steps of the best and the last checkpoint, which may be one. Raises UserError as `pick_step`."""
    last = pick_step(run_dir, "last")
    return sorted({last, best_step(run_dir) or last})


def best_step(run_dir: Path) -> int | None:
    """Return the step of the checkpoint with the lowest held-out loss, None if there is none.

    Raises UserError if the last checkpoint's record is damaged.
    """
    steps = list_checkpoints(run_dir)
    best = read_position(run_dir, steps[-1], to_resume=False).best_step if steps else None
    return best if best in steps else None


def epoch_of(run_dir: Path, step: int) -> float:
    """Return the epochs that were trained when a checkpoint was saved; whole ones if data.json does not tell more."""
    position = read_position(run_dir, step, to_resume=False)
    if position.step_in_epoch == 0:
        return float(position.epoch)
    per_epoch = _steps_of_epoch(run_dir, position)
    return round(position.epoch + position.step_in_epoch / per_epoch, 6) if per_epoch else float(position.epoch)


def _steps_of_epoch(run_dir: Path, position: Position) -> int:
    """Return how many steps a position's epoch has, 0 if that is unknown."""
    try:
        stages = read_json_object(path_in(run_dir, "data.json"))["stages"]
        before = sum(stage["epochs"] for stage in stages[: position.stage])
        numbers = stages[position.stage]["steps_per_epoch"]
        number = numbers[0 if len(numbers) == 1 else position.epoch - before]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return 0
    return number if type(number) is int and number >= position.step_in_epoch else 0


def _after_epochs(run_dir: Path, steps: list[int], epochs: int) -> int | None:
    """Return the step of the checkpoint that was saved after so many epochs, None if there is none."""
    return next((step for epoch, step in _whole_epochs(run_dir, steps) if epoch == epochs), None)


def _whole_epochs(run_dir: Path, steps: list[int]) -> list[tuple[int, int]]:
    """Return (epochs, step) of the checkpoints that were saved at the end of an epoch."""
    positions = [read_position(run_dir, step, to_resume=False) for step in steps]
    return [(position.epoch, position.step) for position in positions if position.epoch and not position.step_in_epoch]


def _added(run_dir: Path, checkpoint: str) -> int:
    """Return the epochs of a text such as 30+4. Raises UserError if the run's stages have other lengths."""
    *before, last = map(int, checkpoint.split("+"))
    lengths = _stage_lengths(run_dir)
    if before != lengths[: len(before)]:
        ends = ", ".join(map(str, accumulate(lengths)))
        raise UserError(
            f"checkpoint {checkpoint!r}: the stages of {run_dir} have {', '.join(map(str, lengths))} epochs and end "
            f"after {ends}; name the epochs of each stage before the last, as in {'+'.join(map(str, lengths))}"
        )
    return sum(before) + last


def _stage_lengths(run_dir: Path) -> list[int]:
    """Return the epochs of each stage: those trained of stages that ended early, for others those of the settings."""
    lengths = [stage.epochs for stage in load_config(run_dir / "config.toml").stages()]
    steps = list_checkpoints(run_dir)
    for stage, epochs in read_position(run_dir, steps[-1], to_resume=False).ended if steps else ():
        if stage < len(lengths):
            lengths[stage] = epochs
    return lengths


def _named_epochs(run_dir: Path, steps: list[int]) -> str:
    """Return the end of a message that names the epochs of which there are checkpoints."""
    epochs = [epoch for epoch, _ in _whole_epochs(run_dir, steps)]
    if not epochs:
        return ""
    shown = ", ".join(map(str, epochs[-MAX_NAMED:]))
    return f" (steps), or an epoch: {'..., ' * (len(epochs) > MAX_NAMED)}{shown}"
