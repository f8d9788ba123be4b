"""`safelight train RUN.TOML --find-lr`: a learning rate range test on the run's own base, data, optimizer and batches.

The rate rises exponentially from LOWEST while the model is trained, with the noise and the order that the run would
have. After each rate the loss is measured on the same few photographs at the same noise and timesteps, held-out ones if
there are any: the training loss of a few samples scatters by more than a rate changes it. Every rate trains on equally
many samples, whatever the batch size. The test ends where the loss has doubled.

It works in a folder of its own, RUN/find_lr, which holds nothing but the result once it ends; nothing else of the run
is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch

from safelight.data.atomic import atomic_write_text, remove
from safelight.data.batches import Batch, iterate
from safelight.data.epochs import MicroBatch, plan_epoch
from safelight.data.lock import FolderLock
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.config.schema import Config, ResolvedStage
from safelight.trainer.distributed.together import Stopped
from safelight.trainer.distributed.world import World
from safelight.trainer.loading.job import Job, load_job
from safelight.trainer.loading.run_start import check_place
from safelight.trainer.metrics.rate_range import propose
from safelight.trainer.models.placing import once_each
from safelight.trainer.optim.ema import OwnAverages
from safelight.trainer.rate_plot import rate_plot
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.report.rate_test_record import MAX_LOSS, ProposedRate, RateTest
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.step.cuda_graphs import StepGraphs
from safelight.trainer.step.step import StepSettings, train_step
from safelight.trainer.step.torch_flags import torch_flags
from safelight.trainer.step.validate import choose_subset, validate
from safelight.trainer.train import out_of_memory_message, prepare_graphs, split_steps
from safelight.untrusted import check_kinds

FOLDER, RESULT, PLOT, WORK = "find_lr", "result.json", "plot.svg", "work"
LOWEST, HIGHEST, PER_DECADE = 1e-7, 1.0, 4
# samples that each rate trains on, at least
SAMPLES_PER_RATE = 8
# what is measured after each rate
NUM_PROBES, NUM_BANDS = 8, 4
# the test ends where the loss is this many times the first one, or the lowest
DIVERGED = 2.0


def find_lr(
    config: Config,
    *,
    terminal: Terminal | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    guard: AbstractContextManager = nullcontext(),  # noqa: B008  nullcontext holds no state
) -> RateTest:
    """Return the range test of a run's config, and write it to RUN/find_lr: result.json and plot.svg.

    stop_requested: called after every step and forward pass of a measurement. guard: entered around the test itself.
    Raises UserError for what the user can fix, and for an optimizer that has no rate to find; Stopped if a stop is
    requested, after removing everything.
    """
    spec = OPTIMIZERS[config.optimizer.name]
    if spec.estimates_rate:
        raise UserError(
            f"{spec.name} estimates its learning rate while it trains, so there is none to find; train with "
            f"optimizer.lr {spec.default_lr:g}"
        )
    terminal, run_dir = terminal or Terminal(), Path(config.run.dir)
    folder = run_dir / FOLDER
    check_place(run_dir, Path(config.data.path))
    with FolderLock(folder, "name another --run.dir", "wait until it ends, or name another --run.dir") as lock:
        if lock.note:
            terminal.say(lock.note)
        check_kinds(folder, (WORK,), (RESULT, PLOT), "the test")
        # what a killed test left
        remove(folder / WORK)
        try:
            with torch_flags(deterministic=config.run.deterministic, cudnn_benchmark=config.train.cudnn_benchmark):
                test = _test(config, folder / WORK, terminal, stop_requested, guard)
        finally:
            terminal.pause()
            remove(folder / WORK)
        atomic_write_text(folder / RESULT, test.to_json())
        atomic_write_text(folder / PLOT, rate_plot(test))
    return test


def _test(
    config: Config,
    work: Path,
    terminal: Terminal,
    stop_requested: Callable[[], bool],
    guard: AbstractContextManager,
) -> RateTest:
    """Return the range test; work: a folder for the files that a run writes when it starts."""
    own = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(work)})})
    job, _ = load_job(own, World(), work, None, terminal, stop_requested)
    assert job is not None
    try:
        with guard:
            return _rise(job, config)
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU ran out of memory while the loss was measured; use a smaller validate.batch_size"
        ) from None
    finally:
        job.progress.metrics.close()
        job.dataset.cache.close()


def _rise(job: Job, config: Config) -> RateTest:
    """Train at rising rates until the loss has doubled, or the highest is reached."""
    stage, terminal = job.timeline.stages[0], job.progress.terminal
    per_step = stage.batch_size * stage.accumulate
    steps_per_rate = -(-SAMPLES_PER_RATE // per_step)
    num_rates = round(PER_DECADE * math.log10(HIGHEST / LOWEST)) + 1
    all_rates = [LOWEST * 10 ** (number / PER_DECADE) for number in range(num_rates)]
    terminal.say(
        f"looking for a learning rate: up to {counted(num_rates, 'rate')} from {LOWEST:g} to {HIGHEST:g}, "
        f"{counted(steps_per_rate, 'step')} each"
    )
    first_loss = _measured(job)
    best = first_loss
    losses: list[float] = []
    training: list[float] = []
    steps = _steps(job, stage)
    with closing(steps):
        for number, lr in enumerate(all_rates):
            settings = StepSettings(per_step, lr, stage.weight_decay, stage.max_grad_norm, _text_lr(config, stage, lr))
            training.append(_trained(job, steps, settings, steps_per_rate))
            losses.append(_measured(job) if math.isfinite(training[-1]) else math.nan)
            terminal.update("rates", number + 1, num_rates, f"lr {lr:.1e}  loss {losses[-1]:.4f}")
            best = min(best, losses[-1]) if math.isfinite(losses[-1]) else best
            if not losses[-1] <= DIVERGED * best:
                break
    rates = all_rates[: len(losses)]
    proposal = propose(rates, losses, first_loss)
    return RateTest(
        optimizer=config.optimizer.name,
        batch_size=stage.batch_size,
        accumulate=stage.accumulate,
        steps_per_rate=steps_per_rate,
        measured_on=_probes(job)[1],
        first_loss=_or_none(first_loss),
        rates=tuple(rates),
        losses=tuple(map(_or_none, losses)),
        training=tuple(map(_or_none, training)),
        proposal=ProposedRate(**asdict(proposal)),
        options=_options(config, proposal.rate),
    )


def _or_none(loss: float) -> float | None:
    """Return a loss as a record has it: None if it is not finite, or larger than one can be."""
    return loss if math.isfinite(loss) and loss <= MAX_LOSS else None


class Step(NamedTuple):
    """What one optimizer step trains on. batches: the loaded micro_batches."""

    batches: Iterator[Batch]
    micro_batches: list[MicroBatch]
    graphs: StepGraphs | None
    epoch: int


def _steps(job: Job, stage: ResolvedStage) -> Iterator[Step]:
    """Yield the steps of the run's first stage, for as many epochs as needed."""
    config = job.run.user_config
    for epoch in count():
        plan = plan_epoch(
            job.dataset.train,
            seed=config.run.seed,
            epoch=epoch,
            batch_size=stage.batch_size,
            caption_dropout=config.data.caption_dropout,
            grouped=job.is_grouped,
        )
        graphs = prepare_graphs(job, stage, plan, Position(epoch=epoch))
        with closing(iterate(job.dataset.rows(job.dataset.train), plan, transport=job.transport)) as batches:
            for micro_batches in split_steps(plan, stage.accumulate):
                yield Step(islice(batches, len(micro_batches)), micro_batches, graphs, epoch)


def _trained(job: Job, steps: Iterator[Step], settings: StepSettings, num_steps: int) -> float:
    """Take steps at one rate and return their mean loss. Raises Stopped if a stop is requested."""
    losses, seed = [], job.run.user_config.run.seed
    for _ in range(num_steps):
        batches, micro_batches, graphs, epoch = next(steps)
        try:
            result = train_step(job.models.context, batches, settings, seed=seed, epoch=epoch, graphs=graphs)
        except torch.OutOfMemoryError:
            raise UserError(out_of_memory_message(job, micro_batches, Position(epoch=epoch))) from None
        losses.append(result.losses.clone())
        if job.stop_requested():
            raise Stopped
    return float(torch.cat(losses).double().mean())


def _probes(job: Job) -> tuple[list, str]:
    """Return the samples whose loss is measured, and what they are."""
    held_out, seed = job.dataset.validation, job.run.user_config.run.seed
    samples = choose_subset(held_out or once_each(job.dataset.train), NUM_PROBES, seed)
    kind = "held-out" if held_out else "training"
    return samples, f"{counted(len(samples), f'{kind} photograph')} at {NUM_BANDS} timesteps each"


def _measured(job: Job) -> float:
    """Return the loss of the probes with the weights as they are, NaN if it is not finite."""
    context, ema, config = job.models.context, job.models.ema, job.run.user_config

    def stop_if_requested(done: int, total: int) -> None:
        if job.stop_requested():
            raise Stopped

    # a moving average would lag behind the rates
    with ema.applied() if isinstance(ema, OwnAverages) else nullcontext():
        result = validate(
            context.unet,
            job.dataset.rows(_probes(job)[0]),
            context.schedule,
            context.scaling_factor,
            seed=config.run.seed,
            num_bands=NUM_BANDS,
            batch_size=config.validate_.batch_size,
            progress=stop_if_requested,
            texts=context.texts,
        )
    return math.nan if result.not_finite else result.loss


def _text_lr(config: Config, stage: ResolvedStage, lr: float) -> float | None:
    """Return the text encoder's rate beside the UNet's, in the proportion that the settings have."""
    return lr * config.text_encoder.lr / stage.lr if config.text_encoder.train else None


def _options(config: Config, rate: float | None) -> str:
    """Return options of `safelight train` that set the proposed rate where the settings have it."""
    if rate is None:
        return ""
    is_staged = bool(config.stage) and config.stage[0].lr is not None
    options = f"--{'stage.0' if is_staged else 'optimizer'}.lr {rate:.1e}"
    text_lr = _text_lr(config, config.stages()[0], rate)
    return options if text_lr is None else f"{options} --text-encoder.lr {text_lr:.1e}"
