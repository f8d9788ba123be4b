"""The main job, top to bottom: load, then step, log, validate, sample and save until done.

Resuming equals not stopping: every draw is keyed, the position within the epoch is in the checkpoint, and so is the
part of the log's running mean that was not written yet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from safelight.data.batches import MicroBatch, iterate, plan_epoch
from safelight.data.lock import FolderLock
from safelight.trainer.cards import this_card
from safelight.trainer.checkpoint import (
    Position,
    list_checkpoints,
    rewrite_position,
)
from safelight.trainer.config import Config
from safelight.trainer.gpu_memory import compare, out_of_memory
from safelight.trainer.job import Job, load_job
from safelight.trainer.log import Terminal, peak_memory_gib, reset_peak_memory
from safelight.trainer.measure import epoch_fraction, is_due, measure
from safelight.trainer.step import StepResult, train_step

# fp16's loss scale needs up to 24 halvings to find its place; more skips in a row than this lead nowhere
MAX_SKIPS_IN_A_ROW = 50


@dataclass(frozen=True)
class Outcome:
    """How a run ended: position reached, interrupted or done."""

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

    resume: go on from the newest checkpoint, from the start if there is none yet. stop_requested: asked after every
    step, forward pass of validation and denoising step; True saves and returns. guard: entered for the loop alone, where an interruption has something to save.
    Raises ValueError for what the user can mend: settings, dataset, model, a run folder that is damaged or in use.
    """
    terminal = terminal or Terminal()
    run_dir = Path(config.run.dir)
    with FolderLock(run_dir, "wait until it ends, or name another --run.dir") as lock:
        if lock.note:
            terminal.say(lock.note)
        checkpoints = list_checkpoints(run_dir)
        if checkpoints and not resume:
            raise ValueError(
                f"{run_dir} already holds a run (at step {checkpoints[-1]}); add --resume, or name another --run.dir"
            )
        if resume and not checkpoints:
            terminal.say(f"{run_dir} holds no checkpoint yet: starting at step 0")
        step = checkpoints[-1] if checkpoints else None
        with _deterministic(config.run.deterministic):
            job, position = load_job(config, run_dir, step, terminal, stop_requested)
            try:
                with guard, job.saver:
                    return _loop(job, position)
            finally:
                terminal.pause()
                job.metrics.close()
                job.dataset.cache.close()


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Let torch choose among deterministic operators alone within the block, and raise where it has none."""
    if not wanted:
        yield
        return
    # cuBLAS reads it when its first handle is made, and torch refuses its products without it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _loop(job: Job, position: Position) -> Outcome:
    """Train from a position to the end, or until asked to stop."""
    config, timeline = job.config, job.timeline
    if position.step == 0 or position.unmeasured:
        position = measure(job, position)
        if position.unmeasured:
            return Outcome(job.run_dir, position, interrupted=True)
        if position.step > 0:
            rewrite_position(job.run_dir, position)
    if position.step < timeline.num_steps:
        job.terminal.update("training", position.step, timeline.num_steps, "first step")
        job.saver.reserve(job.unet, _live_state(job))
    if job.planned is not None:
        # so that the peak is of training's steps alone
        reset_peak_memory(job.device)
    job.window_began = time.monotonic()
    while position.step < timeline.num_steps:
        index = timeline.stage_of(position.epoch)
        stage = timeline.stages[index]
        if position.epoch == timeline.first_epoch(index) and position.step_in_epoch == 0:
            # under the step to come: a resume from the checkpoint before it cuts this line and writes it again
            detail = f"{index + 1} of {len(timeline.stages)}: {stage.epochs} epochs, lr {stage.lr:g} {stage.schedule}"
            job.metrics.write("event", position.step + 1, event="stage began", detail=detail)
        plan = plan_epoch(
            job.dataset.train,
            seed=config.run.seed,
            epoch=position.epoch,
            batch_size=stage.batch_size,
            caption_dropout=config.data.caption_dropout,
        )
        remaining = plan[position.step_in_epoch * stage.accumulate :]
        batches = iterate(
            job.dataset.cache, job.dataset.train, remaining, job.dataset.empty_key, transport=job.transport
        )
        for group in _groups(remaining, stage.accumulate):
            lr = timeline.learning_rate(position.epoch, position.step_in_epoch)
            try:
                result = train_step(
                    job.unet,
                    job.optimizer,
                    islice(batches, len(group)),
                    job.schedule,
                    job.dataset.scaling_factor,
                    config.loss,
                    seed=config.run.seed,
                    epoch=position.epoch,
                    num_samples=stage.batch_size * stage.accumulate,
                    lr=lr,
                    weight_decay=stage.weight_decay,
                    max_grad_norm=stage.max_grad_norm,
                )
            except torch.OutOfMemoryError:
                # the step is lost, with it what it had changed of the weights: nothing of it is saved
                raise ValueError(_memory_was_full(job, group, position)) from None
            if job.ema is not None:
                job.ema.update(result.taken)
            position = replace(position, step=position.step + 1, step_in_epoch=position.step_in_epoch + 1, stage=index)
            _log(job, position, result, lr)
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
            return Outcome(job.run_dir, position, interrupted=True)
    return Outcome(job.run_dir, position, interrupted=position.unmeasured)


def _memory_was_full(job: Job, group: list[MicroBatch], position: Position) -> str:
    """Return the line that ends a run whose next step did not fit."""
    largest = max(group, key=lambda micro: (micro.bucket.width * micro.bucket.height, len(micro.refs)))
    card = this_card(job.device) if job.device.type == "cuda" else None
    job.saver.settle()
    return out_of_memory(
        job.config, card, job.planned, largest.bucket, len(largest.refs), position.step + 1, job.saver.saved_step
    )


def _compare_memory(job: Job, position: Position) -> None:
    """Once, on a GPU: tell the planned peak of training's steps beside the measured one."""
    allocated, reserved = torch.cuda.max_memory_allocated(job.device), torch.cuda.max_memory_reserved(job.device)
    detail = compare(job.planned, allocated, reserved)
    job.metrics.write("event", position.step, event="memory", detail=detail)
    job.terminal.say(detail)
    job.is_memory_compared = True


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
    config, before = job.config, position.best_step
    position = measure(job, position)
    save_is_due = is_due(config.save.every_epochs, position.epoch) or is_due(config.save.every_steps, position.step)
    if save_is_due or position.best_step != before:
        _save(job, position)
    return position


def _finish(job: Job, position: Position) -> Position:
    """Validate, sample and save at the end of the run."""
    position = measure(job, position)
    _save(job, position)
    return position


def _count_skips(job: Job, position: Position, is_due: bool) -> None:
    """Count the skipped steps at the window's end, and write those of the window where its line is due."""
    in_a_row = job.num_skipped
    for number, result in enumerate(job.window.read(), start=position.step - len(job.window) + 1):
        in_a_row = 0 if result.taken else in_a_row + 1
        if is_due and not result.taken:
            detail = f"step {number}: the gradient was not finite"
            job.metrics.write("event", position.step, event="step skipped", detail=detail)
        if in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise ValueError(
                f"the last {in_a_row} gradients were not finite, nothing is being learnt; "
                "use model.precision bf16 or fp32, or a lower optimizer.lr"
            )
    if is_due:
        job.num_skipped = in_a_row
        if job.optimizer.is_fused and (more := int(job.optimizer.num_skipped_tensors) - job.num_skipped_tensors) > 0:
            job.num_skipped_tensors += more
            detail = f"{more} tensors' gradients were not finite since the last line: they alone were not stepped"
            job.metrics.write("event", position.step, event="tensors skipped", detail=detail)


def _log(job: Job, position: Position, result: StepResult, lr: float) -> None:
    """Add a step to the running mean; every log.every_steps write it and begin anew.

    Skipped steps are told apart and left out of the means. Raises ValueError when every step is skipped for long.
    Whether a step was taken is a number on the device: it is read here alone, or after 50 steps without a line.
    """
    job.window.add(result)
    job.num_timed += len(result.losses)
    config, timeline = job.config, job.timeline
    is_due = position.step % config.log.every_steps == 0 or position.step == timeline.num_steps
    if is_due or len(job.window) % MAX_SKIPS_IN_A_ROW == 0:
        _count_skips(job, position, is_due)
    if not is_due:
        job.terminal.update("training", position.step, timeline.num_steps, job.note)
        return
    seconds, job.window_began = time.monotonic() - job.window_began, time.monotonic()
    images_per_s, job.num_timed = job.num_timed / seconds, 0
    loss, grad_norm = job.window.means()
    job.metrics.write(
        "train",
        position.step,
        epoch=round(epoch_fraction(job, position), 6),
        stage=position.stage,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        images_per_s=round(images_per_s, 3),
        memory_gib=round(peak_memory_gib(job.device), 3),
    )
    if job.planned is not None and not job.is_memory_compared:
        _compare_memory(job, position)
    told = "all steps skipped" if loss is None else f"loss {loss:.4f}"
    rate = f"{images_per_s:.1f}" if images_per_s >= 1 else f"{images_per_s:.2g}"
    job.note = f"{told}  {rate} img/s  {peak_memory_gib(job.device):.1f} GiB"
    job.terminal.update("training", position.step, timeline.num_steps, job.note)
    job.window.clear()


def _save(job: Job, position: Position) -> None:
    """Begin to save a checkpoint if this step has none; it is written, and those no longer kept deleted, behind the next steps."""
    if job.saver.asked_step == position.step:
        return
    began = time.monotonic()
    job.saver.save(job.unet, {**_live_state(job), **job.window.state()}, position)
    job.window_began += time.monotonic() - began


def _live_state(job: Job) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds beside weights and log: the tensors themselves."""
    return {**job.optimizer.live_state(), **({} if job.ema is None else job.ema.live_state())}
