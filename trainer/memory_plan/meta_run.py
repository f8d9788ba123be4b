"""A training run on meta tensors: the real UNet, optimizer and training step, traced without allocating memory.

Traces are made on demand and cached. Only the batch sizes in TRACED_BATCH_SIZES are traced; others are extrapolated
(allocation_trace.py). Batch size 1 is always extrapolated: its own trace would differ by a few KiB, because vectors
need no copy when a batch has a single row.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.kernels.triton.jit import references_on_meta
from safelight.kernels.unet.activation_offload import offload_of
from safelight.kernels.unet.attention import NUM_TEXT_TOKENS, attention_cases, choose_attention
from safelight.kernels.unet.checkpointing import apply_checkpointing
from safelight.trainer.config.schema import Config
from safelight.trainer.families.conditioning import TokenConditioning
from safelight.trainer.families.family import uncropped_sizes
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
    extrapolate_work,
)
from safelight.trainer.memory_plan.memory_tracer import CUDA_ROUNDING, LiveBytes, count_gradients
from safelight.trainer.models.base import Base, resolve_model
from safelight.trainer.models.weights import meta_texts, meta_unet
from safelight.trainer.optim.reduction import AllReduce
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.step.prepare_unet import PreparedUNet, prepare_unet
from safelight.trainer.step.step import StepContext, StepSettings, train_step
from safelight.trainer.step.text_training import TextTraining, texts_in_step

CUDA, META = torch.device("cuda"), torch.device("meta")
TRACED_BATCH_SIZES = (2, 4)


@contextlib.contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """Disable the garbage collector so that traced lifetimes are deterministic."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class StepTrace:
    """The memory and work of one step.

    held: bytes by kind before and after the step; peak: of everything alive; work: of the whole step; offloaded:
    bytes of activations copied to the host (and back again); allocations: every allocation and free.
    """

    held: dict[str, int]
    peak: Peak
    work: Work
    offloaded: int
    allocations: AllocationTrace

    @property
    def transient(self) -> int:
        """The bytes that the step adds, at its peak, to those held between steps."""
        return self.peak.total - sum(self.held.values())

    def extrapolate(self, n: int, other: StepTrace, m: int, batch_size: int, rounding: int) -> StepTrace | None:
        """Return the step at `batch_size`, given this one at n and another at m; None if it must be traced itself."""
        allocations = self.allocations.extrapolate(n, other.allocations, m, batch_size)
        if allocations is None or self.held != other.held:
            return None
        work = extrapolate_work(self.work, n, other.work, m, batch_size)
        offloaded = self.offloaded + (batch_size - n) * (other.offloaded - self.offloaded) // (m - n)
        return StepTrace(self.held, allocations.peak(rounding), work, offloaded, allocations)


class _Arrived:
    """A collective that has ended: on meta tensors there is nothing to wait for."""

    def wait(self) -> None: ...


class _Rehearsed(AllReduce):
    """An AllReduce that exchanges nothing: its buckets are allocated and freed as in a run of several processes."""

    def __init__(self, live: LiveBytes, dtype: torch.dtype | None):
        super().__init__(None, dtype)
        self._live = live

    def _exchange(self, flat: Tensor, to: int | None) -> _Arrived:
        self._live.hold([flat], GRADIENTS)
        return _Arrived()


class MetaRun:
    """A run on meta tensors that behaves as it would on a device: cuda (its kernels and allocator) or cpu.

    loading: the peak while the fp32 weights are converted to what is trained, without the fp32 pieces that pass
    through the device; packing: the part of that peak above the bytes held afterwards. unet_parameters: of the UNet,
    its adapter included; num_saved: how many weights a checkpoint has. has_masks: whether batches have loss masks.
    is_reduced: as for meta_run.
    """

    def __init__(
        self,
        config: Config,
        base: Base,
        device: torch.device,
        dtype: torch.dtype,
        has_masks: bool = False,
        is_reduced: bool = False,
    ):
        self.config, self.device, self._family, self._has_masks = config, device, base.family, has_masks
        self._caption_chunks = config.data.caption_chunks
        self.live = LiveBytes(CUDA_ROUNDING if device.type == "cuda" else 1)
        self.unet = meta_unet(base).train()
        # backends are not probed on meta tensors: for a GPU, take the first one in order of preference
        probed = device if device.type == "cpu" else META
        setting = "sdpa" if config.model.attention == "auto" and device.type == "cuda" else config.model.attention
        choice = choose_attention(probed, dtype, attention_cases(self.unet), setting=setting)
        schedule = base.noise_schedule(config.loss.prediction).to(META)
        with references_on_meta(device.type == "cpu"), self.live:
            # in host memory until each is converted, unless the optimizer converts them all at once on the device
            in_pieces = dtype != torch.float32 and OPTIMIZERS[config.optimizer.name].converts_in_pieces
            if not in_pieces:
                self.live.hold(self.unet.parameters(), WEIGHTS)
            self.live.phase, self.live.kind = "loading", OPTIMIZER

            def when(what: str) -> None:
                # what is quantized or converted in pieces comes from host memory, which a trace cannot tell apart
                if what == "quantized" or in_pieces:
                    self.live.reset_peak()

            prepared = prepare_unet(self.unet, config, choice, device, dtype, when)
            self.loading, self.packing = self.live.peak, self.live.peak.total - self.live.total
            texts = self._texts(base, prepared) if config.reads_captions_in_step else None
        self._vectors = [] if texts is None or texts.vectors is None else list(texts.vectors.values())
        self.trained, self.optimizer, self.ema, self.texts = prepared.trained, prepared.optimizer, prepared.ema, texts
        self.context = StepContext(self.unet, self.optimizer, schedule, 1.0, config.loss, texts)
        if is_reduced:
            for optimizer in filter(None, (self.optimizer, self.context.text_optimizer)):
                kind = torch.float32 if config.train.accumulate_dtype == "fp32" else None
                optimizer.reduce_by(_Rehearsed(self.live, kind))
        # listed once: every candidate goes through them
        self.unet_parameters = list(self.unet.parameters())
        self.num_saved = sum(x.numel() for x in self.trained.tensors().values())
        self._step_traces: dict[tuple, StepTrace] = {}
        self._forward_traces: dict[tuple, AllocationTrace] = {}
        self._forward_bytes: dict[tuple, int] = {}
        self._classify_held()

    def _texts(self, base: Base, prepared: PreparedUNet) -> TextTraining:
        """Return what reads captions inside the step: text encoders whose weights are held beside the UNet's."""
        parts = meta_texts(base)
        self.live.hold((p for part in parts.values() for p in part.parameters()), WEIGHTS)
        self._num_tokens = next(iter(parts.values())).config.max_position_embeddings * self._caption_chunks
        zeros = None
        if base.zeroes_empty_text:
            zeros = torch.empty(len(parts), self._num_tokens, dtype=torch.int64, device=META)
        trained, leader = prepared.trained, prepared.optimizer.loss_scale
        if trained.vectors is not None:
            self.live.hold(trained.vectors.values(), WEIGHTS)
        return texts_in_step(self.config, trained, base.family, parts, zeros, META, leader)

    def _parameters(self) -> list[nn.Parameter]:
        """Return all weights that the run holds, trained or not."""
        texts = [] if self.texts is None else self.texts.parts.parameters()
        return [*self.unet.parameters(), *texts, *self._vectors]

    def _classify_held(self) -> None:
        """Count every tensor that outlives a step by its kind; what belongs to nothing else is optimizer state."""
        self.live.reclassify_leftovers(OPTIMIZER)
        self.live.hold(self.optimizer.master_tensors(), MASTER)
        self.live.hold(self._parameters(), WEIGHTS)
        if self.optimizer.stream is not None:
            self.live.hold(self.optimizer.stream.ring, WEIGHTS)
        self.live.hold(self.optimizer.buffers.tensors.values(), GRADIENTS)
        if self.context.text_optimizer is not None:
            self.live.hold(self.texts.optimizer.buffers.tensors.values(), GRADIENTS)
        if self.ema is not None:
            self.live.hold(self.ema.averages.values(), AVERAGE)

    def _batch(self, batch_size: int, height: int, width: int) -> Batch:
        # for a GPU, batches are made on the CPU: host copies do not count as GPU memory
        device = META if self.device.type == "cpu" else torch.device("cpu")
        channels, dim = self.unet.config.in_channels, self.unet.config.cross_attention_dim

        def rows(*shape: int) -> Tensor:
            return torch.empty(batch_size, *shape, device=device)

        mean, logvar = rows(channels, height, width), rows(channels, height, width)
        ids, bucket = tuple(range(batch_size)), Bucket(8 * width, 8 * height)
        if self.texts is None:
            text = rows(NUM_TEXT_TOKENS * self._caption_chunks, dim)
            conditioning = self._family.stand_in_conditioning(self.unet.config, text, (height, width))
        else:
            num_texts = len(self.texts.parts)
            token_ids = torch.zeros(batch_size, num_texts, self._num_tokens, dtype=torch.int64, device=device)
            conditioning = TokenConditioning(token_ids, uncropped_sizes(batch_size, 8 * height, 8 * width).to(device))
        mask = rows(1, height, width) if self._has_masks else None
        return Batch(mean, logvar, conditioning, ids, (0,) * batch_size, bucket, mask)

    def step(self, batch_size: int, height: int, width: int, num_micro: int = 1) -> StepTrace:
        """Run a step over `num_micro` micro-batches and return its trace.

        height, width: of the latents. The first step of a run also allocates the optimizer's state.
        """
        live, stage = self.live, self.config.stages()[0]
        batches = [self._batch(batch_size, height, width) for _ in range(num_micro)]
        optimizer_step = self.optimizer.step

        def traced_optimizer_step() -> tuple[Tensor, Tensor | bool]:
            live.phase, live.kind = "optimizer", TEMPORARY
            try:
                return optimizer_step()
            finally:
                live.phase, live.kind = "step", None

        self.optimizer.step = traced_optimizer_step
        try:
            with (
                references_on_meta(self.device.type == "cpu"),
                _garbage_collector_off(),
                live,
                count_gradients(live, (p for p in self._parameters() if p.requires_grad)),
            ):
                live.phase, live.kind = "step", None
                live.reset_peak()
                settings = StepSettings(
                    batch_size * num_micro,
                    stage.lr,
                    stage.weight_decay,
                    stage.max_grad_norm,
                    text_lr=self.config.text_encoder.lr,
                )
                result = train_step(self.context, batches, settings, seed=0, epoch=0)
                taken = result.is_applied
                del result
                if self.ema is not None:
                    live.phase, live.kind = "moving average", TEMPORARY
                    self.ema.update(taken)
                del taken
        finally:
            del self.optimizer.step
        self._classify_held()
        offload = offload_of(self.unet)
        offloaded = 0 if offload is None else offload.copied_bytes
        return StepTrace(dict(live.live), live.peak, live.work, offloaded, live.allocations)

    def checkpoint(self, mode: str) -> None:
        """Switch to another mode of kernels/unet/checkpointing.py."""
        apply_checkpointing(self.unet, mode)

    @torch.no_grad()
    def forward(self, batch_size: int, height: int, width: int) -> AllocationTrace:
        """Return the trace of a forward pass without gradients, as in validation and sampling."""
        dtype = next(self.unet.parameters()).dtype
        with references_on_meta(self.device.type == "cpu"), _garbage_collector_off(), self.live:
            self.live.reset_peak()
            latents = torch.empty(batch_size, self.unet.config.in_channels, height, width, dtype=dtype, device=META)
            num_tokens, dim = NUM_TEXT_TOKENS * self._caption_chunks, self.unet.config.cross_attention_dim
            text = torch.empty(batch_size, num_tokens, dim, dtype=dtype, device=META)
            self.unet.eval()
            conditioning = self._family.stand_in_conditioning(self.unet.config, text, (height, width))
            timesteps = torch.empty(batch_size, dtype=torch.int64, device=META)
            self.unet(latents, timesteps, **conditioning.unet_arguments(dtype))
            self.unet.train()
        return self.live.allocations

    def step_trace(self, checkpointing: str, batch_size: int, latents: tuple[int, int], num_micro: int) -> StepTrace:
        """Return the trace of a step with a checkpointing mode, traced or extrapolated. latents: (height, width).

        What a step adds to the held bytes is the same in all memory modes.
        """

        def key(n: int) -> tuple:
            return checkpointing, n, *latents, num_micro

        def traced(n: int) -> StepTrace:
            if key(n) not in self._step_traces:
                self.checkpoint(checkpointing)
                self._step_traces[key(n)] = self.step(n, *latents, num_micro)
            return self._step_traces[key(n)]

        if key(batch_size) not in self._step_traces:
            trace = None
            if batch_size == 1 or all(key(n) in self._step_traces for n in TRACED_BATCH_SIZES):
                n, m = TRACED_BATCH_SIZES
                trace = traced(n).extrapolate(n, traced(m), m, batch_size, CUDA_ROUNDING)
            self._step_traces[key(batch_size)] = trace or traced(batch_size)
        return self._step_traces[key(batch_size)]

    def forward_bytes(self, latents: tuple[int, int], num_images: int, rows_per_image: int = 1) -> int:
        """Return the bytes that a forward pass without gradients adds to those held. latents: (height, width).

        rows_per_image: 2 with guidance, which runs each prompt with and without its text.
        """

        def traced(n: int) -> AllocationTrace:
            key = (n, *latents)
            if key not in self._forward_traces:
                self._forward_traces[key] = self.forward(n, *latents)
            return self._forward_traces[key]

        (n, m), num_rows = TRACED_BATCH_SIZES, num_images * rows_per_image
        # every candidate asks for the same batches
        if (num_rows, latents) not in self._forward_bytes:
            trace = traced(n).extrapolate(n, traced(m), m, num_rows) or traced(num_rows)
            self._forward_bytes[num_rows, latents] = trace.peak(CUDA_ROUNDING).total - self.live.total
        return self._forward_bytes[num_rows, latents]


@functools.lru_cache(maxsize=8)
def _meta_run(settings: str, dtype: torch.dtype, has_masks: bool, is_reduced: bool) -> MetaRun:
    """Return a run for settings in JSON, which hold everything that memory depends on except the batches."""
    config = Config.model_validate_json(settings)
    run = MetaRun(config, resolve_model(config.model), CUDA, dtype, has_masks, is_reduced)
    # the first step allocates the optimizer's state
    run.step(1, 8, 8)
    return run


def meta_run(
    config: Config,
    dtype: torch.dtype,
    fused: bool,
    num_micro: int,
    has_masks: bool = False,
    is_reduced: bool = False,
) -> MetaRun:
    """Return a config's run on a GPU, in the most exact memory mode that the dtype allows.

    is_reduced: whether gradients pass through the buckets of AllReduce, as in one of several processes.
    """
    train = {
        "kernels": config.train.kernels,
        "ema_decay": config.train.ema_decay,
        "accumulate": num_micro,
        "accumulate_dtype": config.train.accumulate_dtype,
        "layers": config.train.layers,
    }
    optimizer = config.optimizer.model_copy(update={"memory": "auto", "fused_backward": fused, "clipping": "auto"})
    data = {"caption_chunks": config.data.caption_chunks}
    # learning rates and lengths take no memory
    text = config.text_encoder.model_copy(update={"lr": 1e-6, "schedule": "constant", "warmup_steps": 0, "epochs": 0})
    settings = Config(
        model=config.model,
        train=train,
        optimizer=optimizer,
        data=data,
        text_encoder=text,
        adapter=config.adapter,
        embedding={"vectors": config.embedding.vectors},
    )
    settings = settings.model_dump_json()
    return _meta_run(settings, dtype, has_masks, is_reduced)
