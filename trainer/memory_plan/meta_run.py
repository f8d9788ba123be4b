"""A run's UNet and optimizer on meta tensors, set up as training does, and the real training step on them, followed.

The traces that a plan is made from, on meta tensors: each made when it is asked for, and kept.

Of steps of two batch sizes the events are recorded; those of other sizes follow from them (trainer/memory_plan/allocation_trace.py). One image is
always replayed: a trace of it would differ by some KiB of vectors that are not copied where a batch has one row.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.kernels.triton.jit import references_on_meta
from safelight.kernels.unet.activation_offload import offload_of
from safelight.kernels.unet.attention import NUM_TEXT_TOKENS, attention_cases, choose_attention
from safelight.kernels.unet.checkpointing import apply_checkpointing
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.allocation_trace import (
    AVERAGE,
    GRADIENTS,
    MASTER,
    OPTIMIZER,
    TEMPORARY,
    WEIGHTS,
    AllocationTrace,
    Peak,
    Work,
    work_between,
)
from safelight.trainer.memory_plan.memory_tracer import CUDA_ROUNDING, LiveBytes, gradients_told
from safelight.trainer.models.base import Base, resolve_model
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import meta_unet
from safelight.trainer.step.prepare_unet import prepare_unet
from safelight.trainer.step.step import StepContext, StepSettings, train_step

META = torch.device("meta")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Within the block memory is given back by references alone: when the collector comes is no property of a step."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Traced:
    """One step. held: bytes by kind before and after it; peak: of all that is alive; work: of the whole step.

    offloaded: bytes of activations that go to the host and come back. allocations: all that took and gave back memory in it.
    """

    held: dict[str, int]
    peak: Peak
    work: Work
    offloaded: int
    allocations: AllocationTrace

    @property
    def transient(self) -> int:
        """What the step adds to what is held."""
        return self.peak.total - sum(self.held.values())

    def between(self, n: int, other: Traced, m: int, wanted: int, rounding: int) -> Traced | None:
        """Return the step of `wanted` images from this one of n and another of m; None where it takes a trace of its own."""
        allocations = self.allocations.between(n, other.allocations, m, wanted)
        if allocations is None or self.held != other.held:
            return None
        work = work_between(self.work, n, other.work, m, wanted)
        offloaded = self.offloaded + (wanted - n) * (other.offloaded - self.offloaded) // (m - n)
        return Traced(self.held, allocations.peak(rounding), work, offloaded, allocations)


class MetaRun:
    """A run as it would be on a device: cuda, whose kernels and allocator it supposes, or cpu.

    loading: the peak while the fp32 weights become what is trained, but for the pieces of fp32 that pass a device; packing: what
    it has above what is held then.
    """

    def __init__(self, config: Config, base: Base, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self._family = config, device, base.family
        self.live = LiveBytes(CUDA_ROUNDING if device.type == "cuda" else 1)
        self.unet = meta_unet(base).train()
        # a CPU has one fused operator; a card's are not probed here but taken in their order
        where = device if device.type == "cpu" else META
        wanted = "sdpa" if config.model.attention == "auto" and device.type == "cuda" else config.model.attention
        choice = choose_attention(where, dtype, attention_cases(self.unet), setting=wanted)
        schedule = make_schedule(base.config_of("scheduler"), config.loss.prediction).to(META)
        with references_on_meta(device.type == "cpu"), self.live:
            self.live.hold(self.unet.parameters(), WEIGHTS)
            self.live.phase, self.live.kind = "loading", OPTIMIZER
            prepared = prepare_unet(self.unet, config, choice, device, dtype)
            self.loading, self.packing = self.live.peak, self.live.peak.total - self.live.total
        self.optimizer, self.ema = prepared.optimizer, prepared.ema
        self.context = StepContext(self.unet, self.optimizer, schedule, 1.0, config.loss)
        # for who asks for the same again
        self.traced: dict[tuple, Traced | AllocationTrace] = {}
        self._sort()

    def _sort(self) -> None:
        """Count what is held as what it is."""
        self.live.settle(OPTIMIZER)
        self.live.hold(self.optimizer.master_tensors(), MASTER)
        self.live.hold(self.unet.parameters(), WEIGHTS)
        self.live.hold(self.optimizer.buffers.tensors.values(), GRADIENTS)
        if self.ema is not None:
            self.live.hold(self.ema.averages.values(), AVERAGE)

    def _batch(self, batch_size: int, height: int, width: int) -> Batch:
        # the host's copies are no memory of a GPU
        where = META if self.device.type == "cpu" else torch.device("cpu")
        channels, dim = self.unet.config.in_channels, self.unet.config.cross_attention_dim

        def rows(*shape: int) -> Tensor:
            return torch.empty(batch_size, *shape, device=where)

        mean, logvar = rows(channels, height, width), rows(channels, height, width)
        ids, bucket = tuple(range(batch_size)), Bucket(8 * width, 8 * height)
        given = self._family.stand_in_conditioning(self.unet.config, rows(NUM_TEXT_TOKENS, dim), (height, width))
        return Batch(mean, logvar, given, ids, (0,) * batch_size, bucket)

    def step(self, batch_size: int, height: int, width: int, num_micro: int = 1) -> Traced:
        """Return what a step over micro-batches of latents of a size needs; the first one makes what the optimizer keeps."""
        live, stage = self.live, self.config.stages()[0]
        batches = [self._batch(batch_size, height, width) for _ in range(num_micro)]
        optimizer_step = self.optimizer.step

        def watched_step() -> tuple[Tensor, Tensor | bool]:
            live.phase, live.kind = "optimizer", TEMPORARY
            try:
                return optimizer_step()
            finally:
                live.phase, live.kind = "step", None

        self.optimizer.step = watched_step
        try:
            with (
                references_on_meta(self.device.type == "cpu"),
                _no_collection(),
                live,
                gradients_told(live, self.unet.parameters()),
            ):
                live.phase, live.kind = "step", None
                live.reset_peak()
                settings = StepSettings(batch_size * num_micro, stage.lr, stage.weight_decay, stage.max_grad_norm)
                result = train_step(self.context, batches, settings, seed=0, epoch=0)
                taken = result.is_applied
                del result
                if self.ema is not None:
                    live.phase, live.kind = "moving average", TEMPORARY
                    self.ema.update(taken)
                del taken
        finally:
            del self.optimizer.step
        self._sort()
        offload = offload_of(self.unet)
        return Traced(
            dict(live.live), live.peak, live.work, 0 if offload is None else offload.copied_bytes, live.allocations
        )

    def checkpoint(self, mode: str) -> None:
        """Take another of kernels.checkpointing's modes."""
        apply_checkpointing(self.unet, mode)

    @torch.no_grad()
    def forward(self, batch_size: int, height: int, width: int) -> AllocationTrace:
        """Return what happens in a forward pass without gradients, as in validation and sampling."""
        dtype = next(self.unet.parameters()).dtype
        with references_on_meta(self.device.type == "cpu"), _no_collection(), self.live:
            self.live.reset_peak()
            latents = torch.empty(batch_size, self.unet.config.in_channels, height, width, dtype=dtype, device=META)
            text = torch.empty(
                batch_size, NUM_TEXT_TOKENS, self.unet.config.cross_attention_dim, dtype=dtype, device=META
            )
            self.unet.eval()
            given = self._family.stand_in_conditioning(self.unet.config, text, (height, width))
            timesteps = torch.empty(batch_size, dtype=torch.int64, device=META)
            self.unet(latents, timesteps, **given.unet_arguments(dtype))
            self.unet.train()
        return self.live.allocations


CUDA = torch.device("cuda")
# batch sizes that are traced
TRACED = (2, 4)


@functools.lru_cache(maxsize=8)
def _meta_run(settings: str, dtype: torch.dtype) -> MetaRun:
    """Return a run on meta tensors, of settings as JSON: all that its memory depends on but batches."""
    config = Config.model_validate_json(settings)
    run = MetaRun(config, resolve_model(config.model), CUDA, dtype)
    # the first step makes what the optimizer keeps
    run.step(1, 8, 8)
    return run


def meta_run(config: Config, dtype: torch.dtype, fused: bool, num_micro: int) -> MetaRun:
    """Return a config's run on meta tensors, as on a GPU, in the best memory mode that the dtype allows."""
    train = {
        "kernels": config.train.kernels,
        "ema_decay": config.train.ema_decay,
        "accumulate": num_micro,
        "accumulate_dtype": config.train.accumulate_dtype,
    }
    optimizer = config.optimizer.model_copy(update={"memory": "auto", "fused_backward": fused, "clipping": "auto"})
    return _meta_run(Config(model=config.model, train=train, optimizer=optimizer).model_dump_json(), dtype)


def step_of(run: MetaRun, how: str, size: int, latents: tuple[int, int], num_micro: int) -> Traced:
    """Return the trace of a step with a way of checkpointing. What it adds is the same in all memory modes."""

    def key(n: int) -> tuple:
        return "step", how, n, *latents, num_micro

    def traced(n: int) -> Traced:
        if key(n) not in run.traced:
            run.checkpoint(how)
            run.traced[key(n)] = run.step(n, *latents, num_micro)
        return run.traced[key(n)]

    if key(size) not in run.traced:
        found = None
        if size == 1 or all(key(n) in run.traced for n in TRACED):
            n, m = TRACED
            found = traced(n).between(n, traced(m), m, size, CUDA_ROUNDING)
        run.traced[key(size)] = found or traced(size)
    return run.traced[key(size)]


def forward_of(run: MetaRun, latents: tuple[int, int], num: int, rows: int = 1) -> int:
    """Return what a forward pass of num x rows images without gradients adds to what is held."""

    def recorded(n: int) -> AllocationTrace:
        key = ("forward", n, *latents)
        if key not in run.traced:
            run.traced[key] = run.forward(n, *latents)
        return run.traced[key]

    n, m = TRACED
    found = recorded(n).between(n, recorded(m), m, num * rows) or recorded(num * rows)
    return found.peak(CUDA_ROUNDING).total - run.live.total
