"""What one way of training needs of a card: a memory mode, a way of checkpointing, a batch size, fused or not.

Needed is the CUDA context, what the libraries take, and the peak of what torch allocates, traced on meta tensors
(trainer/memory_plan/meta_run.py): while loading, in a step of the largest bucket, and between steps at the least (trainer/memory_plan/candidate.py):
validation and drawing of one image at a time, decoding on the CPU. How many at a time, and whether the GPU decodes, is then
chosen by the room that is left. Host memory is counted beside it (trainer/memory_plan/static_bytes.py).
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from safelight.data.buckets import make_buckets
from safelight.errors import UserError
from safelight.kernels.moment_blocks import MIN_8BIT_ELEMENTS, num_blocks
from safelight.kernels.optim.paged_state import Pages
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.allocation_trace import ACTIVATIONS, GRADIENTS, MASTER, OPTIMIZER, TEMPORARY, WEIGHTS
from safelight.trainer.memory_plan.candidate import (
    Between,
    Forward,
    Need,
    added_by,
    fill,
    graphs_against,
    least_of,
    streams_from_host,
)
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, FRAGMENTATION, GRAPH_BYTES_A_LAUNCH, Card
from safelight.trainer.memory_plan.memory_tracer import CUDA_ROUNDING
from safelight.trainer.memory_plan.meta_run import META, MetaRun, Traced, forward_of, meta_run, step_of
from safelight.trainer.memory_plan.static_bytes import host_bytes
from safelight.trainer.models.base import Base, bucket_multiple, latent_factor, resolve_model, vae_bytes, vae_config
from safelight.trainer.models.device import DTYPES
from safelight.trainer.models.encoders import decode_bytes
from safelight.trainer.optim.kernel_adamw import SPLIT_BYTES, SPLIT_ELEMENTS
from safelight.trainer.optim.optimizer import memory_mode
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS
from safelight.units import GIB


def largest_latents(config: Config, base: Base) -> tuple[int, int]:
    """Return (height, width) of the largest bucket's latents."""
    factor = latent_factor(vae_config(base, config.model.vae))
    buckets = make_buckets(config.data.resolution, bucket_multiple(base, factor), config.data.max_aspect)
    bucket = max(buckets, key=lambda b: (b.width * b.height, -abs(b.width - b.height)))
    return bucket.height // factor, bucket.width // factor


def most_graphs(config: Config, base: Base) -> int:
    """Return how many CUDA graphs a stage can want: of each bucket's full and last batch, at each place among a step's."""
    factor = latent_factor(vae_config(base, config.model.vae))
    buckets = make_buckets(config.data.resolution, bucket_multiple(base, factor), config.data.max_aspect)
    places = 4 if any(stage.accumulate > 1 for stage in config.stages()) else 1
    return 2 * len(buckets) * places


def dtype_on(card: Card, precision: str) -> torch.dtype:
    """Return the UNet's dtype on a card. Raises UserError for bf16 where the card has none."""
    if precision == "bf16" and not card.has_bf16:
        raise UserError(f"model.precision bf16: {card.name} has no bf16 arithmetic; use fp16 or auto")
    return card.dtype if precision == "auto" else DTYPES[precision]


def rounded_up(num_bytes: int) -> int:
    return -(-num_bytes // CUDA_ROUNDING) * CUDA_ROUNDING


class Needs:
    """What a run's ways need on one card. Traces are made when they are asked for, and kept."""

    def __init__(self, config: Config, card: Card):
        self.config, self.card, self.base = config, card, resolve_model(config.model)
        self.dtype = dtype_on(card, config.model.precision)
        self.latents = largest_latents(config, self.base)
        stages = config.stages()
        self.batch_size = max(stage.batch_size for stage in stages)
        self._workspace = card.workspace(is_deterministic=config.run.deterministic)
        self._num_graphs = most_graphs(config, self.base)
        self._num_micro = 2 if any(stage.accumulate > 1 for stage in stages) else 1
        memory_mode(config.optimizer, self.dtype)

    @property
    def budget(self) -> int:
        """Bytes that a run may take: the card's, or memory.limit_gib."""
        limit = self.config.memory.limit_gib
        return int(GIB * min(self.card.usable_gib, limit or self.card.usable_gib))

    def _run(self, fused: bool) -> MetaRun:
        """Return the run on meta tensors, in the best memory mode that the precision allows."""
        return meta_run(self.config, self.dtype, fused, self._num_micro)

    def _trace(self, checkpointing: str, fused: bool, batch_size: int) -> Traced:
        return step_of(self._run(fused), checkpointing, batch_size, self.latents, self._num_micro)

    @functools.cached_property
    def _pages(self) -> Pages | None:
        """Return the pages of memory mode paged, on meta tensors."""
        return self._run(self.config.optimizer.is_fused).optimizer.make_pages(META)

    def held(self, memory: str, run: MetaRun) -> dict[str, int]:
        """Return the bytes between steps by kind: those of the run on meta tensors, but for what differs in this mode."""
        held = dict(run.live.live)
        if memory == run.optimizer.memory:
            return held
        sizes = [p.numel() for p in run.unet.parameters()]
        if memory == "paged" and self._pages is not None:
            large = [n for n in sizes if n >= MIN_8BIT_ELEMENTS]
            sizes = [n for n in sizes if n < MIN_8BIT_ELEMENTS]
            scales = [4 * num_blocks(n) for n in large]
            held[OPTIMIZER] += sum(rounded_up(len(slot)) for slot in self._pages.ring)
            held[OPTIMIZER] -= 2 * sum(map(rounded_up, (*large, *scales)))
        held[MASTER] = sum(rounded_up(MEMORY_MODES[memory].bytes_per_weight * n) for n in sizes)
        return held

    @functools.cached_property
    def _forwards(self) -> tuple[Forward | None, Forward | None]:
        """Return what validation of n images and drawing of n prompts add; None for what the run does not do."""
        config, sample = self.config, self.config.sample
        run = self._run(config.optimizer.is_fused)
        validated = drawn = None
        if config.validate_.every_epochs and config.data.validation_fraction:
            validated = functools.partial(forward_of, run, self.latents)
        if sample.every_epochs:
            factor = latent_factor(vae_config(self.base, config.model.vae))
            width, height = (max(1, side // factor) for side in self._drawn_size)
            # guidance runs each prompt with and without its text
            rows = 1 if sample.cfg == 1 else 2
            drawn = functools.partial(forward_of, run, (height, width), rows=rows)
        return validated, drawn

    @property
    def _drawn_size(self) -> tuple[int, int]:
        """(width, height) of samples in px."""
        sample, side = self.config.sample, self.config.data.resolution
        return sample.width or side, sample.height or side

    @property
    def _decode_bytes(self) -> int:
        return decode_bytes(*self._drawn_size, vae_bytes(self.base, self.config.model.vae))

    def between(self, held: int, pool: int) -> Between:
        """Return how validation and drawing fill the room that is left beside what is held.

        pool: what CUDA graphs of the steps would keep; where not even the least fits beside that, there will be none.
        """
        total = functools.partial(self._with, held)
        size, decode = self.config.validate_.batch_size, self._decode_bytes
        found = fill(self.budget - pool, total, size, *self._forwards, decode)
        return found if found.most <= self.budget - pool else fill(self.budget, total, size, *self._forwards, decode)

    def most_between(self, held: int, between: Between) -> int:
        """Return the bytes of the card that this takes beside what is held. Raises ValueError for no such way."""
        return self._with(held, added_by(between, *self._forwards, self._decode_bytes))

    def _with(self, held: int, added: int) -> int:
        return self._total(held, held + added)

    def _loading(self, memory: str, run: MetaRun) -> int:
        """Return the most that loading allocates: beside what is held, packed weights twice, or pieces of fp32 before there are moments."""
        if not OPTIMIZERS[self.config.optimizer.name].converts_in_pieces or self.dtype == torch.float32:
            return run.loading.total
        held = self.held(memory, run)
        before = held[WEIGHTS] + held[MASTER] + (held[OPTIMIZER] if memory == "paged" else 0)
        piece = min(SPLIT_ELEMENTS, max(p.numel() for p in run.unet.parameters()))
        return max(sum(held.values()) + run.packing, before + SPLIT_BYTES * piece)

    def _total(self, held: int, allocated: int) -> int:
        """Return the bytes of the card for so much allocated at the peak."""
        return CONTEXT_BYTES + self._workspace + allocated + round(FRAGMENTATION * (allocated - held))

    def _seconds(self, traced: Traced, need: Need) -> float | None:
        """Return an estimate of a step's time."""
        kinds, memory = need.kinds, need.memory
        # the optimizer's kernel reads and writes what is held by its address, which no trace sees; pages are copied as well
        traffic = 2 * (kinds[WEIGHTS] + kinds[MASTER] + kinds[OPTIMIZER]) + kinds[WEIGHTS]
        paged = self._pages.num_bytes if memory == "paged" and self._pages is not None else 0
        work = traced.work
        return self.card.seconds(
            work.flops,
            work.bytes_moved + traffic + 4 * paged,
            work.launches,
            traced.offloaded,
            paged,
            need.fused_backward,
            not need.no_graphs,
        )

    def need(self, memory: str, checkpointing: str, batch_size: int, fused: bool | None = None) -> Need:
        """Return what one way takes. fused: the better of the config's choices if None."""
        fused = self.config.optimizer.is_fused if fused is None else fused
        run = self._run(fused)
        traced = self._trace(checkpointing, fused, batch_size)
        kinds = self.held(memory, run)
        held = sum(kinds.values())
        others = max(self._loading(memory, run), held + least_of(*self._forwards))
        paged = self._pages.num_bytes if memory == "paged" and self._pages is not None else 0
        graphs = pool = 0
        if self.config.train.cuda_graphs != "off" and not streams_from_host(memory, checkpointing):
            # beside the stream that graphs are recorded on, validation and drawing multiply on the usual one
            graphs = self._num_graphs * traced.work.launches * GRAPH_BYTES_A_LAUNCH
            graphs += self.card.cublas_bytes(is_deterministic=self.config.run.deterministic)
            pool = traced.transient + graphs
        host = host_bytes(
            [p.shape for p in run.unet.parameters()],
            self.dtype.itemsize,
            self.config.optimizer.name,
            memory,
            self.config.train.ema_decay > 0,
            paged,
            traced.offloaded,
            vae_bytes(self.base, self.config.model.vae),
        )
        need = Need(
            memory,
            checkpointing,
            fused,
            batch_size,
            self._total(held, max(held + traced.transient, others)),
            held,
            traced.transient,
            others,
            traced.peak.during,
            {**kinds, **{kind: traced.peak.kinds[kind] for kind in (GRADIENTS, ACTIVATIONS, TEMPORARY)}},
            None,
            self.between(held, pool),
            host,
            graphs,
        )
        need = replace(need, no_graphs=graphs_against(self.config, need, self.budget))
        seconds = self._seconds(traced, need)
        return need if seconds is None else replace(need, images_per_s=self._num_micro * batch_size / seconds)

    def fits(self, need: Need) -> bool:
        return need.needed <= self.budget
