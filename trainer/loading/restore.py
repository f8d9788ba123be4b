"""Loads the checkpoint that a run resumes from, and checks that it fits the run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from torch import Tensor

from safelight.errors import UserError
from safelight.text import shortened
from safelight.trainer.checkpoint.files import (
    MISFIT,
    Position,
    folder_of,
    list_checkpoints,
    load_checkpoint,
    read_identity,
    read_position,
    resume_command,
)
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.config.toml import load_config
from safelight.trainer.loading.dataset import Dataset
from safelight.trainer.loading.models import Models
from safelight.trainer.loading.resolve import ResolvedRun
from safelight.trainer.models.class_photos import is_class_image
from safelight.trainer.optim.ema import take_averages
from safelight.trainer.run_log.environment import (
    EPOCH_ORDER,
    recorded,
)
from safelight.trainer.run_log.metrics import held_out_losses
from safelight.trainer.run_log.unlogged_steps import take_state
from safelight.trainer.step.text_training import take_text_state
from safelight.untrusted import path_in, read_json_object


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    unlogged: state of the steps that were not logged when the checkpoint was saved; None for a new run.
    num_skipped_tensors: how many tensor updates were skipped inside backward so far. is_grouped: whether an epoch
    trains all batches of a bucket in a row; a run keeps the order it began with.
    """

    position: Position
    unlogged: dict[str, Tensor] | None
    num_skipped_tensors: int
    is_grouped: bool


def restore(run: ResolvedRun, models: Models) -> Start:
    """Load the checkpoint to resume from, if any, and return where the run starts."""
    if run.resume_step is None:
        return Start(Position(), None, 0, is_grouped=not run.no_graphs)
    optimizer = models.context.optimizer
    unlogged, position = load_state(run, models, run.resume_step)
    num_skipped_tensors = int(optimizer.num_skipped_tensors) if optimizer.is_fused else 0
    order = recorded(run.run_dir, EPOCH_ORDER) or {}
    return Start(position, unlogged, num_skipped_tensors, is_grouped=order.get("grouped", False))


def load_state(run: ResolvedRun, models: Models, step: int) -> tuple[dict[str, Tensor], Position]:
    """Load a checkpoint's weights, optimizer state and averages; return its unlogged steps and its position."""
    state, position = load_checkpoint(run.run_dir, step, models.trained)
    try:
        unlogged = take_state(state)
        take_averages(state, models.ema)
        trained_epochs = read_identity(run.run_dir, step)[0].settings.get("text_encoder.epochs")
        take_text_state(state, models.context.texts, trained_epochs)
        models.context.optimizer.load_state_tensors(state)
    except UserError as error:
        raise UserError(f"{folder_of(run.run_dir, step)}: {error}") from error
    return unlogged, position


def checked_position(run: ResolvedRun, timeline: Timeline) -> Position:
    """Return the position of the checkpoint to resume from. Raises UserError if the run's timeline has none such."""
    position = read_position(run.run_dir, run.resume_step)
    is_reached = timeline.holds(position.step, position.epoch, position.step_in_epoch, position.stage)
    latest = max(position.best_step, position.stage_best_step, position.began_from)
    if not is_reached or latest > position.step:
        raise UserError(
            f"{run.checkpoint} is damaged: {MISFIT} (step {position.step}, epoch "
            f"{position.epoch} and {position.step_in_epoch} steps, stage {position.stage}); move that folder away to "
            "resume from the checkpoint before it"
        )
    return position


def with_stage_best(run: ResolvedRun, timeline: Timeline, position: Position) -> Position:
    """Return a position with the best validation of its stage, if the next stage begins from that.

    A position holds it only while the settings say so, which they may do since this resume: then it is taken from the
    recorded validations. Raises UserError if that checkpoint was not kept, or is gone where it is needed at once.
    """
    following = position.stage + 1
    if following >= len(timeline.stages) or timeline.stages[following].start_from != "best":
        return position
    began = timeline.steps_before(timeline.first_epoch(position.stage))
    losses = {step: loss for step, loss in held_out_losses(run.run_dir).items() if began < step <= position.step}
    best, is_due = position.stage_best_loss, timeline.stage_of(position.epoch) >= following
    # the first of equal ones, as while training
    found = min(sorted(losses), key=losses.__getitem__, default=None)
    is_new = found is not None and (best is None or losses[found] < best)
    if is_new:
        position = replace(position, stage_best_step=found, stage_best_loss=losses[found])
    if position.stage_best_step < 0:
        if is_due and not position.unmeasured:
            raise no_best(run, timeline, following, "which was never validated;")
        return position
    folder = folder_of(run.run_dir, position.stage_best_step)
    if (is_new or is_due) and not (folder / "state.json").is_file():
        state = "was not kept;" if is_new else "is gone; put it back, or"
        raise no_best(run, timeline, following, f"{folder}, which {state}")
    return position


def no_best(run: ResolvedRun, timeline: Timeline, stage: int, why: str) -> UserError:
    """Return the error for a stage that cannot begin from the best checkpoint of the one before it.

    With that stage's checkpoints that there are, and the command that goes on from the last one.
    """
    first, end = (timeline.steps_before(timeline.first_epoch(number)) for number in (stage - 1, stage))
    kept = [f"{step:,}" for step in list_checkpoints(run.run_dir) if first < step <= end]
    there = f"its checkpoints that there are: step {', '.join(kept)}" if kept else "none of its checkpoints is there"
    last = f"--stage.{stage}.start-from last"
    options = [option for option in _stages_not_recorded(run) if option != f"--stage.{stage}.start-from best"]
    command = resume_command(run.run_dir, [], "", *options, last)
    return UserError(
        f"stage {stage + 1} begins from the best checkpoint of stage {stage}, {why} resume with {last} to begin "
        f"from the last one ({there}): {command}"
    )


def _stages_not_recorded(run: ResolvedRun) -> list[str]:
    """Return options that add the stages which the settings in the run folder do not have."""
    try:
        num_recorded = len(load_config(path_in(run.run_dir, "config.toml")).stage)
    except (UserError, OSError):
        num_recorded = 0
    options = []
    for number, stage in enumerate(run.user_config.stage[num_recorded:], num_recorded):
        for name, value in stage.model_dump(by_alias=True, exclude_unset=True).items():
            values = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
            for key, one in values.items():
                option = f"--stage.{number}.{key.replace('_', '-')}"
                words = one if isinstance(one, list | tuple) else [str(one).lower() if isinstance(one, bool) else one]
                options.append(" ".join([option, *(shlex.quote(str(word)) for word in words)]))
    return options


def check_same_data(run: ResolvedRun, dataset: Dataset) -> None:
    """Raise UserError if the dataset has changed since the checkpoint to resume from was saved."""
    if read_identity(run.run_dir, run.resume_step)[0].data != run.identity(dataset.train).data:
        raise UserError(
            f"{run.checkpoint} was trained on other photographs, captions, crops, masks or photo settings than "
            f"{run.user_config.data.path} has now{_changes(run, dataset)}; start a new run with --run.dir"
        )


def _changes(run: ResolvedRun, dataset: Dataset) -> str:
    """Return how many photographs were added, removed, or got other captions or masks, as ": 2 added (...)".

    '' if unknown. Call it before the cache is filled: a caption or mask that is not in it, of a photograph that is, was
    edited.
    """
    try:
        split = read_json_object(path_in(run.run_dir, "split.json"))
        before = {str(file): None for half in ("train", "validation") for file in split[half]}
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    now = {sample.photo.file: sample for sample in dataset.samples if not is_class_image(sample.photo)}
    kept = [sample for file, sample in now.items() if file in before]
    keys = [key for s in kept for key in (*s.latent_keys, *s.caption_keys, *s.mask_keys)]
    missing = set(dataset.cache.missing(keys))
    kept = [s for s in kept if missing.isdisjoint(s.latent_keys)]
    groups = {
        "added": [file for file in now if file not in before],
        "removed": [file for file in before if file not in now],
        "with other captions": [s.photo.file for s in kept if missing.intersection(s.caption_keys)],
        "with other masks": [s.photo.file for s in kept if missing.intersection(s.mask_keys)],
    }
    words = [f"{len(files)} {what} (first: {shortened(files[0])})" for what, files in groups.items() if files]
    return f": {', '.join(words)}" if words else ""
