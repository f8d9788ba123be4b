"""The workload of the step benchmarks: a base model, random cached rows of its shapes, and our training step.

Letters in shapes: B batch; C latent channels; H, W latent height and width; T tokens; D embedding.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from safelight.data.batches import Batch, RowSource, iterate
from safelight.data.buckets import Bucket
from safelight.data.cache import Cache, Crop, Sample
from safelight.data.epochs import plan_epoch
from safelight.data.photo import Photo
from safelight.errors import UserError
from safelight.kernels.unet.attention import (
    NUM_TEXT_TOKENS,
    AttentionChoice,
    apply_attention,
    attention_cases,
    choose_attention,
)
from safelight.trainer.config.schema import Config, Loss, Optimizer
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.families.registry import family_of
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.device import PRECISIONS, pick_device, pick_dtype
from safelight.trainer.models.weights import load_unet
from safelight.trainer.step.cuda_graphs import Recorder, StepGraphs, shape_of
from safelight.trainer.step.host_allocator import keep_freed_memory
from safelight.trainer.step.prepare_unet import prepare_unet
from safelight.trainer.step.step import Inputs, MicroResult, StepContext, StepSettings, micro_step, train_step, upload
from safelight.trainer.step.torch_flags import torch_flags

SEED = 1
NUM_ROTATED = 4
ROWS_AT_ONCE = 256
LR, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-6, 0.01, 1.0


@dataclass(frozen=True)
class Workload:
    """The settings that our step and every baseline share."""

    base: str = "tiny"
    latent_size: int = 0
    batch_size: int = 1
    precision: str = "auto"
    optimizer: str = "adamw8bit"
    checkpointing: str = "none"
    device: str = "auto"

    def resolved(self) -> Workload:
        """Return a copy with `auto` and 0 replaced. Raises UserError for a device or dtype this machine lacks."""
        device = pick_device(self.device)
        side = self.latent_size or resolve_base(self.base).config_of("unet")["sample_size"]
        return replace(
            self, latent_size=side, precision=PRECISIONS[pick_dtype(self.precision, device)], device=device.type
        )

    @property
    def dtype(self) -> torch.dtype:
        return pick_dtype(self.precision, torch.device(self.device))


def random_rows(num: int, base: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (posteriors (N, 2C, H, W), embeddings (N, T, D)) with a base's shapes, float32."""
    config = resolve_base(base).config_of("unet")
    generator = np.random.default_rng(SEED)
    posterior = generator.standard_normal((num, 2 * config["in_channels"], side, side), np.float32)
    posterior[:, config["in_channels"] :] -= 4
    return posterior, generator.standard_normal((num, NUM_TEXT_TOKENS, config["cross_attention_dim"]), np.float32)


def stand_in(base: str, side: int) -> Callable[[torch.Tensor], TextConditioning]:
    """Return a function from text embeddings to the conditioning of a base's family, for side x side latents."""
    config = resolve_base(base).config_of("unet")
    return lambda text: family_of(config).stand_in_conditioning(config, text, (side, side))


def random_batches(num: int, work: Workload) -> list[Batch]:
    """Return `num` different batches of random rows."""
    batches, condition = [], stand_in(work.base, work.latent_size)
    posterior, text = (torch.from_numpy(x) for x in random_rows(num * work.batch_size, work.base, work.latent_size))
    for number in range(num):
        part = slice(number * work.batch_size, (number + 1) * work.batch_size)
        mean, logvar = (half.contiguous() for half in posterior[part].chunk(2, dim=1))
        ids = tuple(range(part.start, part.stop))
        side = 8 * work.latent_size
        batches.append(Batch(mean, logvar, condition(text[part]), ids, (0,) * work.batch_size, Bucket(side, side)))
    return batches


def random_samples(num: int, side: int) -> list[Sample]:
    """Return samples as a prepared dataset has them, with their numbers as cache keys."""
    bucket = Bucket(8 * side, 8 * side)
    crop = Crop((0, 0, 8 * side, 8 * side), False)
    return [
        Sample(
            Photo(f"{n}.png", f"{n:064x}"[::-1], 8 * side, 8 * side, ("",), "random", "random"),
            bucket,
            (f"latent-{n}",),
            (f"text-{n}",),
            (crop,),
            ("",),
        )
        for n in range(num)
    ]


def fill_random_cache(path: Path, num: int, base: str, side: int) -> list[Sample]:
    """Fill a cache with random rows and return their samples. Contents repeat every ROWS_AT_ONCE rows."""
    samples = random_samples(num, side)
    posterior, text = random_rows(min(num, ROWS_AT_ONCE), base, side)
    with Cache(path) as cache:
        for start in range(0, num, ROWS_AT_ONCE):
            part = samples[start : start + ROWS_AT_ONCE]
            cache.append("posterior", [s.latent_keys[0] for s in part], posterior[: len(part)])
            cache.append("text", [s.text_keys[0] for s in part], text[: len(part)])
        cache.append("text", ["text-empty"], text[:1])
    return samples


@contextmanager
def cached_batches(work: Workload, num: int) -> Iterator[Iterator[Batch]]:
    """Yield an endless iterator of batches, read from a cache of `num` random rows by the loader of training."""
    with tempfile.TemporaryDirectory() as folder:
        samples = fill_random_cache(Path(folder), num, work.base, work.latent_size)

        def endless(cache: Cache) -> Iterator[Batch]:
            condition = stand_in(work.base, work.latent_size)
            epoch, rows = 0, RowSource(cache, samples, "text-empty", lambda text_BTD, _: condition(text_BTD))
            while True:
                plan = plan_epoch(samples, seed=SEED, epoch=epoch, batch_size=work.batch_size, caption_dropout=0.05)
                # skip the last, smaller batch: all timed steps have the same shapes
                yield from iterate(rows, [b for b in plan if len(b.refs) == work.batch_size])
                epoch += 1

        with Cache(Path(folder)) as cache:
            batches = endless(cache)
            try:
                yield batches
            finally:
                batches.close()


# the bases of `bench all`: SD1.5, SD2.1 and SDXL take 17 GB of host memory in fp32
@functools.lru_cache(maxsize=3)
def _pristine(base: str) -> nn.Module:
    return load_unet(resolve_base(base), SEED)


def host_unet(base: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a base's UNet in host memory, in training mode. device: where it is going to train.

    For a GPU the bases are cached in host memory, because drawing their random weights takes longer than a measurement.
    """
    if device.type == "cpu":
        return load_unet(resolve_base(base), SEED, dtype).train()
    return copy.deepcopy(_pristine(base)).to(dtype).train()


def initial_unet(base: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a base's UNet on the device, in training mode."""
    return host_unet(base, device, dtype).to(device)


def optimizer_config(name: str) -> Optimizer:
    """Return the [optimizer] config of a name, or of name and memory mode: `adamw8bit, exact`.

    Raises UserError for an unknown one.
    """
    try:
        return Optimizer(**dict(zip(("name", "memory"), re.split(", ?", name), strict="," in name)))
    except ValueError:
        raise UserError(
            f"unknown optimizer {name!r}; use a name of [optimizer], or name and memory mode as in 'adamw8bit, near'"
        ) from None


def config_of(work: Workload, kernels: str = "auto", fused: bool = False, adapter: dict | None = None) -> Config:
    """Return the config of a run that takes the workload's steps, without samples and validation.

    kernels: as train.kernels. fused: optimizer step inside backward. adapter: the settings of [adapter].
    """
    optimizer = optimizer_config(work.optimizer)
    side = 8 * work.latent_size
    return Config(
        model={"base": work.base, "precision": work.precision},
        # one bucket, the workload's
        data={"max_aspect": 1.0, **({"resolution": side} if side else {})},
        # memory mode streamed always steps inside backward
        optimizer=optimizer.model_copy(update={"fused_backward": fused or optimizer.is_fused}),
        train={"batch_size": work.batch_size, "checkpointing": work.checkpointing, "kernels": kernels},
        adapter=adapter or {},
        sample={"every_epochs": 0},
        validate={"every_epochs": 0},
    )


class Ours:
    """The training step of `safelight train`. notes: which attention and kernels it actually uses.

    kernels, fused, adapter: as for config_of. cudnn_benchmark: as train.cudnn_benchmark. recorder: if given, steps are
    captured as CUDA graphs at the first batch of each size and replayed.
    """

    def __init__(
        self,
        work: Workload,
        kernels: str = "auto",
        fused: bool = False,
        recorder: Recorder | None = None,
        cudnn_benchmark: bool = False,
        adapter: dict | None = None,
    ):
        device = torch.device(work.device)
        if device.type == "cpu":
            keep_freed_memory()
        # weights move to a GPU as in training, one tensor at a time: all in fp32 would be the peak of the small modes
        self.unet = host_unet(work.base, device)
        choice, config = attention_of(self.unet, work), config_of(work, kernels, fused, adapter)
        prepared = prepare_unet(self.unet, config, choice, device, work.dtype)
        self.trained, self.optimizer = prepared.trained, prepared.optimizer
        parts = (choice, "kernels off" if prepared.patched is None else prepared.patched, self.trained.describe())
        self.notes = "; ".join(filter(None, map(str, parts)))
        schedule = resolve_base(work.base).noise_schedule().to(device)
        self.context = StepContext(self.unet, self.optimizer, schedule, 1.0, Loss())
        self._recorder, self._cudnn_benchmark = recorder, cudnn_benchmark
        self._graphs: dict[int, StepGraphs] = {}

    def _graphs_of(self, batch: Batch) -> StepGraphs | None:
        """Return the graphs that replay a step of this batch's size, capturing a missing one; None without graphs."""
        if self._recorder is None:
            return None
        size = len(batch.sample_ids)
        if size not in self._graphs:

            def run(inputs: Inputs, is_first: bool, is_last: bool) -> MicroResult:
                return micro_step(self.context, inputs, size, is_first, is_last)

            self._graphs[size] = StepGraphs(run, self.optimizer, self._recorder)
        inputs = upload(batch, self.context.device, SEED, 0)
        self._graphs[size].prepare([shape_of(inputs)], inputs)
        return self._graphs[size]

    def step(self, batch: Batch) -> torch.Tensor:
        """Train on a batch and return its mean loss on the device."""
        with torch_flags(cudnn_benchmark=self._cudnn_benchmark), separate_cudnn_cache(self._cudnn_benchmark):
            settings = StepSettings(len(batch.sample_ids), LR, WEIGHT_DECAY, MAX_GRAD_NORM)
            result = train_step(self.context, [batch], settings, seed=SEED, epoch=0, graphs=self._graphs_of(batch))
        return result.losses.mean()


@contextmanager
def separate_cudnn_cache(enabled: bool) -> Iterator[None]:
    """Use a separate cache of cuDNN's algorithm choices inside the block, so that cudnn.benchmark starts afresh.

    Torch caches the choice by shape and by allow_tf32, so flipping allow_tf32 selects other entries; 16-bit
    convolutions ignore it otherwise.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before != enabled
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def attention_of(unet: nn.Module, work: Workload) -> AttentionChoice:
    """Return the attention that a training run would choose."""
    cases = attention_cases(unet, (work.latent_size, work.latent_size))
    return choose_attention(torch.device(work.device), work.dtype, cases, batch=work.batch_size)


def use_attention(unet: nn.Module, work: Workload) -> AttentionChoice:
    """Apply the attention that a training run would choose, and return the choice."""
    choice = attention_of(unet, work)
    apply_attention(unet, choice)
    return choice


def use_diffusers_attention(unet: nn.Module) -> str:
    """Apply the default attention of diffusers' training scripts, its SDPA processor, and return a description."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor(AttnProcessor2_0())
    return "attention: diffusers' AttnProcessor2_0, SDPA backend chosen by torch"
