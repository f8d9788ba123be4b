"""What the training loop works with, and how it is loaded: dataset, model, optimizer, and where a run resumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from safelight.data.cache import Sample
from safelight.data.side_stream import SideStream
from safelight.data.text import counted
from safelight.errors import UserError
from safelight.kernels.triton.jit import has_triton
from safelight.kernels.unet.attention import allowed_backends, attention_cases, choose_attention
from safelight.trainer.checkpoint.files import Position, check_files, folder_of, load_checkpoint, read_identity
from safelight.trainer.checkpoint.identity import Identity, identify
from safelight.trainer.checkpoint.saver import Saver
from safelight.trainer.config.timeline import Timeline
from safelight.trainer.config.toml import Config
from safelight.trainer.dataset import Dataset, open_dataset
from safelight.trainer.memory_plan.candidate import Need
from safelight.trainer.memory_plan.resolve_auto import budget, cap, describe, reason_against, record, settle
from safelight.trainer.models.base import base_of
from safelight.trainer.models.device import PRECISIONS, pick_device, pick_dtype
from safelight.trainer.models.encoders import LatentCodec, load_codec
from safelight.trainer.models.noise_schedule import NoiseSchedule, make_schedule
from safelight.trainer.models.weights import check_unet, load_unet
from safelight.trainer.optim.ema import WeightAverages, take_averages
from safelight.trainer.optim.optimizer import UNetOptimizer, memory_mode
from safelight.trainer.run_log.environment import EPOCH_ORDER, MEMORY_PLAN, recorded, recorded_attention
from safelight.trainer.run_log.metrics import Metrics, reset_peak_memory
from safelight.trainer.run_log.step_window import StepLog, take_state
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.run_start import write_start
from safelight.trainer.step.cuda_graphs import GraphRecording, recording_for
from safelight.trainer.step.prepare_unet import equip
from safelight.trainer.step.validate import choose_subset


@dataclass
class Job:
    """What the loop works with.

    ema: None where the run keeps no moving average. planned: of the GPU's memory, None on a CPU. window: unlogged steps, see progress.py; num_timed: images since
    window_began; note: the last logged values, for the terminal. transport: of batches to a GPU. recording: of steps
    as CUDA graphs; is_grouped: whether an epoch meets the batches of a bucket one after another.
    """

    config: Config
    run_dir: Path
    device: torch.device
    dataset: Dataset
    unet: nn.Module
    optimizer: UNetOptimizer
    ema: WeightAverages | None
    schedule: NoiseSchedule
    codec: LatentCodec
    timeline: Timeline
    metrics: Metrics
    terminal: Terminal
    subset: list[Sample]
    identity: Identity
    stop_requested: Callable[[], bool]
    saver: Saver
    transport: SideStream | None
    recording: GraphRecording
    is_grouped: bool
    window: StepLog
    planned: Need | None = None
    is_memory_compared: bool = False
    window_began: float = field(default_factory=time.monotonic)
    num_timed: int = 0
    num_skipped: int = 0
    num_skipped_tensors: int = 0
    note: str = ""


def load_job(
    config: Config, run_dir: Path, step: int | None, terminal: Terminal, stop_requested: Callable[[], bool]
) -> tuple[Job, Position]:
    """Return the job and where it begins: at a checkpoint's step, or at 0 for None."""
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.model.precision, device)
    memory_mode(config.optimizer, dtype)
    base = base_of(config.model)
    # on a GPU: what `auto` comes to, and whether the run fits at all
    previous, was_fused = None, None
    if step is not None:
        previous, was_fused = recorded(run_dir, MEMORY_PLAN), read_identity(run_dir, step)[0].is_fused
    settled, need = settle(config, device, previous, was_fused)
    cap(device, config.memory.limit_gib)
    no_graphs = reason_against(settled, device, need, budget(config, device))
    schedule = make_schedule(base.config_of("scheduler"), config.loss.prediction, config.loss.zero_terminal_snr)
    # what will be refused is refused before hours of encoding
    check_unet(base)
    allowed_backends(device, dtype, config.model.attention)
    if device.type == "cuda":
        has_triton()
    if step is not None:
        _refuse_other_run(run_dir, step, identify(settled, PRECISIONS[dtype]))
        check_files(folder_of(run_dir, step))
    dataset = open_dataset(config, base, device, terminal.update)
    terminal.pause()
    if dataset.num_damaged:
        terminal.say(f"{counted(dataset.num_damaged, 'damaged row')} of the cache made again")
    if dataset.num_cut:
        captions = counted(dataset.num_cut, "caption")
        terminal.say(f"{captions} cut at the end: longer than the text encoder reads")
    identity = identify(settled, PRECISIONS[dtype], dataset.train)
    timeline = Timeline.of(config, dataset.train)
    schedule = schedule.to(device)
    unet = load_unet(base, config.run.seed).train()
    side = config.data.resolution // dataset.latent_factor
    attention = choose_attention(
        device,
        dtype,
        attention_cases(unet, (side, side)),
        setting=config.model.attention,
        batch=config.train.batch_size,
        previous=None if step is None else recorded_attention(run_dir),
    )
    equipped = equip(unet, settled, attention, device, dtype)
    # what encoding, the probe and loading took is not training's peak
    reset_peak_memory(device)
    optimizer, ema = equipped.optimizer, equipped.ema
    # the autoencoder waits in host memory and visits the GPU to decode samples
    codec = load_codec(config, base, torch.device("cpu"))
    position, window_state, already_skipped = Position(), None, 0
    if step is not None:
        if read_identity(run_dir, step)[0].data != identity.data:
            raise UserError(
                f"{folder_of(run_dir, step)} was trained on other photographs, captions or crops than {config.data.path} "
                "has now; start a new run with --run.dir"
            )
        state, position = load_checkpoint(run_dir, step, unet)
        window_state = take_state(state)
        take_averages(state, ema)
        optimizer.load_state_tensors(state)
        already_skipped = int(optimizer.num_skipped_tensors) if optimizer.is_fused else 0
    # the order of a run's batches is what it began with, wherever it goes on
    before = None if step is None else recorded(run_dir, EPOCH_ORDER)
    is_grouped = before.get("grouped", False) if before else not no_graphs and step is None
    run_dir.mkdir(parents=True, exist_ok=True)
    notes = [str(attention), str(optimizer)]
    if need is not None:
        notes.append(describe(need))
        terminal.say(notes[-1])
    notes.append(f"no CUDA graphs: {no_graphs}" if no_graphs else "steps are replayed as CUDA graphs")
    if device.type == "cuda":
        terminal.say(notes[-1])
    notes.append("kernels off" if equipped.patched is None else str(equipped.patched))
    if ema is not None:
        notes.append(f"moving average of the weights, decay {ema.decay:g}, in validation, samples and export")
    write_start(
        run_dir,
        config,
        base,
        dataset,
        unet,
        notes,
        schedule.prediction_type,
        PRECISIONS[dtype],
        device,
        attention,
        {EPOCH_ORDER: {"grouped": is_grouped}, **({} if need is None else {MEMORY_PLAN: record(need)})},
    )
    metrics = Metrics(run_dir, -1 if step is None else step, config.log.tensorboard)
    if metrics.num_unreadable:
        terminal.say(f"{counted(metrics.num_unreadable, 'unreadable line')} of {metrics.path} left out")
    terminal.say(
        f"{counted(len(dataset.train), 'photograph')} to train on, {len(dataset.validation)} held out; "
        f"{counted(timeline.num_steps, 'step')} in {counted(timeline.num_epochs, 'epoch')}"
    )
    terminal.say(str(attention))
    if step is not None:
        terminal.say(f"resumed at step {position.step}, epoch {position.epoch + 1}")
        metrics.write("event", position.step, event="resumed", detail=f"from {folder_of(run_dir, step).name}")
    most = min(config.validate_.max_images, len(dataset.validation) or 1)
    subset = choose_subset(dataset.train, most, config.run.seed)
    most_samples = max(stage.batch_size * stage.accumulate for stage in timeline.stages)
    saver = Saver(run_dir, identity, config.save.keep, metrics.sync, terminal.say, device, -1 if step is None else step)
    job = Job(
        config,
        run_dir,
        device,
        dataset,
        unet,
        optimizer,
        ema,
        schedule,
        codec,
        timeline,
        metrics,
        terminal,
        subset,
        identity,
        stop_requested,
        saver,
        SideStream(device) if device.type == "cuda" else None,
        recording_for(unet, optimizer, schedule, dataset.scaling_factor, config.loss, device, not no_graphs),
        is_grouped,
        StepLog(most_samples, device, window_state),
        need,
        num_skipped_tensors=already_skipped,
    )
    return job, position


def _refuse_other_run(run_dir: Path, step: int, identity: Identity) -> None:
    """Raise ValueError, naming the first difference, if a checkpoint was trained by other settings."""
    reached, stage = read_identity(run_dir, step)
    difference = identity.difference(reached, stage)
    if difference:
        raise UserError(
            f"checkpoint {folder_of(run_dir, step)} belongs to other settings: {difference}; "
            f"resume with {run_dir / 'config.toml'}, or start a new run with --run.dir"
        )
