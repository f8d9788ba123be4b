"""Writes a run's training lines to the log and the terminal: mean loss, skipped steps, images/s, peak memory."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

from safelight.errors import UserError
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.memory_plan.resolve_auto import compare
from safelight.trainer.optim.optimizer import UNetOptimizer
from safelight.trainer.resolve import ResolvedRun
from safelight.trainer.run_log.metrics import Metrics, peak_memory_gib
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.run_log.unlogged_steps import UnloggedSteps
from safelight.trainer.step.step import StepResult

# each skipped step halves fp16's loss scale, which reaches its minimum after 30 (from 2^16 to 2^-14) from the initial
# value, 38 from the maximum; more skipped steps in a row than this cannot be the scale's search
MAX_SKIPS_IN_A_ROW = 50


class Progress:
    """Collects steps between log lines and writes the lines.

    unlogged: the steps since the last line. num_skipped_tensors: how many tensor updates had been skipped inside
    backward when this process started.
    """

    def __init__(
        self,
        run: ResolvedRun,
        timeline: Timeline,
        metrics: Metrics,
        terminal: Terminal,
        unlogged: UnloggedSteps,
        num_skipped_tensors: int,
    ):
        self.metrics, self.terminal, self.unlogged = metrics, terminal, unlogged
        self._run, self._timeline = run, timeline
        self._num_skipped_tensors = num_skipped_tensors
        self._skips_in_a_row = 0
        self._num_images = 0
        self._is_memory_compared = False
        # the last logged values, shown beside the bar
        self._note = ""
        self._began = time.monotonic()

    def start_clock(self) -> None:
        """Start measuring images/s."""
        self._began = time.monotonic()

    @contextmanager
    def clock_paused(self):
        """Exclude the time inside the block from images/s, which counts training only."""
        paused = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - paused

    def epoch_fraction(self, position: Position) -> float:
        """Return the number of epochs trained so far, with decimals, as in the logs."""
        per_epoch = self._timeline.stage_steps_per_epoch[self._timeline.stage_of(position.epoch)]
        return round(position.epoch + position.step_in_epoch / per_epoch, 6)

    def show(self, position: Position, note: str = "") -> None:
        """Update the terminal's progress bar with a note, or with the last logged values."""
        self.terminal.update("training", position.step, self._timeline.num_steps, note or self._note)

    def log_step(self, position: Position, result: StepResult, lr: float, optimizer: UNetOptimizer) -> None:
        """Add a step to the unlogged ones; every log.every_steps, write a line.

        Skipped steps are logged as events and left out of the means. Whether a step was skipped is read from the device
        when a line is due, or after 50 steps. Raises UserError after MAX_SKIPS_IN_A_ROW skipped steps in a row.
        """
        self.unlogged.add(result)
        self._num_images += len(result.losses)
        is_due = position.step % self._run.user_config.log.every_steps == 0 or position.step == self._timeline.num_steps
        if is_due or len(self.unlogged) % MAX_SKIPS_IN_A_ROW == 0:
            self._count_skips(position, is_due, optimizer)
        if is_due:
            self._write_line(position, lr)
        self.show(position)

    def _write_line(self, position: Position, lr: float) -> None:
        now, memory_gib = time.monotonic(), peak_memory_gib(self._run.device)
        images_per_s = self._num_images / (now - self._began)
        self._began, self._num_images = now, 0
        loss, grad_norm = self.unlogged.means()
        self.metrics.write(
            "train",
            position.step,
            epoch=self.epoch_fraction(position),
            stage=position.stage,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            images_per_s=round(images_per_s, 3),
            memory_gib=round(memory_gib, 3),
        )
        if self._run.plan is not None and not self._is_memory_compared:
            self._compare_memory(position)
        losses = "all steps skipped" if loss is None else f"loss {loss:.4f}"
        rate = f"{images_per_s:.1f}" if images_per_s >= 1 else f"{images_per_s:.2g}"
        self._note = f"{losses}  {rate} img/s  {memory_gib:.1f} GiB"
        self.unlogged.clear()

    def _count_skips(self, position: Position, is_due: bool, optimizer: UNetOptimizer) -> None:
        """Count how many of the last steps were skipped in a row; if a line is due, log every skipped step."""
        in_a_row = self._skips_in_a_row
        for number, result in enumerate(self.unlogged.read(), start=position.step - len(self.unlogged) + 1):
            in_a_row = 0 if result.is_applied else in_a_row + 1
            if is_due and not result.is_applied:
                detail = f"step {number}: the gradient was not finite"
                self.metrics.write("event", position.step, event="step skipped", detail=detail)
            if in_a_row >= MAX_SKIPS_IN_A_ROW:
                raise UserError(
                    f"the last {in_a_row} gradients were not finite, so nothing is being learned; "
                    "use model.precision bf16 or fp32, or a lower optimizer.lr"
                )
        if not is_due:
            return
        self._skips_in_a_row = in_a_row
        if optimizer.is_fused and (more := int(optimizer.num_skipped_tensors) - self._num_skipped_tensors) > 0:
            self._num_skipped_tensors += more
            detail = f"skipped {more} updates of single tensors since the last line: their gradients were not finite"
            self.metrics.write("event", position.step, event="tensors skipped", detail=detail)

    def _compare_memory(self, position: Position) -> None:
        """Log the planned and the measured peak memory of training steps, once."""
        device = self._run.device
        detail = compare(
            self._run.plan, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        )
        self.metrics.write("event", position.step, event="memory", detail=detail)
        self.terminal.say(detail)
        self._is_memory_compared = True
