"""`safelight train`: trains or resumes a run, compares base and trained, and writes the report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safelight import bug_report, library_log
from safelight.errors import EXIT_INTERRUPTED, Diverged, UserError
from safelight.output.show import command_to_train, print_line, say_loading
from safelight.several import launched
from safelight.text import counted

if TYPE_CHECKING:
    from safelight.trainer.distributed.world import World


def train(argv: list[str], description: str) -> int:
    """Run `safelight train` and return its exit status."""
    from safelight.options.parsing import parse_with_config, settings_given

    arguments, config = parse_with_config(argv, "train", description)
    bug_report.belongs_to(Path(config.run.dir))
    from safelight.trainer.distributed import outputs, started

    if arguments.find_lr and (arguments.gpus is not None or started.world_size() > 1):
        raise UserError("--find-lr measures in one process: leave out --gpus, or torchrun")
    if (status := launched("train", argv, arguments.gpus, config, arguments.max_restarts)) is not None:
        return status
    is_main = started.is_main_process()
    if not is_main:
        outputs.hold_back()
    say_loading()
    if arguments.find_lr:
        return _find_lr(arguments, config)
    from safelight.trainer.between_steps.stop import Stop
    from safelight.trainer.checkpoint.files import resume_command
    from safelight.trainer.distributed.world import leave_world
    from safelight.trainer.loading.notes import kept_by_stages
    from safelight.trainer.loading.processes import join
    from safelight.trainer.memory_plan.static_bytes import planned_timeline
    from safelight.trainer.report.build import build_report
    from safelight.trainer.run_log.terminal import Terminal
    from safelight.trainer.train import train as run_training

    stop, run_dir = Stop(), Path(config.run.dir)
    log = (run_dir,) if is_main else (run_dir / outputs.FOLDER, outputs.log_name())

    @contextmanager
    def guard() -> Iterator[None]:
        # entered once the run is loaded, so that a command that fails before leaves the run folder untouched
        with library_log.written_to(*log), stop:
            yield

    with Terminal() as terminal:
        for note in kept_by_stages(config, settings_given(argv)) if is_main else ():
            terminal.say(f"note: {note}")
        world = join("train", config, terminal)
        try:
            result = run_training(
                config, resume=arguments.resume, terminal=terminal, stop_requested=stop, guard=guard(), world=world
            )
        except Diverged:
            if is_main:
                terminal.say(f"report: {build_report(run_dir)}")
            raise
        is_through = not result.interrupted and not result.was_finished
        was_stopped = is_through and _compare_after_training(result.run_dir, result.position.step, world, log)
        status = EXIT_INTERRUPTED if result.interrupted or was_stopped else 0
        leave_world(world, status)
    if not is_main:
        return status
    if result.interrupted:
        if result.position.step == 0:
            terminal.say("stopped before the first step: nothing to save; the cache is kept")
            return EXIT_INTERRUPTED
        # the config in the run folder includes the settings given on the command line
        terminal.say(f"saved at step {result.position.step}; continue with: {resume_command(result.run_dir, [], '')}")
        return EXIT_INTERRUPTED
    position = result.position
    if result.was_finished:
        options = planned_timeline(config, position.ended).how_to_extend(position.step, bool(config.stage))
        command = resume_command(result.run_dir, [], "", options)
        terminal.say(
            f"{result.run_dir} is finished, at step {position.step}, and is left as it is; to train longer, for "
            f"example: {command}"
        )
        return 0
    best = (
        ""
        if position.best_loss is None
        else f", best held-out loss {position.best_loss:.4f} at step {position.best_step}"
    )
    print_line(f"trained {counted(position.step, 'step')}; report: {build_report(result.run_dir)}{best}")
    print_line(f"next: safelight compare {shlex.quote(str(result.run_dir))} --num 100")
    return EXIT_INTERRUPTED if was_stopped else 0


def _find_lr(arguments, config) -> int:
    """Propose a learning rate and return the exit status."""
    from safelight.trainer.between_steps.stop import Stop
    from safelight.trainer.distributed.together import Stopped
    from safelight.trainer.find_lr import FOLDER, PLOT, find_lr
    from safelight.trainer.report.rate_test_record import SURENESS
    from safelight.trainer.run_log.terminal import Terminal

    if arguments.resume:
        raise UserError("--find-lr tests the base, before a run: leave out --resume")
    stop = Stop("this step")
    with Terminal() as terminal:
        try:
            test = find_lr(config, terminal=terminal, stop_requested=stop, guard=stop)
        except Stopped:
            terminal.say("stopped: nothing was written")
            return EXIT_INTERRUPTED
    proposal, plot = test.proposal, Path(config.run.dir) / FOLDER / PLOT
    print_line(f"{test.measured_on}: {proposal.reason}")
    if proposal.rate is None:
        print_line(f"no rate is proposed; the curve: {plot}")
        return 0
    print_line(
        f"proposed learning rate: {proposal.rate:.1e} ({SURENESS[proposal.sureness]}); from {proposal.low:.1e} to "
        f"{proposal.high:.1e} hardly matters; the curve: {plot}"
    )
    print_line(f"next: {command_to_train(arguments.config)} {test.options}")
    return 0


def _compare_after_training(run_dir: Path, last_step: int, world: World, log: tuple) -> bool:
    """Draw base beside trained at the end of a run, if it is set to; return whether the user stopped it.

    world: whose processes draw together. log: where this one's libraries write.
    """
    from safelight.trainer.between_steps.stop import Stop
    from safelight.trainer.distributed.together import Stopped
    from safelight.trainer.inference.after_training import compare_after_training
    from safelight.trainer.run_log.terminal import Terminal

    stop, began = Stop("this denoising step"), time.monotonic()
    with Terminal() as terminal, library_log.written_to(*log), stop:

        def report(done: int, total: int) -> None:
            terminal.update("comparing base and trained", done, total)
            if stop.requested:
                raise Stopped

        try:
            comparison = compare_after_training(run_dir, last_step, report, terminal.say, world)
        except Stopped:
            command = f"safelight compare {shlex.quote(str(run_dir))}"
            terminal.say(f"stopped comparing; the run is trained and saved, and this draws the rest: {command}")
            return True
        if comparison is not None:
            rows, models = counted(len(comparison.rows), "prompt"), counted(len(comparison.models), "model")
            terminal.say(f"compared {models} on {rows} in {time.monotonic() - began:.0f} s")
    return False
