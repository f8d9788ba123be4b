"""Writes a run's training lines to the log and the terminal: mean loss, skipped steps, images/s, peak memory."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

from safelight.trainer.checkpoint.files import Position
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.loading.resolve import ResolvedRun
from safelight.trainer.memory_plan.resolve_auto import compare
from safelight.trainer.optim.optimizer import UNetOptimizer
from safelight.trainer.run_log.divergence import Streak, named
from safelight.trainer.run_log.metrics import Metrics, peak_memory_gib
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.run_log.unlogged_steps import UnloggedSteps
from safelight.trainer.step.step import StepResult, StepSettings

# without a line due, steps are read after this many
STEPS_BETWEEN_READS = 50


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
        self._streak = Streak()
        # photographs of the unlogged steps that this process took
        self._photos: list[tuple[str, ...]] = []
        # photographs by what became of their losses: finite at least once; not finite; the same, and a later step was
        # applied; reported as damaged
        self._finite: set[str] = set()
        self._lost: set[str] = set()
        self._suspected: set[str] = set()
        self._blamed: set[str] = set()
        self._num_images = 0
        self._is_memory_compared = False
        # the last logged values, shown beside the bar
        self._note = ""
        self._began = time.monotonic()

    def follow(self, timeline: Timeline) -> None:
        """Go by another timeline from now on: a stage has ended early."""
        self._timeline = timeline

    def count_skips_from(self, num_skipped_tensors: int) -> None:
        """Count tensor updates that are skipped inside backward from this number on."""
        self._num_skipped_tensors = num_skipped_tensors

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
        # an epoch whose photographs are all carried over has no step
        per_epoch = max(1, self._timeline.steps_of(position.epoch))
        return round(position.epoch + position.step_in_epoch / per_epoch, 6)

    def show(self, position: Position, note: str = "") -> None:
        """Update the terminal's progress bar with a note, or with the last logged values."""
        self.terminal.update("training", position.step, self._timeline.num_steps, note or self._note)

    def log_step(
        self,
        position: Position,
        result: StepResult,
        settings: StepSettings,
        optimizer: UNetOptimizer,
        photos: tuple[str, ...],
        text_optimizer: UNetOptimizer | None = None,
    ) -> None:
        """Add a step to the unlogged ones; every log.every_steps, write a line. photos: one name per loss.

        text_optimizer: the text encoders', if they are trained.

        Skipped steps are logged as events and left out of the means. Whether a step was skipped is read from the device
        when a line is due, or after 50 steps. Raises NotFinite if too many in a row had no finite loss or gradients.
        """
        self.unlogged.add(result)
        self._photos.append(photos)
        self._num_images += len(result.losses)
        is_due = position.step % self._run.user_config.log.every_steps == 0 or position.step == self._timeline.num_steps
        if is_due or len(self.unlogged) % STEPS_BETWEEN_READS == 0:
            self._check_steps(position, is_due, optimizer)
        if is_due:
            self._write_line(position, settings, optimizer, text_optimizer)
        self.show(position)

    def log_rest(
        self,
        position: Position,
        settings: StepSettings,
        optimizer: UNetOptimizer,
        text_optimizer: UNetOptimizer | None = None,
    ) -> None:
        """Write a line about the unlogged steps, if there are any: the run has ended before a line was due.

        position: after the last step. settings: of that step.
        """
        if len(self.unlogged):
            self._check_steps(position, True, optimizer)
            self._write_line(position, settings, optimizer, text_optimizer)

    def _write_line(
        self,
        position: Position,
        settings: StepSettings,
        optimizer: UNetOptimizer,
        text_optimizer: UNetOptimizer | None,
    ) -> None:
        now, memory_gib = time.monotonic(), peak_memory_gib(self._run.device)
        images_per_s = self._num_images / (now - self._began)
        self._began, self._num_images = now, 0
        loss, grad_norm = self.unlogged.means()
        estimates = {"effective_lr": optimizer.effective_lr}
        estimates["text_effective_lr"] = None if text_optimizer is None else text_optimizer.effective_lr
        self.metrics.write(
            "train",
            position.step,
            epoch=self.epoch_fraction(position),
            stage=position.stage,
            loss=loss,
            lr=settings.lr,
            **({} if settings.text_lr is None else {"text_lr": settings.text_lr}),
            **{name: rate for name, rate in estimates.items() if rate is not None},
            grad_norm=grad_norm,
            images_per_s=round(images_per_s, 3),
            memory_gib=round(memory_gib, 3),
        )
        if self._run.plan is not None and not self._is_memory_compared:
            self._compare_memory(position)
        losses = "all steps skipped" if loss is None else f"loss {loss:.4f}"
        rate = f"{images_per_s:.1f}" if images_per_s >= 1 else f"{images_per_s:.2g}"
        effective = "" if optimizer.effective_lr is None else f"  lr {optimizer.effective_lr:.2g}"
        self._note = f"{losses}{effective}  {rate} img/s  {memory_gib:.1f} GiB"
        self.unlogged.clear()

    def _check_steps(self, position: Position, is_due: bool, optimizer: UNetOptimizer) -> None:
        """Check that the unlogged steps had finite losses and gradients; if a line is due, log every skipped step."""
        streak, steps = self._streak, self.unlogged.read()
        # a checkpoint's unlogged steps come first and have no names
        names = [()] * (len(steps) - len(self._photos)) + self._photos
        for number, (result, photos) in enumerate(zip(steps, names, strict=True), start=position.step - len(steps) + 1):
            streak = streak.after(result, photos)
            if is_due and result.is_applied:
                self._finite.update(photos)
                self._suspected |= self._lost
            elif is_due:
                self._log_skip(position, number, result, photos)
            streak.check(number, is_fp16=self._run.precision == "fp16")
        if not is_due:
            return
        self._streak, self._photos = streak, []
        if optimizer.is_fused and (more := int(optimizer.num_skipped_tensors) - self._num_skipped_tensors) > 0:
            self._num_skipped_tensors += more
            detail = f"skipped {more} updates of single tensors since the last line: their gradients were not finite"
            self.metrics.write("event", position.step, event="tensors skipped", detail=detail)

    def _log_skip(self, position: Position, number: int, result: StepResult, photos: tuple[str, ...]) -> None:
        """Log a skipped step, and say so if not all of its losses were finite.

        A photograph is blamed only if it fails again after other steps were fine, and never had a finite loss: weights
        that begin to break fail on some photographs before they fail on all.
        """
        is_finite = result.losses.isfinite().tolist()
        bad = [photo for photo, finite in zip(photos, is_finite, strict=False) if not finite]
        detail = f"step {number}: the gradient was not finite"
        if not all(is_finite):
            detail = f"step {number}: the loss{f' of {named(bad)}' if bad else ''} was not finite"
        self.metrics.write("event", position.step, event="step skipped", detail=detail)
        self._finite.update(photo for photo, finite in zip(photos, is_finite, strict=False) if finite)
        if not any(is_finite):
            return
        damaged = sorted(self._suspected.intersection(bad) - self._finite - self._blamed)
        if damaged:
            self._blamed.update(damaged)
            again = f"step {number}: the loss of {named(damaged)} was again not finite, while other steps are fine"
            self.terminal.say(f"{again}; its picture or its cached rows are damaged")
        elif not self._lost.issuperset(bad):
            self.terminal.say(f"step {number}: the loss was not finite, so the step was skipped")
        self._lost.update(bad)

    def _compare_memory(self, position: Position) -> None:
        """Log the planned and the measured peak memory of training steps, once."""
        device = self._run.device
        detail = compare(
            self._run.plan, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        )
        self.metrics.write("event", position.step, event="memory", detail=detail)
        self.terminal.say(detail)
        self._is_memory_compared = True
