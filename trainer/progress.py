"""What a step leaves in the log and on the terminal: running means, skipped steps, and once the memory's peak."""

from __future__ import annotations

import time

import torch

from safelight.errors import UserError
from safelight.trainer.between_steps import epoch_fraction
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.job import Job
from safelight.trainer.memory_plan.resolve_auto import compare
from safelight.trainer.run_log.metrics import peak_memory_gib
from safelight.trainer.step.step import StepResult

# fp16's loss scale needs up to 24 halvings to find its place; more skips in a row than this lead nowhere
MAX_SKIPS_IN_A_ROW = 50


def _compare_memory(job: Job, position: Position) -> None:
    """Once, on a GPU: tell the planned peak of training's steps beside the measured one."""
    allocated, reserved = torch.cuda.max_memory_allocated(job.device), torch.cuda.max_memory_reserved(job.device)
    detail = compare(job.planned, allocated, reserved)
    job.metrics.write("event", position.step, event="memory", detail=detail)
    job.terminal.say(detail)
    job.is_memory_compared = True


def _count_skips(job: Job, position: Position, is_due: bool) -> None:
    """Count the skipped steps at the window's end, and write those of the window where its line is due."""
    in_a_row = job.num_skipped
    for number, result in enumerate(job.window.read(), start=position.step - len(job.window) + 1):
        in_a_row = 0 if result.taken else in_a_row + 1
        if is_due and not result.taken:
            detail = f"step {number}: the gradient was not finite"
            job.metrics.write("event", position.step, event="step skipped", detail=detail)
        if in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise UserError(
                f"the last {in_a_row} gradients were not finite, nothing is being learnt; "
                "use model.precision bf16 or fp32, or a lower optimizer.lr"
            )
    if is_due:
        job.num_skipped = in_a_row
        if job.optimizer.is_fused and (more := int(job.optimizer.num_skipped_tensors) - job.num_skipped_tensors) > 0:
            job.num_skipped_tensors += more
            detail = f"{more} tensors' gradients were not finite since the last line: they alone were not stepped"
            job.metrics.write("event", position.step, event="tensors skipped", detail=detail)


def log_step(job: Job, position: Position, result: StepResult, lr: float) -> None:
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
