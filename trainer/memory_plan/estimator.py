"""Predicts the GPU memory of one training configuration: memory mode, checkpointing, batch size, fused backward or not.

The prediction adds up the CUDA context, the libraries' workspaces and the peak of torch's allocations, traced on meta
tensors (meta_run.py): while loading, in a step of the largest bucket, and in validation and sampling between steps,
at one image at a time and decoding on the CPU. Larger batches between steps then use whatever memory is left
(candidate.py). Host memory is counted as well (static_bytes.py).

With several processes it is the memory of one of them, the buckets in which gradients are exchanged included: they are
part of the trace. What `distributed.shard` divides is subtracted (`_divided`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from safelight.data.buckets import Bucket
from safelight.errors import UserError
from safelight.kernels.moment_blocks import CODE_BYTES, MIN_8BIT_ELEMENTS, num_blocks
from safelight.kernels.ops.quantized_weight import QUANTIZING_BYTES, QuantizedWeight, held_tensors
from safelight.kernels.optim.paged_state import Pages
from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.trainer.adapters.trained import trained_dtype
from safelight.trainer.config.schema import Config
from safelight.trainer.distributed.sharded import BLOCKS, UNITS
from safelight.trainer.distributed.spread import num_micro_steps
from safelight.trainer.inference.prompt_file import is_guided, largest_size
from safelight.trainer.memory_plan.allocation_trace import (
    ACTIVATIONS,
    AVERAGE,
    GRADIENTS,
    MASTER,
    OPTIMIZER,
    TEMPORARY,
    WEIGHTS,
)
from safelight.trainer.memory_plan.candidate import (
    Candidate,
    EvalBatching,
    ForwardBytes,
    choose_eval_batching,
    eval_bytes,
    smallest_eval_bytes,
    streams_from_host,
    why_no_graphs,
)
from safelight.trainer.memory_plan.communication import ONE_RANK, Ranks, largest_share, sharded_bytes
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, FRAGMENTATION, GRAPH_BYTES_A_LAUNCH, Card
from safelight.trainer.memory_plan.memory_tracer import CUDA_ROUNDING
from safelight.trainer.memory_plan.meta_run import META, MetaRun, StepTrace, meta_run
from safelight.trainer.memory_plan.plan_cache import PlanCache, checked_int
from safelight.trainer.memory_plan.static_bytes import (
    has_masks,
    host_bytes,
    num_batch_ids,
    planned_inputs,
    static_bytes,
)
from safelight.trainer.models.base import latent_factor, resolve_model, vae_bytes, vae_config
from safelight.trainer.models.device import DTYPES
from safelight.trainer.models.latent_codec import decode_bytes
from safelight.trainer.models.placing import all_buckets
from safelight.trainer.optim.kernel_adamw import SPLIT_BYTES, SPLIT_ELEMENTS
from safelight.trainer.optim.optimizer import memory_mode
from safelight.trainer.optim.reduction import BUCKET_BYTES
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS, Shape
from safelight.units import GIB

# gathered units with shard full: one in use, the next, and the buffer that the next was received in
GATHERED_AT_ONCE = 3


def gathered_bytes(unet: nn.Module, num_ranks: int) -> int:
    """Return the bytes of whole weights that a process has at a time with shard full.

    What the UNet and a block have outside of smaller units stays gathered while those run.
    """
    units = [name for name, module in unet.named_modules() if type(module).__name__ in UNITS]
    blocks = [name for top in BLOCKS for name, _ in unet.named_modules() if _is_block(name, top)]
    by_unit: dict[str, list[Tensor]] = {}
    for name, p in unet.named_parameters():
        own = next((unit for unit in (*units, *blocks) if name.startswith(f"{unit}.")), "")
        by_unit.setdefault(own, []).append(p)
    sizes = {unit: sharded_bytes(tensors, num_ranks) for unit, tensors in by_unit.items()}
    outer = sizes.get("", 0) + max((sizes.get(block, 0) for block in blocks), default=0)
    return outer + GATHERED_AT_ONCE * max((sizes[unit] for unit in units), default=0)


def _is_block(name: str, top: str) -> bool:
    return name == top if top == "mid_block" else name.startswith(f"{top}.") and name.count(".") == 1


def largest_latents(buckets: Sequence[Bucket], factor: int) -> tuple[int, int]:
    """Return (height, width) of the largest bucket's latents; of equal areas, the squarest. factor: pixels a latent."""
    bucket = max(buckets, key=lambda b: (b.width * b.height, -abs(b.width - b.height)))
    return bucket.height // factor, bucket.width // factor


def max_graphs(config: Config, num_buckets: int, num_batch_ids: int = 0, num_processes: int = 1) -> int:
    """Return an upper bound of the CUDA graphs of a stage.

    Each bucket has full batches and, unless it is carried over, a last, shorter one; and one more for every batch id
    of photographs, as far as there are sizes. With accumulation each has a graph for every place in the step: first,
    last, both or neither.
    """
    stages = config.stages()
    places = 4 if any(num_micro_steps(stage.accumulate, num_processes) > 1 for stage in stages) else 1
    num_short = 0 if config.data.carries else min(1 + num_batch_ids, max(stage.batch_size for stage in stages))
    return (1 + num_short) * num_buckets * places


def dtype_on(card: Card, precision: str) -> torch.dtype:
    """Return the UNet's dtype on a card. Raises UserError for bf16 on a card without it."""
    if precision == "bf16" and not card.has_bf16:
        raise UserError(f"model.precision bf16: {card.name} has no bf16 arithmetic; use fp16 or auto")
    return card.dtype if precision == "auto" else DTYPES[precision]


def rounded_up(num_bytes: int) -> int:
    """Return the bytes that the CUDA allocator takes for an allocation."""
    return -(-num_bytes // CUDA_ROUNDING) * CUDA_ROUNDING


def _read_shapes(values: object) -> tuple[list[Shape], float]:
    """Return what trained_shapes has kept. Raises ValueError for anything else."""
    shapes, factor = values if isinstance(values, list | tuple) and len(values) == 2 else (None, None)
    if (
        not isinstance(shapes, list)
        or type(factor) is not float
        or not all(isinstance(x, list | tuple) for x in shapes)
    ):
        raise ValueError("not the shapes of what is trained")
    return [tuple(map(checked_int, shape)) for shape in shapes], factor


class MemoryEstimator:
    """Estimates the candidates of a config on one card.

    Steps are traced on demand, and the traces are cached. What earlier plans have estimated is on disk (plan_cache.py).
    """

    def __init__(self, config: Config, card: Card, ranks: Ranks = ONE_RANK):
        if ranks.shard == "full":
            # our kernels' layers share weights, which FSDP2 would cut
            train = config.train.model_copy(update={"kernels": "off"})
            config = config.model_copy(update={"train": train})
        self.config, self.card, self.base, self.ranks = config, card, resolve_model(config.model), ranks
        self.dtype = dtype_on(card, config.model.precision)
        self._latent_factor = latent_factor(vae_config(self.base, config.model.vae))
        self.buckets = all_buckets(self.base, config.data, self._latent_factor)
        self.latents = largest_latents(self.buckets, self._latent_factor)
        stages = config.stages()
        self.batch_size = max(stage.batch_size for stage in stages)
        self._workspace = card.workspace(is_deterministic=config.run.deterministic)
        self._max_graphs = max_graphs(config, len(self.buckets), num_batch_ids(config), ranks.num)
        # of one process; a third micro-step takes no more memory than the second
        num_micro = max(num_micro_steps(stage.accumulate, ranks.num) for stage in stages)
        self._num_micro = min(2, num_micro)
        self._has_masks = has_masks(config)
        memory_mode(config.optimizer, self.dtype)

    @functools.cached_property
    def cache(self) -> PlanCache:
        """What earlier plans have estimated from the same inputs."""
        config, stages = self.config, self.config.stages()
        # of the dataset and the prompt file, all that an estimate asks for
        drawn = None
        if any(stage.config.sample.every_epochs for stage in stages):
            drawn = [is_guided(config), self._sample_size]
        return PlanCache(
            {
                **planned_inputs(config, self.base),
                "dtype": str(self.dtype),
                "card": asdict(self.card),
                "ranks": asdict(self.ranks),
                "latents": self.latents,
                "graphs": self._max_graphs,
                "masks": self._has_masks,
                "drawn": drawn,
                # whose attention backends are others
                "deterministic": torch.are_deterministic_algorithms_enabled(),
            }
        )

    @property
    def budget(self) -> int:
        """Bytes that the run may use: the card's usable memory or memory.limit_gib, whichever is smaller."""
        limit = self.config.memory.limit_gib
        return int(GIB * min(self.card.usable_gib, limit or self.card.usable_gib))

    def meta_run(self, fused: bool) -> MetaRun:
        """Return the run on meta tensors, in the most exact memory mode that the precision allows."""
        return meta_run(self.config, self.dtype, fused, self._num_micro, self._has_masks, self.ranks.num > 1)

    def step_trace(self, checkpointing: str, fused: bool, batch_size: int) -> StepTrace:
        """Return the trace of a step of the largest bucket."""
        return self.meta_run(fused).step_trace(checkpointing, batch_size, self.latents, self._num_micro)

    def held(self, memory: str, run: MetaRun) -> dict[str, int]:
        """Return the bytes held between steps, by kind: those of the traced run, adjusted to another memory mode and
        to what a process has of the divided parts."""
        return self._divided(self._held_whole(memory, run), run)

    def _divided(self, held: dict[str, int], run: MetaRun) -> dict[str, int]:
        """Return a process's part of the held bytes, that of the process which has most.

        states: of what belongs to parts of the UNet, each of which one process owns. full: FSDP2 divides every tensor;
        the weights of its units are gathered one at a time, the next while one is in use.
        """
        shard, num = self.ranks.shard, self.ranks.num
        if shard == "none" or num == 1:
            return held
        parts = [[run.optimizer.parameters[name] for name in names] for names in run.optimizer.parts.values()]
        own = {MASTER, OPTIMIZER, AVERAGE}
        if shard == "states":
            share = largest_share({n: sum(p.nbytes for p in part) for n, part in enumerate(parts)}, num)
            return {kind: math.ceil(share * size) if kind in own else size for kind, size in held.items()}
        tensors = [p for part in parts for p in part]
        whole = sum(p.numel() * p.element_size() for p in tensors)
        share = sharded_bytes(tensors, num) / num / whole
        held = {kind: math.ceil(share * size) if kind in {*own, GRADIENTS} else size for kind, size in held.items()}
        held[WEIGHTS] -= whole - math.ceil(share * whole)
        return {**held, WEIGHTS: held[WEIGHTS] + gathered_bytes(run.unet, num)}

    def _peak_of(
        self, trace: StepTrace, checkpointing: str, batch_size: int, run: MetaRun
    ) -> tuple[int, dict[str, int]]:
        """Return the bytes that a step adds to those held, and what is alive at its peak, by kind.

        Where states are divided, a process keeps only the sums of its own part until it steps; before they are
        exchanged, gradients live as long as in a fused step, whose peak this takes.
        """
        whole = trace.transient, trace.peak.kinds
        if self.ranks.shard == "none" or self.ranks.num == 1 or run.optimizer.is_fused:
            return whole
        if not OPTIMIZERS[self.config.optimizer.name].steps_inside_backward:
            return whole
        parameters, parts = run.optimizer.parameters, run.optimizer.parts.values()
        sizes = {n: sum(parameters[name].nbytes for name in names) for n, names in enumerate(parts)}
        own = math.ceil(largest_share(sizes, self.ranks.num) * sum(sizes.values()))
        if self.ranks.shard == "states":
            # each owner's parts wait for a bucket of their own
            own += (self.ranks.num - 1) * BUCKET_BYTES
        fused = self.step_trace(checkpointing, True, batch_size)
        if fused.transient + own >= trace.transient:
            return whole
        return fused.transient + own, {**fused.peak.kinds, GRADIENTS: fused.peak.kinds[GRADIENTS] + own}

    def _held_whole(self, memory: str, run: MetaRun) -> dict[str, int]:
        """Return the bytes held between steps by a process that keeps everything."""
        held = dict(run.live.live)
        if memory == run.optimizer.memory:
            return held
        sizes = [p.numel() for p in run.optimizer.parameters.values()]
        mode = MEMORY_MODES[memory]
        if mode.pages_state and self._pages is not None:
            large = [n for n in sizes if n >= MIN_8BIT_ELEMENTS]
            sizes = [n for n in sizes if n < MIN_8BIT_ELEMENTS]
            scales = [4 * num_blocks(n) for n in large]
            held[OPTIMIZER] += sum(rounded_up(len(slot)) for slot in self._pages.ring)
            num_codes = CODE_BYTES[self.config.optimizer.moments]
            held[OPTIMIZER] -= num_codes * sum(map(rounded_up, large)) + 2 * sum(map(rounded_up, scales))
        held[MASTER] = sum(rounded_up(mode.bytes_per_weight * n) for n in sizes)
        if mode.streams_weights and self._stream is not None:
            # packed ones share a storage
            storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in self._stream}
            held[WEIGHTS] -= sum(map(rounded_up, storages.values()))
            held[WEIGHTS] += sum(rounded_up(slot.numel() * slot.element_size()) for slot in self._stream.ring)
        return held

    def loading_peak(self, memory: str, run: MetaRun) -> int:
        """Return the peak allocation while loading.

        Packing weights needs both copies of the packed ones in addition to everything held. Converting in pieces needs
        one fp32 piece, before the moments are allocated.
        """
        in_pieces = OPTIMIZERS[self.config.optimizer.name].converts_in_pieces
        if not in_pieces or trained_dtype(self.config, self.dtype) == torch.float32:
            return run.loading.total
        if self.ranks.shard == "full":
            # blocks are divided as they are loaded
            return sum(self.held(memory, run).values())
        held = self.held(memory, run)
        before = held[WEIGHTS] + held[MASTER] + (held[OPTIMIZER] if MEMORY_MODES[memory].pages_state else 0)
        piece = min(SPLIT_ELEMENTS, max(p.numel() for p in run.optimizer.parameters.values()))
        quantized = max((p.numel() for p in run.unet_parameters if isinstance(p, QuantizedWeight)), default=0)
        added = max(SPLIT_BYTES * piece, QUANTIZING_BYTES * quantized)
        return max(sum(held.values()) + run.packing, before + added)

    def eval_batching(self, held: int, graph_pool: int) -> EvalBatching:
        """Return the largest validation and sampling batches that fit beside the held bytes.

        graph_pool: bytes that CUDA graphs keep. If not even the smallest batches fit beside them, the run has no
        graphs.
        """
        total_bytes = functools.partial(self._total_with, held)
        arguments = (total_bytes, self.config.validate_.batch_size, *self._eval_forwards, self._decode_bytes)
        with_graphs = choose_eval_batching(self.budget - graph_pool, *arguments)
        if with_graphs.peak_bytes <= self.budget - graph_pool:
            return with_graphs
        return choose_eval_batching(self.budget, *arguments)

    def eval_peak(self, held: int, batching: EvalBatching) -> int:
        """Return the GPU memory of the run while it validates and samples. Raises ValueError if the batching does not
        match the run."""
        return self._total_with(held, eval_bytes(batching, *self._eval_forwards, self._decode_bytes))

    def estimate(self, memory: str, checkpointing: str, batch_size: int, fused: bool | None = None) -> Candidate:
        """Return the candidate of these settings. fused: None for what the config says."""
        fused = self.config.optimizer.is_fused if fused is None else fused
        key = f"{memory} {checkpointing} {batch_size} {fused}"
        make = functools.partial(self._traced, memory, checkpointing, batch_size, fused)
        return self.cache.remembered(key, make, Candidate.to_json, Candidate.from_json)

    def _traced(self, memory: str, checkpointing: str, batch_size: int, fused: bool) -> Candidate:
        run = self.meta_run(fused)
        trace = self.step_trace(checkpointing, fused, batch_size)
        held_by_kind = self.held(memory, run)
        held = sum(held_by_kind.values())
        transient, kinds = self._peak_of(trace, checkpointing, batch_size, run)
        outside_step = max(self.loading_peak(memory, run), held + smallest_eval_bytes(*self._eval_forwards))
        graph_bytes = graph_pool = 0
        if self.config.train.cuda_graphs != "off" and not streams_from_host(memory, checkpointing):
            graph_bytes = self._max_graphs * trace.work.launches * GRAPH_BYTES_A_LAUNCH
            # graphs are captured on a stream of their own, validation and sampling use the default one: one more
            # workspace
            graph_bytes += self.card.cublas_bytes(is_deterministic=self.config.run.deterministic)
            graph_pool = transient + graph_bytes
        host = host_bytes(
            [p.shape for p in run.optimizer.parameters.values()],
            self.dtype.itemsize,
            self.config.optimizer,
            memory,
            self.config.train.ema_decay > 0,
            self._paged_bytes(memory),
            self._streamed_bytes(memory),
            trace.offloaded,
            vae_bytes(self.base, self.config.model.vae),
            sum(p.numel() for p in run.unet_parameters),
            run.num_saved,
            self._saved_text_bytes,
        )
        candidate = Candidate(
            memory,
            checkpointing,
            fused,
            batch_size,
            self._total(held, max(held + transient, outside_step)),
            held,
            transient,
            outside_step,
            trace.peak.during,
            {**held_by_kind, **{kind: kinds[kind] for kind in (GRADIENTS, ACTIVATIONS, TEMPORARY)}},
            None,
            self.eval_batching(held, graph_pool),
            host,
            graph_bytes,
            "",
            *self._bytes_over_the_bus(memory, trace.offloaded),
        )
        candidate = replace(candidate, no_graphs=why_no_graphs(self.config, candidate, self.budget))
        seconds = self._step_seconds(trace, candidate)
        if seconds is None:
            return candidate
        return replace(candidate, images_per_s=self._num_micro * batch_size / seconds)

    def remember(self) -> None:
        """Keep what has been estimated for later plans (plan_cache.py)."""
        self.cache.save()

    def trained_shapes(self) -> tuple[list[Shape], float]:
        """Return the shapes of what is trained, and the least of the factors that multiply their learning rate."""

        def make() -> tuple[list[Shape], float]:
            optimizer = self.meta_run(self.config.optimizer.is_fused).optimizer
            return [tuple(p.shape) for p in optimizer.parameters.values()], float(min(optimizer.lr_factors.values()))

        return self.cache.remembered("trained", make, list, _read_shapes)

    def fits(self, candidate: Candidate) -> bool:
        return candidate.needed_bytes <= self.budget

    @functools.cached_property
    def _pages(self) -> Pages | None:
        """The pages of memory modes paged and streamed, on meta tensors."""
        return self.meta_run(self.config.optimizer.is_fused).optimizer.make_pages(META)

    def _paged_bytes(self, memory: str) -> int:
        return self._pages.num_bytes if MEMORY_MODES[memory].pages_state and self._pages is not None else 0

    @functools.cached_property
    def _stream(self) -> StreamedWeights | None:
        """The weights of memory mode streamed, on meta tensors."""
        return self.meta_run(self.config.optimizer.is_fused).optimizer.make_stream(META, self.dtype)

    def _bytes_over_the_bus(self, memory: str, offloaded: int) -> tuple[int, int]:
        """Return the bytes that a step copies to the GPU and back. offloaded: activations of a micro-step."""
        num_micro = max(stage.accumulate for stage in self.config.stages())
        paged, streamed, activations = self._paged_bytes(memory), self._streamed_bytes(memory), num_micro * offloaded
        # weights come in for each forward and backward pass, and go out once when they are updated
        updated = self._stream.num_trained_bytes if streamed else 0
        return 2 * num_micro * streamed + paged + activations, updated + paged + activations

    def _frozen_bytes(self, candidate: Candidate) -> int:
        """Return the bytes of the weights on the device that the optimizer does not touch."""
        streamed = self._stream if self._streamed_bytes(candidate.memory) else ()
        parameters = self.meta_run(candidate.fused_backward).unet_parameters
        frozen = [p for p in parameters if not p.requires_grad and p not in streamed]
        return sum(x.numel() * x.element_size() for p in frozen for x in held_tensors(p))

    def _streamed_bytes(self, memory: str) -> int:
        return self._stream.num_bytes if MEMORY_MODES[memory].streams_weights and self._stream is not None else 0

    @functools.cached_property
    def _eval_forwards(self) -> tuple[ForwardBytes | None, ForwardBytes | None]:
        """The bytes that validation of n images and sampling of n prompts add; None for what the run does not do."""
        config = self.config
        stages = [stage.config for stage in config.stages()]
        run = self.meta_run(config.optimizer.is_fused)
        validate = sample = None
        if any(stage.validate_.every_epochs for stage in stages) and config.data.validation_fraction:
            validate = functools.partial(run.forward_bytes, self.latents)
        if any(stage.sample.every_epochs for stage in stages):
            width, height = (max(1, side // self._latent_factor) for side in self._sample_size)
            rows_per_image = 2 if is_guided(config) else 1
            sample = functools.partial(run.forward_bytes, (height, width), rows_per_image=rows_per_image)
        return validate, sample

    @functools.cached_property
    def _sample_size(self) -> tuple[int, int]:
        """(width, height) of the largest samples in px."""
        return largest_size(self.config)

    @property
    def _decode_bytes(self) -> int:
        vae = self.config.model.vae
        return decode_bytes(*self._sample_size, vae_bytes(self.base, vae), vae_config(self.base, vae))

    @functools.cached_property
    def _saved_text_bytes(self) -> int:
        """What a checkpoint holds of the text encoders: 0 if they are not trained."""
        if not self.config.text_encoder.train:
            return 0
        static = static_bytes(self.config, META, self.dtype)
        return static.text_weights + static.text_moments

    def _total_with(self, held: int, added: int) -> int:
        return self._total(held, held + added)

    def _total(self, held: int, allocated: int) -> int:
        """Return the GPU memory of the run. allocated: peak of torch's allocations; held: the part of it that stays."""
        return CONTEXT_BYTES + self._workspace + allocated + round(FRAGMENTATION * (allocated - held))

    def _step_seconds(self, trace: StepTrace, candidate: Candidate) -> float | None:
        """Return an estimate of a step's time, None if the card's rates are unknown."""
        kinds = candidate.bytes_by_kind
        # the optimizer's kernel reads and writes these through tables of addresses, which the trace cannot see
        weights = kinds[WEIGHTS] - self._frozen_bytes(candidate)
        traffic = 2 * (weights + kinds[MASTER] + kinds[OPTIMIZER]) + weights
        paged, streamed = self._paged_bytes(candidate.memory), self._streamed_bytes(candidate.memory)
        return self.card.seconds(
            trace.work.flops,
            # pages are read and written by the kernel, and again when they are copied; streamed weights are copied in
            # twice and out once
            trace.work.bytes_moved + traffic + 4 * paged + 3 * streamed,
            trace.work.launches,
            trace.offloaded,
            paged,
            self._num_micro * streamed,
            candidate.fused_backward,
            not candidate.no_graphs,
        )
