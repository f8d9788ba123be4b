"""Notices that a run has diverged, because its losses are no longer finite, and says how to go on.

Finite-ness is read when a log line is due, never in a step. A checkpoint is written only if the UNet still gives a
finite loss with its weights (evaluate.check_weights), so rotation never replaces a sound checkpoint by a broken one.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.trainer.checkpoint.files import folder_of, list_checkpoints, resume_command
from safelight.trainer.config.schema import Config
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.run_log.doubts import is_risen
from safelight.trainer.step.step import StepResult

# steps in a row without a finite loss, or without finite gradients, that end a run: one or two can be photographs
# whose cached rows are damaged; after weights have broken, no later step succeeds
MAX_LOST_IN_A_ROW = 5
# the same for finite losses whose gradients overflow in fp16: each such step halves the loss scale, which reaches its
# minimum after 30 (from 2^16 to 2^-14) from the initial value, 38 from the maximum; more cannot be the scale's search
MAX_SKIPS_IN_A_ROW = 50
# A UNet that predicts nothing has a mean squared error of 1, the variance of its target. Weights with ten times that on
# one photograph are ruined, if finite: they are saved, but never gone on from, nor kept in place of a sound checkpoint
MAX_PROBED_LOSS = 10.0
# suggested learning rate relative to the one that diverged
SMALLER = 0.1
MAX_NAMES = 3


class NotFinite(Exception):
    """Raised where a run is found to have diverged; train.py turns it into errors.Diverged.

    step: optimizer steps taken. what: what is not finite, and since when. last_sound: the last step whose checkpoint,
    if there is one, is known to be sound. photos: photographs that are at fault, if any.
    """

    def __init__(self, step: int, what: str, last_sound: int, photos: Sequence[str] = ()):
        super().__init__(what)
        self.step, self.what, self.last_sound, self.photos = step, what, last_sound, tuple(photos)


@dataclass(frozen=True)
class Streak:
    """The newest steps, as far as they changed nothing in a row.

    num_skipped: steps whose gradients were not finite. num_lost: steps with a loss that was not finite, which are
    skipped too. bad, good: the photographs in those, by whether their loss was finite.
    """

    num_skipped: int = 0
    num_lost: int = 0
    bad: frozenset[str] = frozenset()
    good: frozenset[str] = frozenset()

    def after(self, result: StepResult, photos: Sequence[str]) -> Streak:
        """Return the streak after one more step, read to the CPU. photos: one per loss; empty if unknown."""
        is_finite = result.losses.isfinite().tolist()
        num_skipped = 0 if result.is_applied else self.num_skipped + 1
        if all(is_finite):
            return Streak(num_skipped)
        named = list(zip(photos, is_finite, strict=False))
        good = self.good | {photo for photo, finite in named if finite}
        bad = (self.bad | {photo for photo, finite in named if not finite}) - good
        return Streak(num_skipped, self.num_lost + 1, bad, good)

    def check(self, step: int, is_fp16: bool) -> None:
        """Raise NotFinite if the streak that ends at a step is too long."""
        if self.num_lost >= MAX_LOST_IN_A_ROW:
            first = step - self.num_lost + 1
            # without a finite loss it is the weights: those before the first lost step, and not one photograph
            photos = sorted(self.bad) if self.good else []
            raise NotFinite(
                step, f"the loss has not been finite since step {first}", step if photos else first - 2, photos
            )
        if self.num_skipped >= (MAX_SKIPS_IN_A_ROW if is_fp16 else MAX_LOST_IN_A_ROW):
            first = step - self.num_skipped + 1
            raise NotFinite(step, f"the gradients have not been finite since step {first}", first - 2)


def named(photos: Sequence[str]) -> str:
    """Return a few of the photographs' names, and how many more there are."""
    more = len(photos) - MAX_NAMES
    return ", ".join(photos[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def explain(
    failure: NotFinite,
    run_dir: Path,
    config: Config,
    precision: str,
    stage: int,
    held_out: Mapping[int, float],
    ruined: Collection[int],
) -> str:
    """Return the line that ends a run: what happened, the likely cause, and the command that goes on.

    config: as the user wrote it. precision: fp32, bf16 or fp16. stage: the one the run was in. held_out: step ->
    held-out loss of the run's validations; ruined: steps whose weights were ruined when they were saved. By
    these a checkpoint that is finite but far worse than the base is not one to go on from.
    """
    what = f"step {failure.step}: {failure.what}"
    steps = list_checkpoints(run_dir)
    sound = [
        step
        for step in steps
        if step <= failure.last_sound and step not in ruined and not is_risen(held_out.get(step, 0.0), held_out.get(0))
    ]
    newest = sound[-1] if sound else None
    aside = [folder_of(run_dir, step) for step in steps if newest is None or step > newest]
    if failure.photos:
        cache = Path(config.data.path) / "cache"
        return (
            f"{what} for {named(failure.photos)}, while others are fine: its cached rows are damaged or exceed the "
            f"range of {precision}; delete {cache}, which is encoded again; "
            f"{_go_on(newest)} with: {resume_command(run_dir, aside, 'diverged')}"
        )
    if failure.step == 0:
        again = f"safelight train {shlex.quote(str(run_dir / 'config.toml'))} --model.precision fp32"
        wide = "use another model.base" if precision == "fp32" else f"use another model.base, or try: {again}"
        return f"{what}: the base model's weights are not finite, or its values exceed the range of {precision}; {wide}"
    resolved, spec = config.stages()[stage], OPTIMIZERS[config.optimizer.name]
    own = bool(config.stage) and config.stage[stage].lr is not None
    rate = f"--{f'stage.{stage}' if own else 'optimizer'}.lr {max(SMALLER * resolved.lr, spec.min_lr):.2g}"
    kind = "factor on the learning rate" if spec.estimates_rate else "learning rate"
    cause = f"the {kind} {resolved.lr:g} is probably too high"
    if precision == "fp16":
        cause += ", or values exceed the range of fp16 (model.precision bf16 or fp32 needs a new run)"
    return f"{what}: {cause}; {_go_on(newest)} with a smaller rate: {resume_command(run_dir, aside, 'diverged', rate)}"


def _go_on(step: int | None) -> str:
    if step is None:
        return "no sound checkpoint was saved; this starts again from step 0"
    return f"go on from step {step}, the last sound checkpoint,"
