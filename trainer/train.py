"""The main job, top to bottom: load, then step, log, validate, sample and save until done.

Resuming equals never having stopped: every random draw is keyed, and a checkpoint holds the position within the epoch and the
part of the log's running means that was not written yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from safelight.data.batches import MicroBatch, iterate, load_batch, plan_epoch
from safelight.data.lock import FolderLock
from safelight.errors import UserError
from safelight.trainer.between_steps import is_due, measure
from safelight.trainer.checkpoint.files import Position, list_checkpoints, rewrite_position
from safelight.trainer.config.schema import Config, ResolvedStage
from safelight.trainer.job import Job, load_job
from safelight.trainer.memory_plan.gpus import this_card
from safelight.trainer.memory_plan.resolve_auto import out_of_memory
from safelight.trainer.run_log.metrics import reset_peak_memory
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.step.cuda_graphs import StepGraphs
from safelight.trainer.step.step import Inputs, StepSettings, train_step, upload
from safelight.trainer.step.torch_flags import algorithms


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the position reached, and whether it was interrupted."""

    run_dir: Path
    position: Position
    interrupted: bool


def train(
    config: Config,
    *,
    resume: bool = False,
    terminal: Terminal | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    guard: AbstractContextManager = nullcontext(),  # noqa: B008  nullcontext holds no state
) -> Outcome:
    """Train a run from its config and return how it ended.

    resume: go on from the newest checkpoint, from the start if there is none yet. stop_requested: called after every
    step, validation forward pass and denoising step; when it returns True, the run is saved and returns. guard: entered for the
    loop only, where an interruption has something to save.
    Raises UserError for what the user can fix: settings, dataset, model, a run folder that is damaged or in use.
    """
    terminal = terminal or Terminal()
    run_dir = Path(config.run.dir)
    with FolderLock(run_dir, "wait until it ends, or name another --run.dir") as lock:
        if lock.note:
            terminal.say(lock.note)
        checkpoints = list_checkpoints(run_dir)
        if checkpoints and not resume:
            raise UserError(
                f"{run_dir} already holds a run (at step {checkpoints[-1]}); add --resume, or name another --run.dir"
            )
        if resume and not checkpoints:
            terminal.say(f"{run_dir} holds no checkpoint yet: starting at step 0")
        resume_step = checkpoints[-1] if checkpoints else None
        with algorithms(deterministic=config.run.deterministic, cudnn_benchmark=config.train.cudnn_benchmark):
            job, position = load_job(config, run_dir, resume_step, terminal, stop_requested)
            try:
                with guard, job.saver:
                    return _loop(job, position)
            finally:
                terminal.pause()
                job.progress.metrics.close()
                job.dataset.cache.close()


def _loop(job: Job, position: Position) -> Outcome:
    """Train from a position to the end, or until a stop is requested."""
    config, timeline, progress = job.run.given, job.timeline, job.progress
    if position.step == 0 or position.unmeasured:
        position = _measured(job, position)
        if position.unmeasured:
            return Outcome(job.run.run_dir, position, interrupted=True)
        if position.step > 0:
            rewrite_position(job.run.run_dir, position)
    if position.step < timeline.num_steps:
        progress.show(position, "first step")
        job.saver.reserve(job.models.context.unet, job.models.live_state())
    if job.run.plan is not None:
        # the peak that is compared with the plan is that of training steps only
        reset_peak_memory(job.run.device)
    progress.start_clock()
    while position.step < timeline.num_steps:
        index = timeline.stage_of(position.epoch)
        stage = timeline.stages[index]
        if position.epoch == timeline.first_epoch(index) and position.step_in_epoch == 0:
            # logged under the coming step: a resume from the checkpoint before it cuts this line and writes it again
            detail = f"{index + 1} of {len(timeline.stages)}: {stage.epochs} epochs, lr {stage.lr:g} {stage.schedule}"
            progress.metrics.write("event", position.step + 1, event="stage began", detail=detail)
        plan = plan_epoch(
            job.dataset.train,
            seed=config.run.seed,
            epoch=position.epoch,
            batch_size=stage.batch_size,
            caption_dropout=config.data.caption_dropout,
            grouped=job.is_grouped,
        )
        remaining = plan[position.step_in_epoch * stage.accumulate :]
        batches = iterate(job.dataset.rows(job.dataset.train), remaining, transport=job.transport)
        graphs = _begin_epoch(job, stage, remaining, position)
        for group in _groups(remaining, stage.accumulate):
            lr = timeline.learning_rate(position.epoch, position.step_in_epoch)
            num_samples = stage.batch_size * stage.accumulate
            settings = StepSettings(num_samples, lr, stage.weight_decay, stage.max_grad_norm)
            micro_batches = islice(batches, len(group))
            try:
                result = train_step(
                    job.models.context,
                    micro_batches,
                    settings,
                    seed=config.run.seed,
                    epoch=position.epoch,
                    graphs=graphs,
                )
            except torch.OutOfMemoryError:
                # the step may have changed some weights already: nothing of it is saved
                raise UserError(_memory_was_full(job, group, position)) from None
            if job.models.ema is not None:
                job.models.ema.update(result.taken)
            position = replace(position, step=position.step + 1, step_in_epoch=position.step_in_epoch + 1, stage=index)
            progress.log_step(position, result, lr, job.models.context.optimizer)
            job.saver.check()
            if position.step >= timeline.num_steps or job.stop_requested():
                break
            if is_due(config.save.every_steps, position.step) and not _at_epoch_end(job, position):
                _save(job, position)
        batches.close()
        if _at_epoch_end(job, position):
            position = _end_epoch(job, position)
        elif position.step >= timeline.num_steps:
            position = _finish(job, position)
        if job.stop_requested() and position.step < timeline.num_steps:
            _save(job, position)
            return Outcome(job.run.run_dir, position, interrupted=True)
    return Outcome(job.run.run_dir, position, interrupted=position.unmeasured)


def _begin_epoch(job: Job, stage: ResolvedStage, plan: list[MicroBatch], position: Position) -> StepGraphs | None:
    """Capture the shapes of an epoch's batches, or warm up the largest; return the graphs, None without."""

    def example() -> Inputs:
        batch = load_batch(job.dataset.rows(job.dataset.train), plan[0])
        return upload(batch, job.run.device, job.run.given.run.seed, position.epoch)

    num_samples = stage.batch_size * stage.accumulate
    try:
        graphs, message = job.capture.begin(plan, job.dataset.latent_factor, stage.accumulate, num_samples, example)
    except torch.OutOfMemoryError:
        raise UserError(_memory_was_full(job, plan, position)) from None
    if message:
        job.progress.terminal.say(message)
    return graphs


def _memory_was_full(job: Job, group: list[MicroBatch], position: Position) -> str:
    """Return the message that ends a run whose next step did not fit the GPU's memory."""
    largest = max(group, key=lambda micro: (micro.bucket.width * micro.bucket.height, len(micro.refs)))
    card = this_card(job.run.device) if job.run.device.type == "cuda" else None
    job.saver.wait_and_report()
    return out_of_memory(
        job.run.given,
        card,
        job.run.plan,
        largest.bucket,
        len(largest.refs),
        position.step + 1,
        job.saver.saved_step,
    )


def _groups(plan: list[MicroBatch], size: int) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of each optimizer step."""
    for start in range(0, len(plan), size):
        yield plan[start : start + size]


def _at_epoch_end(job: Job, position: Position) -> bool:
    return position.step_in_epoch == job.timeline.stage_steps_per_epoch[job.timeline.stage_of(position.epoch)]


def _end_epoch(job: Job, position: Position) -> Position:
    """Validate, sample and save as configured after an epoch; return the position at the start of the next."""
    position = replace(position, epoch=position.epoch + 1, step_in_epoch=0)
    if position.step >= job.timeline.num_steps:
        return _finish(job, position)
    save, best_step = job.run.given.save, position.best_step
    position = _measured(job, position)
    save_is_due = is_due(save.every_epochs, position.epoch) or is_due(save.every_steps, position.step)
    if save_is_due or position.best_step != best_step:
        _save(job, position)
    return position


def _measured(job: Job, position: Position) -> Position:
    """Return measure(position); if the GPU's memory is too small for it, save first what was trained."""
    try:
        return measure(job, position)
    except torch.OutOfMemoryError:
        if position.step > 0:
            _save(job, replace(position, unmeasured=True))
        raise UserError(
            f"the GPU's memory was full in validation or drawing after step {position.step}, whose weights are kept; go on "
            "with a smaller validate.batch_size, or sample.every_epochs 0 and draw by `safelight sample` later"
        ) from None


def _finish(job: Job, position: Position) -> Position:
    """Validate, sample and save at the end of the run."""
    position = _measured(job, position)
    _save(job, position)
    return position


def _save(job: Job, position: Position) -> None:
    """Start to save a checkpoint unless this step has one; a thread writes it while training goes on."""
    if job.saver.asked_step == position.step:
        return
    with job.progress.clock_paused():
        state = {**job.models.live_state(), **job.progress.window.state()}
        job.saver.save(job.models.context.unet, state, position)
