"""Loading a run: its data, its models, the checkpoint it resumes from, and what the user is told before it starts.

`load_job` reads top to bottom; each part is one function below it. What is resolved and refused before that is in resolve.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safelight.data.cache import Sample
from safelight.data.side_stream import SideStream
from safelight.data.text import counted
from safelight.errors import UserError
from safelight.kernels.unet.attention import AttentionChoice, attention_cases, choose_attention
from safelight.kernels.unet.patch import Patch
from safelight.trainer.checkpoint.files import Position, load_checkpoint, read_identity
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.checkpoint.saver import Saver
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.config.toml import Config
from safelight.trainer.dataset import Dataset, open_dataset
from safelight.trainer.memory_plan.resolve_auto import describe
from safelight.trainer.models.encoders import LatentCodec, load_codec
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.ema import WeightAverages, take_averages
from safelight.trainer.progress import Progress
from safelight.trainer.resolve import ResolvedRun, refuse_early, resolve_run
from safelight.trainer.run_log.environment import EPOCH_ORDER, MEMORY_PLAN, recorded, recorded_attention
from safelight.trainer.run_log.metrics import Metrics, reset_peak_memory
from safelight.trainer.run_log.step_window import StepLog, take_state
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.run_start import write_start
from safelight.trainer.step.cuda_graphs import GraphCapture, graph_capture
from safelight.trainer.step.prepare_unet import equip
from safelight.trainer.step.step import StepContext
from safelight.trainer.step.validate import choose_subset


@dataclass
class Models:
    """What is trained, and with what. ema: None without a moving average. patched: None without our kernels.

    codec: the autoencoder that decodes samples; it stays in host memory and moves to the GPU to work.
    """

    context: StepContext
    ema: WeightAverages | None
    codec: LatentCodec
    attention: AttentionChoice
    patched: Patch | None

    def live_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds beside the weights and the log: the tensors themselves, not copies."""
        return {**self.context.optimizer.live_state(), **({} if self.ema is None else self.ema.live_state())}


@dataclass(frozen=True)
class Start:
    """Where a run starts. window: the steps that a checkpoint had not logged yet.

    is_grouped: whether an epoch trains the batches of a bucket one after another; a run keeps the order it began with.
    """

    position: Position
    window: dict[str, Tensor] | None
    num_skipped_tensors: int
    is_grouped: bool


@dataclass
class Job:
    """What the training loop works with.

    capture: prepares an epoch's CUDA graphs. transport: copies batches to the GPU ahead of their step, None on a CPU.
    train_subset: training samples that are validated beside the held-out ones. stop_requested: whether the user wants an end.
    """

    run: ResolvedRun
    dataset: Dataset
    timeline: Timeline
    models: Models
    capture: GraphCapture
    transport: SideStream | None
    is_grouped: bool
    progress: Progress
    saver: Saver
    train_subset: list[Sample]
    stop_requested: Callable[[], bool]


def load_job(
    config: Config, run_dir: Path, resume_step: int | None, terminal: Terminal, stop_requested: Callable[[], bool]
) -> tuple[Job, Position]:
    """Return the job and the position it starts at: that of the checkpoint to resume from, or the beginning for None."""
    run = resolve_run(config, run_dir, resume_step)
    refuse_early(run)
    dataset = _load_dataset(run, terminal)
    timeline, identity = Timeline.of(config, dataset.train), run.identity(dataset.train)
    models = _build_models(run, dataset)
    start = _restore(run, models, identity)
    metrics = _announce(run, dataset, timeline, models, start, terminal)
    saved_step = -1 if resume_step is None else resume_step
    max_samples = max(stage.batch_size * stage.accumulate for stage in timeline.stages)
    num_validated = min(config.validate_.max_images, len(dataset.validation) or 1)
    job = Job(
        run,
        dataset,
        timeline,
        models,
        graph_capture(models.context, with_graphs=not run.no_graphs),
        SideStream(run.device) if run.device.type == "cuda" else None,
        start.is_grouped,
        Progress(
            run, timeline, metrics, terminal, StepLog(max_samples, run.device, start.window), start.num_skipped_tensors
        ),
        Saver(run_dir, identity, config.save.keep, metrics.sync, terminal.say, run.device, saved_step),
        choose_subset(dataset.train, num_validated, config.run.seed),
        stop_requested,
    )
    return job, start.position


def _load_dataset(run: ResolvedRun, terminal: Terminal) -> Dataset:
    """Return the dataset with its cache filled."""
    dataset = open_dataset(run.given, run.base, run.device, terminal.update)
    terminal.pause()
    if dataset.num_damaged:
        terminal.say(f"{counted(dataset.num_damaged, 'damaged row')} in the cache re-encoded")
    if dataset.num_cut:
        captions = counted(dataset.num_cut, "caption")
        terminal.say(f"{captions} cut at the end: longer than the text encoder reads")
    return dataset


def _build_models(run: ResolvedRun, dataset: Dataset) -> Models:
    """Return the UNet on its device, ready to train, with its optimizer; and the autoencoder."""
    unet = load_unet(run.base, run.given.run.seed).train()
    side = run.given.data.resolution // dataset.latent_factor
    attention = choose_attention(
        run.device,
        run.dtype,
        attention_cases(unet, (side, side)),
        setting=run.given.model.attention,
        batch=run.given.train.batch_size,
        previous=None if run.resume_step is None else recorded_attention(run.run_dir),
    )
    equipped = equip(unet, run.config, attention, run.device, run.dtype)
    # the peak of encoding, probing and loading is not training's
    reset_peak_memory(run.device)
    schedule = run.schedule.to(run.device)
    context = StepContext(unet, equipped.optimizer, schedule, dataset.scaling_factor, run.given.loss)
    codec = load_codec(run.given, run.base, torch.device("cpu"))
    return Models(context, equipped.ema, codec, attention, equipped.patched)


def _restore(run: ResolvedRun, models: Models, identity: Identity) -> Start:
    """Load the checkpoint that the run resumes from, if any, and return where it starts.

    Raises UserError if the checkpoint was trained on other rows than the dataset has now.
    """
    if run.resume_step is None:
        return Start(Position(), None, 0, is_grouped=not run.no_graphs)
    if read_identity(run.run_dir, run.resume_step)[0].data != identity.data:
        raise UserError(
            f"{run.checkpoint} was trained on other photographs, captions or crops than {run.given.data.path} "
            "has now; start a new run with --run.dir"
        )
    optimizer = models.context.optimizer
    state, position = load_checkpoint(run.run_dir, run.resume_step, models.context.unet)
    window = take_state(state)
    take_averages(state, models.ema)
    optimizer.load_state_tensors(state)
    num_skipped_tensors = int(optimizer.num_skipped_tensors) if optimizer.is_fused else 0
    order = recorded(run.run_dir, EPOCH_ORDER) or {}
    return Start(position, window, num_skipped_tensors, is_grouped=order.get("grouped", False))


def _announce(
    run: ResolvedRun, dataset: Dataset, timeline: Timeline, models: Models, start: Start, terminal: Terminal
) -> Metrics:
    """Tell the user what starts, write the files that describe the run, and return its open metrics log."""
    plan = [] if run.plan is None else [describe(run.plan)]
    graphs = f"no CUDA graphs: {run.no_graphs}" if run.no_graphs else "steps are replayed as CUDA graphs"
    for line in (*plan, graphs) if run.device.type == "cuda" else ():
        terminal.say(line)
    kernels = "kernels off" if models.patched is None else str(models.patched)
    notes = [str(models.attention), str(models.context.optimizer), *plan, graphs, kernels]
    if models.ema is not None:
        notes.append(f"moving average of the weights, decay {models.ema.decay:g}, in validation, samples and export")
    records = {EPOCH_ORDER: {"grouped": start.is_grouped}}
    if run.plan is not None:
        records[MEMORY_PLAN] = run.plan.to_json()
    run.run_dir.mkdir(parents=True, exist_ok=True)
    write_start(run, dataset, models.context.unet, models.attention, notes, records)
    metrics = Metrics(run.run_dir, -1 if run.resume_step is None else run.resume_step, run.given.log.tensorboard)
    if metrics.num_unreadable:
        terminal.say(f"{counted(metrics.num_unreadable, 'unreadable line')} of {metrics.path} left out")
    terminal.say(
        f"{counted(len(dataset.train), 'photograph')} to train on, {len(dataset.validation)} held out; "
        f"{counted(timeline.num_steps, 'step')} in {counted(timeline.num_epochs, 'epoch')}"
    )
    terminal.say(str(models.attention))
    if run.resume_step is not None:
        position = start.position
        terminal.say(f"resumed at step {position.step}, epoch {position.epoch + 1}")
        metrics.write("event", position.step, event="resumed", detail=f"from {run.checkpoint.name}")
    return metrics
