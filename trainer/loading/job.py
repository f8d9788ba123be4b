"""Loads a run: its dataset, its models, and the checkpoint it resumes from.

`load_job` reads top to bottom; each part is one function below it. resolve.py resolves and checks the settings first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safelight.data.cache import Sample
from safelight.data.side_stream import SideStream
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.checkpoint.changed_settings import with_changes
from safelight.trainer.checkpoint.files import (
    Position,
    read_identity,
    read_position,
)
from safelight.trainer.checkpoint.identity import as_begun
from safelight.trainer.checkpoint.saver import Saver
from safelight.trainer.config.schema import Config
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.distributed.world import World
from safelight.trainer.inference.prompt_file import largest_size
from safelight.trainer.loading.announce import announce
from safelight.trainer.loading.dataset import Dataset, open_dataset
from safelight.trainer.loading.disk_space import space_note
from safelight.trainer.loading.models import Models, build_models, load_encoder
from safelight.trainer.loading.notes import memory_note, notes_of, prediction_note
from safelight.trainer.loading.processes import check_same_everywhere
from safelight.trainer.loading.progress import Progress
from safelight.trainer.loading.resolve import ResolvedRun, check_early, resolve_run
from safelight.trainer.loading.restore import check_same_data, checked_position, restore, with_stage_best
from safelight.trainer.models.base import base_of
from safelight.trainer.models.device import pick_device
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.latent_codec import auto_vae_precision
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.run_log.unlogged_steps import UnloggedSteps
from safelight.trainer.step.cuda_graphs import GraphCapture, graph_capture
from safelight.trainer.step.host_allocator import keep_freed_memory
from safelight.trainer.step.validate import choose_subset


@dataclass
class Job:
    """Everything the training loop needs.

    capture: captures an epoch's CUDA graphs. transport: copies batches to the GPU ahead of time; None on a CPU.
    train_subset: training samples that are validated too, for comparison with the held-out ones. stop_here: returns
    whether the user asked this process to stop. planned_size: (width, height) in px of the largest samples that were
    planned for. said_of_prompts: the last error in the prompt file that was printed, so that it is printed once.
    """

    run: ResolvedRun
    world: World
    dataset: Dataset
    timeline: Timeline
    models: Models
    capture: GraphCapture
    transport: SideStream | None
    is_grouped: bool
    progress: Progress
    saver: Saver
    train_subset: list[Sample]
    stop_here: Callable[[], bool]
    planned_size: tuple[int, int]
    said_of_prompts: str = ""
    _is_stopping: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether processes divide weights or state among themselves (distributed.shard)."""
        return self.saver.is_shared

    def vote(self, has_requests: bool) -> bool:
        """Return whether the main process has requests for pictures; every process calls it after a step.

        It also lets all of them stop after this step if one was asked to. has_requests: counts in the main process.
        """
        if self.world.size > 1:
            self._is_stopping, has_requests = self.world.any_of(self.stop_here(), has_requests)
        return has_requests

    def stop_all(self) -> None:
        """Stop: between two votes, all processes have learnt that one of them was asked to."""
        self._is_stopping = True

    def stop_requested(self) -> bool:
        """Return whether the run is to stop: the same in all processes between two votes."""
        return self._is_stopping if self.world.size > 1 else self.stop_here()


def load_job(
    config: Config,
    world: World,
    run_dir: Path,
    resume_step: int | None,
    terminal: Terminal,
    stop_requested: Callable[[], bool],
) -> tuple[Job | None, Position]:
    """Return the job and the position to start at: the checkpoint's at `resume_step`, or step 0 if that is None.

    The job is None if the run has no step left; nothing in its folder was changed then.
    """
    if resume_step is not None:
        identity, position = read_identity(run_dir, resume_step)[0], read_position(run_dir, resume_step)
        auto_vae = auto_vae_precision(pick_device(config.run.device), base_of(config.model))
        given, config = config, as_begun(config, identity, auto_vae)
        if given.data.upscale != config.data.upscale:
            terminal.say(f"data.upscale stays {config.data.upscale}, as when the run began")
        if given.model.vae_precision != config.model.vae_precision:
            terminal.say(f"model.vae_precision stays {config.model.vae_precision}, as when the run began")
        config, cuts = with_changes(config, identity, position, run_dir)
        if cuts:
            terminal.say(f"from here on {'; '.join(cuts)}; resume with {run_dir / 'config.toml'} from now on")
    if config.distributed.shard != "none" and world.size == 1:
        terminal.say(f"note: distributed.shard {config.distributed.shard} divides nothing: the run has one process")
    run = resolve_run(config, run_dir, resume_step, world)
    if run.device.type == "cpu":
        keep_freed_memory()
    base_note = check_early(run)
    device_type = run.device.type
    for note in (
        base_note,
        prediction_note(config, run.base),
        *notes_of(config, device_type),
        memory_note(config, device_type, run.plan),
        space_note(config, run.static.checkpoint),
    ):
        if note:
            terminal.say(f"note: {note}")
    encoder = load_encoder(run)
    dataset = _load_dataset(run, encoder, terminal, world)
    check_same_everywhere(world, run, dataset)
    ended = () if resume_step is None else read_position(run_dir, resume_step).ended
    timeline, identity = _timeline(run, dataset, ended), run.identity(dataset.train)
    if resume_step is not None:
        position = checked_position(run, timeline)
        if position.step >= timeline.num_steps and not position.unmeasured:
            terminal.pause()
            dataset.cache.close()
            return None, position
        position = with_stage_best(run, timeline, position)
    models = build_models(run, dataset, encoder, world)
    start = restore(run, models)
    if num := models.context.optimizer.num_requantized:
        terminal.say(
            f"note: the 8-bit moments of {counted(num, 'weight')} that distributed.shard full cuts inside a block of "
            "256 were requantized; all others are those of the checkpoint, bit for bit"
        )
    if resume_step is not None:
        start = replace(start, position=position)
    metrics = announce(run, dataset, timeline, models, start, terminal, world)
    saved_step = -1 if resume_step is None else resume_step
    max_samples = max(stage.batch_size * stage.accumulate for stage in timeline.stages)
    # a run that patience ended has logged the last steps of its checkpoint
    steps = start.unlogged if metrics.logged_step < start.position.step else None
    unlogged = UnloggedSteps(max_samples, run.device, steps)
    job = Job(
        run=run,
        world=world,
        dataset=dataset,
        timeline=timeline,
        models=models,
        capture=graph_capture(models.context, with_graphs=not run.no_graphs),
        transport=SideStream(run.device) if run.device.type == "cuda" else None,
        is_grouped=start.is_grouped,
        progress=Progress(run, timeline, metrics, terminal, unlogged, start.num_skipped_tensors),
        saver=Saver(
            run_dir,
            identity,
            config.save.keep,
            metrics.sync,
            terminal.say,
            run.device,
            saved_step,
            world=world,
            is_shared=config.distributed.shard != "none" and world.size > 1,
        ),
        train_subset=train_subset_of(config, dataset),
        stop_here=stop_requested,
        planned_size=largest_size(run.user_config),
    )
    return job, start.position


def _timeline(run: ResolvedRun, dataset: Dataset, ended: tuple[tuple[int, int], ...]) -> Timeline:
    """Return the run's timeline.

    Raises UserError if the checkpoint has ended a stage that the settings lack, and for start_from best or a patience
    while no photograph is held out.
    """
    config, num_stages = run.user_config, len(run.user_config.stages())
    if ended and ended[-1][0] >= num_stages:
        raise UserError(
            f"{run.checkpoint} has ended stage {ended[-1][0] + 1}, but the settings have only "
            f"{counted(num_stages, 'stage')}; resume with {run.run_dir / 'config.toml'}"
        )
    stages = config.stages()
    if not dataset.validation and any(s.start_from == "best" or s.config.validate_.patience for s in stages):
        raise UserError(
            "start_from 'best' and validate.patience need held-out loss, but no photograph is held out; raise "
            "data.validation_fraction, or set start_from to 'last' and validate.patience to 0"
        )
    return Timeline.of(config, dataset.train, ended)


def _load_dataset(run: ResolvedRun, encoder: CaptionEncoder | None, terminal: Terminal, world: World) -> Dataset:
    """Return the dataset, after encoding whatever its cache lacks. Raises UserError if it is not the checkpoint's."""
    check = None if run.resume_step is None else partial(check_same_data, run)
    reads_tokens = encoder is not None and run.config.reads_captions_in_step_at(_epoch_of(run))
    dataset = open_dataset(run.user_config, run.base, run.device, terminal.update, check, encoder, reads_tokens, world)
    terminal.pause()
    if dataset.num_damaged:
        terminal.say(f"{counted(dataset.num_damaged, 'damaged row')} in the cache re-encoded")
    for note in dataset.cut_notes:
        terminal.say(note)
    return dataset


def _epoch_of(run: ResolvedRun) -> int:
    """Return the epoch in which the run goes on."""
    return 0 if run.resume_step is None else read_position(run.run_dir, run.resume_step).epoch


def train_subset_of(config: Config, dataset: Dataset) -> list[Sample]:
    """Return training samples to validate on, as many as are held out."""
    num = min(config.validate_.max_images, len(dataset.validation) or 1)
    return choose_subset(dataset.trained_photos, num, config.run.seed)
