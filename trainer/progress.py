"""What a run's steps leave in the log and on the terminal: running means, skipped steps, speed, and once the peak memory."""

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
from safelight.trainer.run_log.step_window import StepLog
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.step.step import StepResult

# fp16's loss scale needs up to 24 halvings to find its place; more skipped steps in a row than this lead nowhere
MAX_SKIPS_IN_A_ROW = 50


class Progress:
    """Counts steps between log lines and writes the lines.

    window: the steps since the last line. num_skipped_tensors: how many tensors were skipped inside backward before this start.
    """

    def __init__(
        self,
        run: ResolvedRun,
        timeline: Timeline,
        metrics: Metrics,
        terminal: Terminal,
        window: StepLog,
        num_skipped_tensors: int,
    ):
        self.metrics, self.terminal, self.window = metrics, terminal, window
        self._run, self._timeline = run, timeline
        self._num_skipped_tensors = num_skipped_tensors
        self._skips_in_a_row = 0
        self._num_images = 0
        self._is_memory_compared = False
        # the last logged values, shown beside the bar
        self._note = ""
        self._began = time.monotonic()

    def start_clock(self) -> None:
        """Begin to measure images/s."""
        self._began = time.monotonic()

    @contextmanager
    def clock_paused(self):
        """Leave the time of the block out of images/s: it is the rate of training only."""
        paused = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - paused

    def epoch_fraction(self, position: Position) -> float:
        """Return the epochs trained so far, as the logs give them."""
        per_epoch = self._timeline.stage_steps_per_epoch[self._timeline.stage_of(position.epoch)]
        return round(position.epoch + position.step_in_epoch / per_epoch, 6)

    def show(self, position: Position, note: str = "") -> None:
        """Show the position on the terminal's bar, with a note or the last logged values."""
        self.terminal.update("training", position.step, self._timeline.num_steps, note or self._note)

    def log_step(self, position: Position, result: StepResult, lr: float, optimizer: UNetOptimizer) -> None:
        """Add a step to the running means; every log.every_steps write a line and begin again.

        Skipped steps are logged by themselves and left out of the means. Raises UserError when every step has been skipped for
        long. Whether a step was skipped is known to the device only, and read when a line is due or after 50 steps.
        """
        self.window.add(result)
        self._num_images += len(result.losses)
        is_due = position.step % self._run.given.log.every_steps == 0 or position.step == self._timeline.num_steps
        if is_due or len(self.window) % MAX_SKIPS_IN_A_ROW == 0:
            self._count_skips(position, is_due, optimizer)
        if is_due:
            self._write_line(position, lr)
        self.show(position)

    def _write_line(self, position: Position, lr: float) -> None:
        now, memory_gib = time.monotonic(), peak_memory_gib(self._run.device)
        images_per_s = self._num_images / (now - self._began)
        self._began, self._num_images = now, 0
        loss, grad_norm = self.window.means()
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
        self.window.clear()

    def _count_skips(self, position: Position, is_due: bool, optimizer: UNetOptimizer) -> None:
        """Count the skipped steps at the window's end; where a line is due, write an event for each of the window's."""
        in_a_row = self._skips_in_a_row
        for number, result in enumerate(self.window.read(), start=position.step - len(self.window) + 1):
            in_a_row = 0 if result.taken else in_a_row + 1
            if is_due and not result.taken:
                detail = f"step {number}: the gradient was not finite"
                self.metrics.write("event", position.step, event="step skipped", detail=detail)
            if in_a_row >= MAX_SKIPS_IN_A_ROW:
                raise UserError(
                    f"the last {in_a_row} gradients were not finite, nothing is being learnt; "
                    "use model.precision bf16 or fp32, or a lower optimizer.lr"
                )
        if not is_due:
            return
        self._skips_in_a_row = in_a_row
        if optimizer.is_fused and (more := int(optimizer.num_skipped_tensors) - self._num_skipped_tensors) > 0:
            self._num_skipped_tensors += more
            detail = f"{more} tensors' gradients were not finite since the last line: they alone were not stepped"
            self.metrics.write("event", position.step, event="tensors skipped", detail=detail)

    def _compare_memory(self, position: Position) -> None:
        """Write the planned peak of a training step beside the measured one, once."""
        device = self._run.device
        detail = compare(
            self._run.plan, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        )
        self.metrics.write("event", position.step, event="memory", detail=detail)
        self.terminal.say(detail)
        self._is_memory_compared = True
