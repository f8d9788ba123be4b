"""What a run needs of a card in every memory mode, way of checkpointing and batch size, and which of them to take.

Needed is the CUDA context, what the libraries take, and the peak of what torch allocates, traced on meta tensors
(trainer/meta_run.py): while loading, in a step of the largest bucket, in validation's and sampling's forward pass. The
autoencoder's decoding of samples is added by its known 0.75 GiB an image of 512 px.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch

from safelight.data.buckets import make_buckets
from safelight.trainer.cards import CONTEXT_BYTES, FRAGMENTATION, GIB, Card
from safelight.trainer.config import Config
from safelight.trainer.dataset import bucket_multiple
from safelight.trainer.meta_run import MetaRun, Traced
from safelight.trainer.models import PRECISIONS, Base, base_of, vae_config
from safelight.trainer.optim import memory_mode
from safelight.trainer.plan import BESIDE_BYTES, latent_factor
from safelight.trainer.random_models import RANDOM_MODELS
from safelight.trainer.trace import ACTIVATIONS, CUDA_ROUNDING, GRADIENTS, MASTER, OPTIMIZER, TEMPORARY, WEIGHTS

CUDA = torch.device("cuda")
BATCH_SIZES = (1, 2, 4, 8)
# TODO: kernels.checkpointing.MODES once a plan counts the host memory and the copies of offload
MODES = ("none", "selective", "full")
# best first: what is kept of the weights, then the least work
MEMORY_MODES = ("exact", "near", "rounded")
# of the autoencoder in fp32: its weights, and activations of one image (docstring of LatentCodec.decode)
DECODE_BYTES_A_PIXEL = 0.75 * GIB / 512**2
DECODER_BYTES = 335_000_000
# prompts drawn at a time: batch_size of sample.generate
SAMPLE_BATCH_SIZE = 8
# fp32 copies of a tensor that are alive at once while it is split into 16 bits and its rest, at most (test_fit)
SPLIT_COPIES = 7


@dataclass(frozen=True)
class Need:
    """What one way of training takes. needed: bytes of the card; held: between steps; step: what a step adds at its peak.

    others: the most of loading, validation, sampling, in all. images_per_s: an estimate, None where the card's rates are
    not known. during: where the step's peak is; kinds: what is alive there, by kind.
    """

    memory: str
    checkpointing: str
    fused_backward: bool
    batch_size: int
    needed: int
    held: int
    step: int
    others: int
    during: str
    kinds: dict[str, int]
    images_per_s: float | None

    def settings(self) -> str:
        """Return the settings of it, as they are written on the command line."""
        return (
            f"--optimizer.memory {self.memory} --train.checkpointing {self.checkpointing} "
            f"--optimizer.fused-backward {str(self.fused_backward).lower()} --train.batch-size {self.batch_size}"
        )


def largest_latents(config: Config, base: Base) -> tuple[int, int]:
    """Return (height, width) of the largest bucket's latents."""
    # an architecture without an autoencoder of its own: Stable Diffusion's
    has_vae = not base.random_name or "vae" in RANDOM_MODELS[base.random_name]
    factor = latent_factor(vae_config(base, config.model.vae)) if has_vae else 8
    buckets = make_buckets(config.data.resolution, bucket_multiple(base, factor), config.data.max_aspect)
    bucket = max(buckets, key=lambda b: (b.width * b.height, -abs(b.width - b.height)))
    return bucket.height // factor, bucket.width // factor


def dtype_on(card: Card, precision: str) -> torch.dtype:
    """Return the UNet's dtype on a card. Raises ValueError for bf16 where the card has none."""
    if precision == "bf16" and not card.has_bf16:
        raise ValueError(f"model.precision bf16: {card.name} has no bf16 arithmetic; use fp16 or auto")
    return card.dtype if precision == "auto" else {name: dtype for dtype, name in PRECISIONS.items()}[precision]


@functools.lru_cache(maxsize=4)
def _meta_run(settings: str, dtype: torch.dtype) -> MetaRun:
    """Return a run on meta tensors, of settings as JSON: all that its memory depends on but batches."""
    config = Config.model_validate_json(settings)
    run = MetaRun(config, base_of(config.model), CUDA, dtype)
    # the first step makes what the optimizer keeps
    run.step(1, 8, 8)
    return run


class Planner:
    """A run's needs on one card. Traces are made when they are asked for, and kept."""

    def __init__(self, config: Config, card: Card):
        self.config, self.card, self.base = config, card, base_of(config.model)
        self.dtype = dtype_on(card, config.model.precision)
        self.latents = largest_latents(config, self.base)
        stages = config.stages()
        self.batch_size = max(stage.batch_size for stage in stages)
        self._num_micro = 2 if any(stage.accumulate > 1 for stage in stages) else 1
        memory_mode(config.optimizer, self.dtype)

    @property
    def budget(self) -> int:
        """Bytes that a run may take: the card's, or memory.limit_gib."""
        limit = self.config.memory.limit_gib
        return int(GIB * min(self.card.usable_gib, limit or self.card.usable_gib))

    def memory_modes(self, wanted: str | None = None) -> tuple[str, ...]:
        """Return the modes that a value of optimizer.memory leaves, best first; the config's value if None."""
        optimizer = self.config.optimizer
        wanted = optimizer.memory if wanted is None else wanted
        if wanted != "auto" or self.dtype == torch.float32 or optimizer.name != "adamw8bit":
            return (memory_mode(optimizer.model_copy(update={"memory": wanted}), self.dtype),)
        return MEMORY_MODES

    def _run(self, fused: bool) -> MetaRun:
        """Return the run on meta tensors, in the best memory mode that the precision allows."""
        config = self.config
        train = {
            "kernels": config.train.kernels, "ema_decay": config.train.ema_decay, "accumulate": self._num_micro,
            "accumulate_dtype": config.train.accumulate_dtype,
        }  # fmt: skip
        optimizer = config.optimizer.model_copy(update={"memory": "auto", "fused_backward": fused, "clipping": "auto"})
        return _meta_run(Config(model=config.model, train=train, optimizer=optimizer).model_dump_json(), self.dtype)

    def _trace(self, checkpointing: str, fused: bool, batch_size: int) -> Traced:
        """Return a step's trace. What it adds is the same in all memory modes of one optimizer."""
        run = self._run(fused)
        key = (checkpointing, batch_size, *self.latents, self._num_micro)
        if key not in run.traced:
            run.checkpoint(checkpointing)
            run.traced[key] = run.step(batch_size, *self.latents, self._num_micro)
        return run.traced[key]

    def held(self, memory: str, run: MetaRun) -> dict[str, int]:
        """Return the bytes between steps by kind: those of the run on meta tensors, but for what completes its weights."""
        held = dict(run.live.live)
        if memory != run.optimizer.memory:
            sizes = [BESIDE_BYTES[memory] * p.numel() for p in run.unet.parameters()]
            held[MASTER] = sum(-(-size // CUDA_ROUNDING) * CUDA_ROUNDING for size in sizes)
        return held

    def _loading(self, memory: str, run: MetaRun) -> int:
        """Return the most that loading allocates; an upper bound in other modes than the traced one."""
        held = sum(self.held(memory, run).values())
        if memory == run.optimizer.memory:
            return run.loading.total
        sizes = [4 * p.numel() for p in run.unet.parameters()]
        return max(run.loading.total - sum(run.live.live.values()) + held, sum(sizes) + SPLIT_COPIES * max(sizes))

    def _others(self, memory: str, run: MetaRun) -> int:
        """Return the most that is allocated beside training's steps."""
        config = self.config
        held, most = sum(self.held(memory, run).values()), self._loading(memory, run)
        batches = []
        if config.validate_.every_epochs and config.data.validation_fraction:
            batches.append(config.validate_.batch_size)
        if config.sample.every_epochs:
            num = min(SAMPLE_BATCH_SIZE, len(config.sample.prompts) or config.sample.num_prompts)
            # guidance runs each prompt with and without its text
            batches.append(num * (1 if config.sample.cfg == 1 else 2))
            width, height = (n or config.data.resolution for n in (config.sample.width, config.sample.height))
            most = max(most, held + DECODER_BYTES + round(width * height * DECODE_BYTES_A_PIXEL))
        for batch_size in batches:
            key = (batch_size, *self.latents)
            if key not in run.traced:
                run.traced[key] = run.forward(*key)
            most = max(most, held + run.traced[key])
        return most

    def need(self, memory: str, checkpointing: str, batch_size: int, fused: bool | None = None) -> Need:
        """Return what one way takes. fused: the config's optimizer.fused_backward if None."""
        fused = self.config.optimizer.fused_backward if fused is None else fused
        run = self._run(fused)
        traced = self._trace(checkpointing, fused, batch_size)
        kinds = self.held(memory, run)
        held, others = sum(kinds.values()), self._others(memory, run)
        allocated = max(held + traced.transient, others)
        slack = round(FRAGMENTATION * (allocated - held))
        # the optimizer's kernel reads and writes what is held by its address, which no trace sees
        traffic = 2 * (kinds[WEIGHTS] + kinds[MASTER] + kinds[OPTIMIZER]) + kinds[WEIGHTS]
        seconds = self.card.seconds(traced.work.flops, traced.work.bytes_moved + traffic, traced.work.launches)
        return Need(
            memory, checkpointing, fused, batch_size, CONTEXT_BYTES + self.card.workspace + allocated + slack, held,
            traced.transient, others, traced.peak.during,
            {**kinds, **{kind: traced.peak.kinds[kind] for kind in (GRADIENTS, ACTIVATIONS, TEMPORARY)}},
            None if seconds is None else self._num_micro * batch_size / seconds,
        )  # fmt: skip

    def fits(self, need: Need) -> bool:
        return need.needed <= self.budget

    def checkpointings(self) -> tuple[str, ...]:
        wanted = self.config.train.checkpointing
        return MODES if wanted == "auto" else (wanted,)

    def choose(self) -> Need | None:
        """Return the best way that fits of those the config leaves, or None."""
        ways = ((memory, how) for memory in self.memory_modes() for how in self.checkpointings())
        return next((need for way in ways if self.fits(need := self.need(*way, self.batch_size))), None)

    def what_would_fit(self) -> Need | None:
        """Return the way that fits with the fewest changes: any mode, then the step inside backward, then smaller batches."""
        can_fuse = self.config.optimizer.name == "adamw8bit"
        sizes = [n for n in sorted({1, 2, 4, 8, self.batch_size}, reverse=True) if n <= self.batch_size]
        for size in sizes:
            for fused in dict.fromkeys((self.config.optimizer.fused_backward, can_fuse)):
                for memory in self.memory_modes("auto"):
                    for how in MODES:
                        need = self.need(memory, how, size, fused)
                        if self.fits(need):
                            return need
        return None

    def least(self) -> Need:
        """Return the way that takes the least of all."""
        fused = self.config.optimizer.name == "adamw8bit"
        return min(
            (self.need(m, how, 1, fused) for m in self.memory_modes("auto") for how in MODES), key=lambda n: n.needed
        )

    def refusal(self) -> str:
        """Return why the config fits in no way it leaves, and what would."""
        smallest = min(
            (self.need(m, how, self.batch_size) for m in self.memory_modes() for how in self.checkpointings()),
            key=lambda need: need.needed,
        )
        where = f"{self.card.name} has {self.budget / GIB:.2f} GiB for it"
        if self.budget < GIB * self.card.usable_gib:
            where = f"memory.limit_gib allows {self.budget / GIB:.2f} GiB"
        found = self.what_would_fit()
        if found is None:
            least = self.least()
            fix = f"the least that any plan needs is {least.needed / GIB:.2f} GiB, with {least.settings()}"
        else:
            fix = f"{found.needed / GIB:.2f} GiB would do with {found.settings()}"
        return f"this run needs {smallest.needed / GIB:.2f} GiB at batch size {smallest.batch_size}, and {where}; {fix}"

    def table(self) -> dict:
        """Return the plan as plain values: every way, and the chosen one."""
        sizes = sorted({*BATCH_SIZES, self.batch_size})
        modes = self.memory_modes("auto") if self.config.optimizer.memory == "auto" else self.memory_modes()
        needs = [self.need(memory, how, size) for memory in modes for how in MODES for size in sizes]
        chosen = self.choose()
        return {
            "card": self.card.name,
            "budget_bytes": self.budget,
            "precision": PRECISIONS[self.dtype],
            "latents": list(self.latents),
            "batch_size": self.batch_size,
            "rates_known": self.card.tflops is not None,
            "ways": [{**asdict(need), "fits": self.fits(need)} for need in needs],
            "chosen": None if chosen is None else asdict(chosen),
            "refusal": self.refusal() if chosen is None else "",
        }
