"""The training run, top to bottom: load; then step, log, save, validate and sample until done.

A resumed run equals one that never stopped: every random draw is keyed, and a checkpoint holds the position within the
epoch and the steps that were not logged yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch

from safelight.data.batches import iterate, load_batch
from safelight.data.epochs import Group, MicroBatch, Span, left_over, plan_epoch
from safelight.data.lock import FolderLock
from safelight.errors import EXIT_INTERRUPTED, Diverged, OutOfMemory, UserError
from safelight.text import size
from safelight.trainer.between_steps.changes import begin_from_best, enter_stage, stop_text_encoder
from safelight.trainer.between_steps.evaluate import check_weights, evaluate, is_due
from safelight.trainer.between_steps.live_samples import answer_live
from safelight.trainer.between_steps.samples import record_prompts
from safelight.trainer.checkpoint.files import Position, list_checkpoints, resume_command, rewrite_position
from safelight.trainer.config.schema import Config, ResolvedStage, changed_settings
from safelight.trainer.distributed import started
from safelight.trainer.distributed.shared_folder import check_shared
from safelight.trainer.distributed.spread import num_micro_steps, spread
from safelight.trainer.distributed.world import World, leave_world
from safelight.trainer.inference.live_request import LiveInbox
from safelight.trainer.loading.disk_space import DISK_IS_FULL, free_bytes
from safelight.trainer.loading.job import Job, load_job
from safelight.trainer.loading.processes import join
from safelight.trainer.loading.run_start import check_place
from safelight.trainer.memory_plan.communication import idle_note
from safelight.trainer.memory_plan.gpus import this_card
from safelight.trainer.memory_plan.resolve_auto import out_of_memory
from safelight.trainer.optim.base import RateOverflow
from safelight.trainer.run_log.divergence import NotFinite, explain
from safelight.trainer.run_log.metrics import reset_peak_memory
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.step.cuda_graphs import StepGraphs
from safelight.trainer.step.step import Inputs, StepSettings, train_step, upload
from safelight.trainer.step.step_share import StepShare, whole_result
from safelight.trainer.step.torch_flags import torch_flags
from safelight.untrusted import check_kinds

# what commands write into a run folder
FOLDERS = ("checkpoints", "compare", "data_examples", "images", "live", "logs", "samples", "tensorboard", "wandb")
FILES = (
    *("config.toml", "data.json", "environment.json", "libraries.log", "metrics.jsonl", "model.json", "report.html"),
    *("prompts.json", "scores.json", "split.json", "wandb.json"),
)


@dataclass(frozen=True)
class RunResult:
    """How a run ended: the position it reached, and whether it was interrupted.

    was_finished: a run was to be resumed that had no step left; nothing was done.
    """

    run_dir: Path
    position: Position
    interrupted: bool
    was_finished: bool = False


def train(
    config: Config,
    *,
    resume: bool = False,
    terminal: Terminal | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    guard: AbstractContextManager = nullcontext(),  # noqa: B008  nullcontext holds no state
    world: World | None = None,
) -> RunResult:
    """Train a run from its config and return how it ended.

    resume: continue from the newest checkpoint, or from step 0 if there is none yet. stop_requested: called after every
    step, validation forward pass and denoising step; once it returns True, the run saves a checkpoint and returns.
    guard: a context manager entered around the training loop only, since before it there is nothing to save.
    world: that the caller has joined, to do more in it afterwards; by default it is joined and left here.
    Raises UserError for what the user can fix: settings, dataset, model, a run folder that is damaged or in use.
    Raises Diverged if the loss is no longer finite; the last sound checkpoint is kept.
    """
    terminal = terminal or Terminal()
    is_own = world is None
    world = world or join("train", config, terminal)
    if world.restarts:
        terminal.say(f"restart {world.restarts} of {started.max_restarts()}: going on from the newest checkpoint")
    with _locked(Path(config.run.dir), terminal) if world.is_main else nullcontext():
        check_shared(world, Path(config.run.dir))
        result = _train(config, world, resume or world.restarts > 0, terminal, stop_requested, guard)
    if is_own:
        leave_world(world, EXIT_INTERRUPTED if result.interrupted else 0)
    return result


@contextmanager
def _locked(run_dir: Path, terminal: Terminal) -> Iterator[None]:
    """Hold the run folder's lock inside the block."""
    advice = "name another --run.dir"
    with FolderLock(run_dir, advice, f"wait until it ends, or {advice}") as lock:
        if lock.note:
            terminal.say(lock.note)
        yield


def _train(
    config: Config,
    world: World,
    resume: bool,
    terminal: Terminal,
    stop_requested: Callable[[], bool],
    guard: AbstractContextManager,
) -> RunResult:
    """Train a run in one of its processes; see `train`."""
    run_dir = Path(config.run.dir)
    config, raised = spread(config, world.size)
    shares = sorted({stage.accumulate for stage in config.stages()})
    for note in filter(None, (raised, *(idle_note(accumulate, world.size) for accumulate in shares))):
        terminal.say(f"note: {note}")
    resume_step = world.from_main(_resume_step(config, resume, terminal) if world.is_main else None)
    with torch_flags(deterministic=config.run.deterministic, cudnn_benchmark=config.train.cudnn_benchmark):
        job, position = load_job(config, world, run_dir, resume_step, terminal, stop_requested)
        if job is None:
            return RunResult(run_dir, position, interrupted=False, was_finished=True)
        try:
            with guard, job.saver:
                result = _loop(job, position)
            if result.interrupted:
                detail = f"on request at step {result.position.step}"
                job.progress.metrics.write("event", result.position.step, event="stopped", detail=detail)
            return result
        except NotFinite as failure:
            raise _diverged(job, failure) from None
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            raise UserError(_disk_full(job, error)) from error
        finally:
            terminal.pause()
            job.progress.metrics.close()
            job.dataset.cache.close()


def _resume_step(config: Config, resume: bool, terminal: Terminal) -> int | None:
    """Return the step of the checkpoint to resume from, None to begin at step 0. Checks the run folder first."""
    run_dir = Path(config.run.dir)
    check_place(run_dir, Path(config.data.path))
    check_kinds(run_dir, FOLDERS, FILES, "the run")
    for folder in (run_dir / "checkpoints", run_dir / "samples"):
        check_kinds(folder, [path.name for path in folder.glob("step-*")], (), "the run")
    for pattern in ("samples/step-*/*.png", "samples/step-*/index.json", "data_examples/*.jpg"):
        check_kinds(Path(), (), run_dir.glob(pattern), "the run")
    checkpoints = list_checkpoints(run_dir)
    if checkpoints and not resume:
        raise UserError(
            f"{run_dir} already holds a run (at step {checkpoints[-1]}); add --resume, or name another --run.dir"
        )
    if resume and not checkpoints:
        terminal.say(f"{run_dir} holds no checkpoint yet: starting at step 0")
    return checkpoints[-1] if checkpoints else None


def _disk_full(job: Job, error: OSError) -> str:
    """Return the message for a run that cannot write: the file, what it needs, and the command that goes on."""
    run, checkpoints = job.run, list_checkpoints(job.run.run_dir)
    needed = size(run.static.checkpoint)
    since = f"from step {checkpoints[-1]}, the newest checkpoint," if checkpoints else "from step 0"
    return (
        f"{error.filename or run.run_dir}: {error.strerror}; a checkpoint takes {needed}, and its disk has "
        f"{size(free_bytes(run.run_dir))} free; free some space, and go on {since} with: "
        f"{resume_command(run.run_dir, [], '')}"
    )


def _diverged(job: Job, failure: NotFinite) -> Diverged:
    """Return the error for a run that has diverged, after logging it. Called once the saver has finished."""
    run, metrics = job.run, job.progress.metrics
    stage = job.timeline.stage_of_step(failure.step)
    message = explain(failure, run.run_dir, run.user_config, run.precision, stage, metrics.held_out, job.saver.ruined)
    metrics.write("event", failure.step, event="diverged", detail=message)
    return Diverged(message)


def _loop(job: Job, position: Position) -> RunResult:
    """Train from a position to the end of the run, or until a stop is requested."""
    inbox = LiveInbox(job.run.run_dir)
    record_prompts(job, position)
    if job.world.is_main:
        inbox.clear()
    if position.step == 0 or position.unmeasured:
        planned_steps = job.timeline.num_steps
        position = _evaluate(job, position)
        if job.timeline.num_steps <= position.step < planned_steps:
            # it was stopped while it measured what lets its patience end it; that end is logged once
            _rewrite_position(job, replace(position, unmeasured=True))
            position = _finish(job, position)
        if position.unmeasured:
            return RunResult(job.run.run_dir, position, interrupted=True)
        if position.step > 0:
            _rewrite_position(job, position)
    if position.step < job.timeline.num_steps:
        job.progress.show(position, "first step")
        job.saver.reserve(job.models.trained, job.models.live_state())
    if job.run.plan is not None:
        # the plan predicts the peak of training steps: validation and samples must not count
        reset_peak_memory(job.run.device)
    job.progress.start_clock()
    # patience may end the run before its planned steps
    while position.step < job.timeline.num_steps:
        position = _train_epoch(job, position, inbox)
        if _is_epoch_end(job, position):
            position = _end_epoch(job, position)
        elif position.step >= job.timeline.num_steps:
            position = _finish(job, position)
        if job.stop_requested() and position.step < job.timeline.num_steps:
            _save(job, position)
            return RunResult(job.run.run_dir, position, interrupted=True)
    return RunResult(job.run.run_dir, position, interrupted=position.unmeasured)


def _rewrite_position(job: Job, position: Position) -> None:
    if job.world.is_main:
        rewrite_position(job.run.run_dir, position)


def _train_epoch(job: Job, position: Position, inbox: LiveInbox) -> Position:
    """Train the rest of an epoch; return the position at its end, or where the run ends or is stopped before that."""
    timeline, stage_index = job.timeline, job.timeline.stage_of(position.epoch)
    stage = timeline.stages[stage_index]
    config = stage.config
    enter_stage(job, stage_index)
    if position.epoch == timeline.first_epoch(stage_index) and position.step_in_epoch == 0:
        _log_stage(job, position, stage_index)
        position = replace(position, began_from=-1)
        if stage.start_from == "best":
            position = begin_from_best(job, position)
        position = replace(position, stage=stage_index, stage_best_step=-1, stage_best_loss=None)
    context = job.models.context
    plan = plan_epoch(
        job.dataset.train,
        seed=config.run.seed,
        epoch=position.epoch,
        batch_size=stage.batch_size,
        caption_dropout=config.data.caption_dropout,
        grouped=job.is_grouped,
        carried=_carried(job, position.epoch),
    )
    remaining = plan[position.step_in_epoch * stage.accumulate :]
    if not remaining:
        # everything is carried over to the next epoch
        return replace(position, stage=stage_index)
    steps = list(split_steps(remaining, stage.accumulate))
    shares = [StepShare.of(job.world, step) for step in steps]
    own = [micro_batch for share in shares for micro_batch in share.micro_batches]
    batches = iterate(job.dataset.rows(job.dataset.train), own, transport=job.transport)
    graphs = prepare_graphs(job, stage, own, position)
    for micro_batches, share in zip(steps, shares, strict=True):
        lr = timeline.learning_rate(position.epoch, position.step_in_epoch)
        text_lr = None
        if context.text_optimizer is not None:
            text_lr = timeline.text_learning_rate(config.text_encoder, position.epoch, position.step_in_epoch)
        settings = _step_settings(stage, lr, text_lr)
        try:
            result = train_step(
                context,
                share.padded(islice(batches, len(share.micro_batches))),
                settings,
                seed=config.run.seed,
                epoch=position.epoch,
                # padding has a weight that captured steps do not read
                graphs=None if share.is_uneven else graphs,
            )
            result = whole_result(job.world, share, result)
        except torch.OutOfMemoryError:
            # the step may already have changed some of the weights, so nothing is saved
            raise OutOfMemory(out_of_memory_message(job, micro_batches, position)) from None
        except RateOverflow as error:
            # the weights are those of the step before; one that the estimate has ruined is told by its loss
            raise NotFinite(position.step + 1, str(error), position.step) from None
        if job.models.ema is not None:
            job.models.ema.update(result.is_applied)
        position = replace(
            position, step=position.step + 1, step_in_epoch=position.step_in_epoch + 1, stage=stage_index
        )
        text_optimizer = None if context.texts is None else context.texts.optimizer
        photos = _photos_of(job, micro_batches)
        job.progress.log_step(position, result, settings, context.optimizer, photos, text_optimizer)
        job.saver.check()
        # which is also the vote on whether to stop
        answer_live(job, inbox, position)
        if position.step >= timeline.num_steps or job.stop_requested():
            break
        if is_due(config.save.every_steps, position.step) and not _is_epoch_end(job, position):
            _save(job, position)
    batches.close()
    return position


def _step_settings(stage: ResolvedStage, lr: float, text_lr: float | None) -> StepSettings:
    return StepSettings(stage.batch_size * stage.accumulate, lr, stage.weight_decay, stage.max_grad_norm, text_lr)


def _log_rest(job: Job, position: Position) -> None:
    """Log the steps since the last line at the end of a run that patience ended, where no line was due."""
    timeline, context = job.timeline, job.models.context
    if not len(job.progress.unlogged):
        return
    epoch, step_in_epoch = timeline.place_of(position.step)
    stage = timeline.stages[timeline.stage_of(epoch)]
    text_lr, text_optimizer = None, None if context.texts is None else context.texts.optimizer
    if text_optimizer is not None:
        text_lr = timeline.text_learning_rate(stage.config.text_encoder, epoch, step_in_epoch)
    settings = _step_settings(stage, timeline.learning_rate(epoch, step_in_epoch), text_lr)
    last = replace(position, epoch=epoch, step_in_epoch=step_in_epoch + 1)
    job.progress.log_rest(last, settings, context.optimizer, text_optimizer)


def _carried(job: Job, epoch: int) -> dict[Group, int] | None:
    """Return how many photographs each group has waiting when an epoch begins, None if none are carried over."""
    config = job.run.user_config
    if not config.data.carries:
        return None
    spans = [Span(stage.epochs, stage.batch_size) for stage in job.timeline.stages]
    return left_over(job.dataset.train, spans, seed=config.run.seed, epoch=epoch)


def _log_stage(job: Job, position: Position, stage_index: int) -> None:
    """Log that a stage begins."""
    stages = job.timeline.stages
    stage = stages[stage_index]
    detail = f"{stage_index + 1} of {len(stages)}: {stage.epochs} epochs, lr {stage.lr:g} {stage.schedule}"
    if changes := changed_settings(job.run.user_config, stage.config):
        detail += f"; otherwise than the run: {', '.join(changes)}"
    # under the number of the next step: a resume from the checkpoint before it removes this line and writes it again
    job.progress.metrics.write("event", position.step + 1, event="stage began", detail=detail)


def prepare_graphs(job: Job, stage: ResolvedStage, plan: list[MicroBatch], position: Position) -> StepGraphs | None:
    """Capture graphs for the batch shapes of an epoch and return them; without graphs, warm up the largest shape."""

    def example() -> Inputs:
        batch = load_batch(job.dataset.rows(job.dataset.train), plan[0])
        return upload(batch, job.run.device, job.run.user_config.run.seed, position.epoch)

    num_samples = stage.batch_size * stage.accumulate
    num_micro = num_micro_steps(stage.accumulate, job.world.size)
    try:
        graphs, message = job.capture.begin(plan, job.dataset.latent_factor, num_micro, num_samples, example)
    except torch.OutOfMemoryError:
        raise OutOfMemory(out_of_memory_message(job, plan, position)) from None
    if message:
        job.progress.terminal.say(message)
    return graphs


def out_of_memory_message(job: Job, micro_batches: list[MicroBatch], position: Position) -> str:
    """Return the message for a run whose next step, over one of these micro-batches, does not fit the GPU."""
    largest = max(micro_batches, key=lambda micro: (micro.bucket.width * micro.bucket.height, len(micro.refs)))
    card = this_card(job.run.device) if job.run.device.type == "cuda" else None
    job.saver.wait_and_report()
    return out_of_memory(
        job.run.user_config,
        card,
        job.run.plan,
        largest.bucket,
        len(largest.refs),
        position.step + 1,
        job.saver.saved_step,
    )


def split_steps(plan: list[MicroBatch], accumulate: int) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of each optimizer step."""
    for start in range(0, len(plan), accumulate):
        yield plan[start : start + accumulate]


def _photos_of(job: Job, micro_batches: list[MicroBatch]) -> tuple[str, ...]:
    """Return the photographs of a step, in the order of its losses."""
    return tuple(job.dataset.train[ref.sample_index].photo.file for micro in micro_batches for ref in micro.refs)


def _is_epoch_end(job: Job, position: Position) -> bool:
    return position.step_in_epoch == job.timeline.steps_of(position.epoch)


def _end_epoch(job: Job, position: Position) -> Position:
    """Validate, sample and save if due after an epoch; return the position at the start of the next one."""
    position = replace(position, epoch=position.epoch + 1, step_in_epoch=0)
    # before anything is measured: a run that resumes here measures the same
    stop_text_encoder(job, position)
    if position.step >= job.timeline.num_steps:
        return _finish(job, position)
    # as in the stage that ends here
    save, best = job.timeline.stages[position.stage].config.save, (position.best_step, position.stage_best_step)
    position = _evaluate(job, position)
    if position.step >= job.timeline.num_steps:
        # its patience has ended the run
        return _finish(job, position)
    save_is_due = is_due(save.every_epochs, position.epoch) or is_due(save.every_steps, position.step)
    if save_is_due or (position.best_step, position.stage_best_step) != best:
        _save(job, position)
    return position


def _finish(job: Job, position: Position) -> Position:
    """Log the last steps, validate, sample and save at the end of the run."""
    _log_rest(job, position)
    position = _evaluate(job, position)
    _save(job, position)
    return position


def _evaluate(job: Job, position: Position) -> Position:
    """Validate and sample if due. If that fails, save the trained weights before raising what it raised.

    Raises OutOfMemory if the GPU runs out of it.
    """
    try:
        return evaluate(job, position)
    except torch.OutOfMemoryError:
        where = "before the first step"
        if position.step > 0:
            _save(job, replace(position, unmeasured=True))
            where = f"after step {position.step}, whose weights are saved"
        raise OutOfMemory(
            f"the GPU ran out of memory in validation or sampling {where}; resume with a smaller validate.batch_size, "
            "or with sample.every_epochs 0 and run `safelight sample` later"
        ) from None
    except NotFinite:
        raise
    except Exception:
        # what was learnt since the last checkpoint does not depend on why it cannot be looked at
        if position.step > 0:
            _save(job, replace(position, unmeasured=True))
        raise


def _save(job: Job, position: Position) -> None:
    """Start saving a checkpoint unless this step already has one; a thread writes it while training continues.

    Raises NotFinite, and saves nothing, if the weights are broken.
    """
    if job.saver.requested_step == position.step:
        return
    with job.progress.clock_paused():
        is_ruined = check_weights(job, position)
        state = job.models.whole_state(job.world) if job.is_sharded else job.models.live_state().items()
        state = chain(state, job.progress.unlogged.state().items())
        job.saver.save(job.models.trained, state, position, is_ruined)
