"""The main job, top to bottom: load, then step, log, validate, sample and save until done.

Resuming equals not stopping: every draw is keyed, the position within the epoch is in the checkpoint, and so is the
part of the log's running mean that was not written yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.data.atomic import atomic_write_text
from safelight.data.batches import MicroBatch, iterate, plan_epoch
from safelight.data.cache import Sample
from safelight.kernels.attention import apply_attention, attention_modules, choose_attention, head_dim_of
from safelight.trainer.checkpoint import (
    Position,
    folder_of,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from safelight.trainer.config import Config
from safelight.trainer.dataset import Dataset, open_dataset
from safelight.trainer.diffusion import NoiseSchedule, make_schedule
from safelight.trainer.log import Metrics, Terminal, peak_memory_gib
from safelight.trainer.models import LatentCodec, load_codec, load_unet, pick_device, pick_dtype, resolve_base
from safelight.trainer.optim import UNetOptimizer
from safelight.trainer.run_folder import run_key, write_start
from safelight.trainer.sample import Settings, generate
from safelight.trainer.step import StepResult, train_step
from safelight.trainer.timeline import Timeline
from safelight.trainer.validate import choose_subset, validate

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Job:
    """What the loop works with. window: unlogged losses and gradient norms, see _log."""

    config: Config
    run_dir: Path
    device: torch.device
    dataset: Dataset
    unet: nn.Module
    optimizer: UNetOptimizer
    schedule: NoiseSchedule
    codec: LatentCodec
    timeline: Timeline
    metrics: Metrics
    terminal: Terminal
    subset: list[Sample]
    window: list[StepResult] = field(default_factory=list)
    window_began: float = field(default_factory=time.monotonic)
    images_per_s: float = 0.0


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
) -> Outcome:
    """Train a run from its config and return how it ended.

    resume: go on from the newest checkpoint. stop_requested: asked after every step; True saves and returns.
    Raises ValueError for what the user can mend: settings, dataset, model, run folder.
    """
    terminal = terminal or Terminal()
    run_dir = Path(config.run.dir)
    checkpoints = list_checkpoints(run_dir)
    if checkpoints and not resume:
        raise ValueError(
            f"{run_dir} already holds a run (at step {checkpoints[-1]}); add --resume, or name another --run.dir"
        )
    if resume and not checkpoints:
        raise ValueError(f"{run_dir} holds no checkpoint to resume from; leave --resume out to start")
    job, position = _load(config, run_dir, resume, terminal)
    try:
        return _loop(job, position, stop_requested)
    finally:
        terminal.pause()
        job.metrics.close()
        job.dataset.cache.close()


def _load(config: Config, run_dir: Path, resume: bool, terminal: Terminal) -> tuple[Job, Position]:
    """Return the job and where it begins."""
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.model.precision, device)
    base = resolve_base(config.model.base)
    schedule = make_schedule(base.config_of("scheduler"), config.loss.prediction, config.loss.zero_terminal_snr)
    dataset = open_dataset(config, base, device, terminal.update)
    terminal.pause()
    timeline = Timeline.of(config, dataset.train)
    unet = load_unet(base, config.run.seed, dtype).to(device).train()
    if config.train.checkpointing == "full":
        unet.enable_gradient_checkpointing()
    attention = choose_attention(device, dtype, {head_dim_of(m) for m in attention_modules(unet)})
    apply_attention(unet, attention)
    optimizer = UNetOptimizer(unet, config.optimizer)
    # the autoencoder waits in host memory and visits the GPU to decode samples
    codec = load_codec(config, base, torch.device("cpu"))
    precision = PRECISIONS[dtype]
    position = Position()
    window: list[StepResult] = []
    if resume:
        step = list_checkpoints(run_dir)[-1]
        state, position = load_checkpoint(run_dir, step, unet, lambda stage: run_key(config, dataset, stage, precision))
        window = _unpack_window(state)
        optimizer.load_state_tensors(state)
    run_dir.mkdir(parents=True, exist_ok=True)
    notes = [str(attention), f"optimizer {config.optimizer.name}" + (", fp32 master" if optimizer.has_master else "")]
    write_start(run_dir, config, base, dataset, unet, notes, schedule.prediction_type, precision, device)
    metrics = Metrics(run_dir, position.step if resume else -1, config.log.tensorboard)
    terminal.say(
        f"{len(dataset.train)} photographs to train on, {len(dataset.validation)} held out; {timeline.num_steps} steps in {timeline.num_epochs} epochs"
    )
    terminal.say(str(attention))
    if resume:
        terminal.say(f"resumed at step {position.step}, epoch {position.epoch + 1}")
        metrics.write("event", position.step, event="resumed", detail=f"from {folder_of(run_dir, position.step).name}")
    subset = choose_subset(
        dataset.train, min(config.validate_.max_images, len(dataset.validation) or 1), config.run.seed
    )
    job = Job(
        config, run_dir, device, dataset, unet, optimizer, schedule.to(device), codec, timeline, metrics, terminal, subset, window
    )  # fmt: skip
    return job, position


def _loop(job: Job, position: Position, stop_requested: Callable[[], bool]) -> Outcome:
    """Train from a position to the end, or until asked to stop."""
    config, timeline = job.config, job.timeline
    if position.step == 0:
        position = _validate(job, position)
        _sample(job, position, due=config.sample.every_epochs > 0)
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
        batches = iterate(job.dataset.cache, job.dataset.train, remaining, job.dataset.empty_key)
        for group in _groups(remaining, stage.accumulate):
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
                lr=timeline.learning_rate(position.epoch, position.step_in_epoch),
                weight_decay=stage.weight_decay,
                max_grad_norm=stage.max_grad_norm,
            )
            lr = timeline.learning_rate(position.epoch, position.step_in_epoch)
            position = replace(position, step=position.step + 1, step_in_epoch=position.step_in_epoch + 1, stage=index)
            _log(job, position, result, lr)
            if position.step >= timeline.num_steps or stop_requested():
                break
            if (
                config.save.every_steps
                and position.step % config.save.every_steps == 0
                and not _at_epoch_end(job, position)
            ):
                _save(job, position)
        batches.close()
        if _at_epoch_end(job, position):
            position = _end_epoch(job, position)
        elif position.step >= timeline.num_steps:
            position = _finish(job, position)
        if stop_requested() and position.step < timeline.num_steps:
            _save(job, position)
            return Outcome(job.run_dir, position, interrupted=True)
    return Outcome(job.run_dir, position, interrupted=False)


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
    config = job.config

    def due(every: int) -> bool:
        return every > 0 and position.epoch % every == 0

    before = position.best_step
    if due(config.validate_.every_epochs):
        position = _validate(job, position)
    _sample(job, position, due=due(config.sample.every_epochs))
    if due(config.save.every_epochs) or position.best_step != before:
        _save(job, position)
    return position


def _finish(job: Job, position: Position) -> Position:
    """Validate, sample and save at the end of the run."""
    position = _validate(job, position)
    _sample(job, position, due=job.config.sample.every_epochs > 0)
    _save(job, position)
    return position


def _epoch_fraction(job: Job, position: Position) -> float:
    per_epoch = job.timeline.stage_steps_per_epoch[job.timeline.stage_of(position.epoch)]
    return position.epoch + position.step_in_epoch / per_epoch


def _log(job: Job, position: Position, result: StepResult, lr: float) -> None:
    """Add a step to the running mean; every log.every_steps write it and begin anew."""
    job.window.append(result)
    config, timeline = job.config, job.timeline
    if not result.taken:
        job.metrics.write("event", position.step, event="step skipped", detail="the gradient was not finite")
        job.terminal.say(f"step {position.step}: the gradient was not finite; no weight was changed")
    if position.step % config.log.every_steps == 0 or position.step == timeline.num_steps:
        losses = torch.cat([r.losses for r in job.window])
        seconds, job.window_began = time.monotonic() - job.window_began, time.monotonic()
        job.images_per_s = len(losses) / seconds
        job.metrics.write(
            "train",
            position.step,
            epoch=round(_epoch_fraction(job, position), 6),
            stage=position.stage,
            loss=losses.double().mean().item(),
            lr=lr,
            grad_norm=torch.stack([r.grad_norm for r in job.window]).double().mean().item(),
            images_per_s=round(job.images_per_s, 3),
            memory_gib=round(peak_memory_gib(job.device), 3),
        )
        note = f"loss {losses.mean().item():.4f}  {job.images_per_s:.1f} img/s  {peak_memory_gib(job.device):.1f} GiB"
        job.terminal.update("training", position.step, timeline.num_steps, note)
        job.window.clear()


def _pack_window(window: list[StepResult]) -> dict[str, Tensor]:
    """Return the unlogged steps as tensors for a checkpoint; empty if there are none."""
    if not window:
        return {}
    return {
        "log/losses": torch.cat([r.losses for r in window]).cpu(),
        "log/sizes": torch.tensor([len(r.losses) for r in window]),
        "log/grad_norms": torch.stack([r.grad_norm for r in window]).cpu(),
        "log/taken": torch.tensor([r.taken for r in window]),
    }


def _unpack_window(state: dict[str, Tensor]) -> list[StepResult]:
    """Take the unlogged steps out of a checkpoint's state."""
    if "log/sizes" not in state:
        return []
    losses = state.pop("log/losses").split(state.pop("log/sizes").tolist())
    norms, taken = state.pop("log/grad_norms"), state.pop("log/taken")
    return [StepResult(*row) for row in zip(losses, norms, taken.tolist(), strict=True)]


def _validate(job: Job, position: Position) -> Position:
    """Measure the held-out set and the training subset; return the position with the best so far."""
    settings = job.config.validate_
    if settings.every_epochs == 0 or not job.dataset.validation:
        return position
    held_out = choose_subset(job.dataset.validation, settings.max_images, job.config.run.seed)
    began = time.monotonic()
    for split, samples in (("held_out", held_out), ("train_subset", job.subset)):
        result = validate(
            job.unet,
            job.dataset.cache,
            samples,
            job.dataset.empty_key,
            job.schedule,
            job.dataset.scaling_factor,
            seed=job.config.run.seed,
            num_bands=settings.timesteps,
            batch_size=settings.batch_size,
        )
        job.metrics.write(
            "validation",
            position.step,
            epoch=round(_epoch_fraction(job, position), 6),
            split=split,
            loss=result.loss,
            loss_by_timestep=list(result.loss_by_timestep),
            num_images=result.num_images,
        )
        if split == "held_out" and result.loss < position.best_loss:
            position = replace(position, best_step=position.step, best_loss=result.loss)
            job.metrics.write("event", position.step, event="best so far", detail=f"held-out loss {result.loss:.5f}")
    # the clock of images/s runs over training alone
    job.window_began += time.monotonic() - began
    return position


def _sample(job: Job, position: Position, *, due: bool) -> None:
    """Draw the fixed prompts into samples/step-XXXXXXXX."""
    if not due:
        return
    config = job.config
    prompts = job.dataset.sample_prompts(config)
    if not prompts:
        return
    began = time.monotonic()
    settings = Settings(
        config.sample.width or config.data.resolution,
        config.sample.height or config.data.resolution,
        config.sample.steps,
        config.sample.cfg,
        config.run.seed,
        config.sample.sampler,
    )
    text, negative = job.dataset.texts(prompts), job.dataset.texts([config.sample.negative_prompt])
    with job.codec.on(job.device) as codec:
        images = generate(job.unet, codec, text, negative, job.schedule, settings)
    folder = job.run_dir / "samples" / f"step-{position.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        image.save(folder / f"{index:03d}.png")
        rows.append(
            {
                "file": f"{index:03d}.png",
                "prompt": prompt,
                "seed": settings.seed,
                "cfg": settings.cfg,
                "num_steps": settings.steps,
            }
        )
    index_json = {"step": position.step, "epoch": round(_epoch_fraction(job, position), 6), "images": rows}
    atomic_write_text(folder / "index.json", json.dumps(index_json, indent=1, ensure_ascii=False))
    job.window_began += time.monotonic() - began


def _save(job: Job, position: Position) -> None:
    """Write a checkpoint, then delete those no longer kept."""
    began = time.monotonic()
    job.metrics.sync()
    state = {**job.optimizer.state_tensors(), **_pack_window(job.window)}
    precision = PRECISIONS[next(job.unet.parameters()).dtype]
    save_checkpoint(job.run_dir, job.unet, state, position, run_key(job.config, job.dataset, position.stage, precision))
    prune(job.run_dir, job.config.save.keep, position.best_step)
    job.window_began += time.monotonic() - began
