"""What a run will need, before it starts: exact static bytes, steps, disk. The rest is traced (trainer/memory_plan/estimator.py).

What a run on a GPU takes of the machine's own memory, beside Python and its libraries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.data.buckets import Bucket, make_buckets, nearest_bucket
from safelight.data.manifest import Photo, read_manifest, split_validation
from safelight.kernels.optim.paged_state import state_bytes
from safelight.kernels.unet import patch
from safelight.kernels.unet.activation_offload import SLAB_BYTES
from safelight.kernels.unet.attention import attention_cases, choose_attention
from safelight.trainer.checkpoint.snapshot import SNAPSHOT_SLAB_BYTES
from safelight.trainer.config.timeline import Timeline, steps_of_counts
from safelight.trainer.config.toml import Config
from safelight.trainer.models.base import bucket_multiple, latent_factor, resolve_model, vae_config
from safelight.trainer.models.device import PRECISIONS, pick_device, pick_dtype
from safelight.trainer.models.weights import meta_unet
from safelight.trainer.optim.kernel_adamw import part_of
from safelight.trainer.optim.optimizer import memory_mode


@dataclass(frozen=True)
class HostBytes:
    """states: optimizer state that streams past the GPU; activations: offloaded; snapshot: of a checkpoint that is written; all
    three pinned. autoencoder: waits to decode. loading: at the peak of loading, the fp32 UNet and what it becomes here."""

    states: int
    activations: int
    snapshot: int
    autoencoder: int
    loading: int

    @property
    def training(self) -> int:
        return self.states + self.activations + self.snapshot + self.autoencoder

    @property
    def most(self) -> int:
        return max(self.training, self.loading)


def _chunks(num_bytes: int, chunk: int) -> int:
    return -(-num_bytes // chunk) * chunk


def host_bytes(
    sizes: Sequence[int],
    itemsize: int,
    optimizer: str,
    memory: str,
    has_average: bool,
    paged: int,
    offloaded: int,
    autoencoder: int,
) -> HostBytes:
    """Return the host memory of a run. sizes: elements of each parameter; itemsize: of a weight; paged, offloaded: bytes there."""
    num = sum(sizes)
    beside = BESIDE_BYTES[memory] if itemsize < 4 else 0
    saved = (itemsize + beside + 4 * has_average) * num + sum(moment_bytes(n, optimizer) for n in sizes)
    return HostBytes(
        paged, _chunks(offloaded, SLAB_BYTES), _chunks(saved, SNAPSHOT_SLAB_BYTES), autoencoder, 4 * num + paged
    )


# blocks of 256 with one fp32 scale each, tensors under 4,096 elements keep fp32 moments: bitsandbytes' and ours alike
BLOCK_SIZE = 256
MIN_8BIT_SIZE = 4096
BESIDE_BYTES = {"fp32": 4, "exact": 2, "near": 1, "rounded": 0, "paged": 2}
# for a run whose dataset is not there yet
ASSUMED_STEPS = 1000


@dataclass(frozen=True)
class StaticBytes:
    """Bytes that stay for the whole run, or come back every step (gradients).

    master: what stands beside 16-bit weights, by optimizer.memory; paged: of master and moments, what lives in host memory. Our optimizer reads 16-bit gradients; for the others each
    is freed as its fp32 copy is made, so the two never stand side by side. gradients: stepped inside backward, those of the
    largest part.
    """

    num_parameters: int
    num_tensors: int
    precision: str
    memory: str
    weights: int
    master: int
    moments: int
    average: int
    gradients: int
    master_gradients: int
    paged: int = 0

    @property
    def total(self) -> int:
        """What stays on the device, and the larger of the two phases of the gradients."""
        return self.checkpoint - self.paged + max(self.gradients, self.master_gradients)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint on disk; a 16-bit weight and what stands beside it both go in."""
        return self.weights + self.master + self.moments + self.average


def moment_bytes(numel: int, optimizer: str) -> int:
    """Return the bytes of both moments of a tensor, its block scales included."""
    if optimizer != "adamw" and numel >= MIN_8BIT_SIZE:
        return 2 * (numel + 4 * -(-numel // BLOCK_SIZE))
    return 2 * 4 * numel


def static_bytes(config: Config, device: torch.device | None = None, dtype: torch.dtype | None = None) -> StaticBytes:
    """Return the exact bytes of weights, master, moments and gradients of a run. Loads no weights.

    device, dtype: where and in what it trains; what the config says of this machine if None.
    """
    device = device or pick_device(config.run.device)
    dtype = dtype or pick_dtype(config.model.precision, device)
    unet = meta_unet(resolve_model(config.model))
    if patch.should_patch(config.train.kernels, device):
        first = next(unet.parameters())
        patch.apply(unet, choose_attention(first.device, dtype, attention_cases(unet), setting="sdpa"))
    shared = patch.shared_projections(unet)
    named = {name: p.numel() for name, p in unet.named_parameters()}
    sizes = list(named.values())
    in_flight: dict[str, int] = {}
    for name, size in named.items():
        part = (shared.get(name) or part_of(name)) if config.optimizer.is_fused else ""
        in_flight[part] = in_flight.get(part, 0) + size
    num = sum(sizes)
    is_16_bit = dtype != torch.float32
    memory = memory_mode(config.optimizer, dtype)
    return StaticBytes(
        num_parameters=num,
        num_tensors=len(sizes),
        precision=PRECISIONS[dtype],
        weights=num * dtype.itemsize,
        memory=memory,
        master=BESIDE_BYTES[memory] * num if is_16_bit else 0,
        moments=sum(moment_bytes(size, config.optimizer.name) for size in sizes),
        average=4 * num if config.train.ema_decay > 0 else 0,
        gradients=max(in_flight.values()) * dtype.itemsize,
        master_gradients=4 * num if is_16_bit and config.optimizer.name != "adamw8bit" else 0,
        paged=sum(sum(state_bytes(size).values()) for size in sizes if size >= MIN_8BIT_SIZE)
        if memory == "paged"
        else 0,
    )


def buckets_of(config: Config) -> tuple[Bucket, ...]:
    """Return the run's buckets. Raises UserError, one line, where the resolution makes none for the model."""
    base = resolve_model(config.model)
    multiple = bucket_multiple(base, latent_factor(vae_config(base, config.model.vae)))
    return make_buckets(config.data.resolution, multiple, config.data.max_aspect)


def timeline_of(config: Config, photos: Sequence[Photo], buckets: Sequence[Bucket]) -> Timeline:
    """Return the timeline of a run over its training photographs."""
    counts = Counter(nearest_bucket(photo.width, photo.height, buckets) for photo in photos).values()
    stages = tuple(config.stages())
    steps = tuple(steps_of_counts(counts, s.batch_size, s.accumulate) for s in stages)
    return Timeline(stages, steps, config.train.max_steps)


def learning_rates(config: Config) -> tuple[list[float], bool]:
    """Return each step's learning rate, and whether they are assumed: 1,000 steps of the first stage without a dataset."""
    folder = Path(config.data.path)
    if not (folder / "manifest.jsonl").is_file():
        stage = config.stages()[0]
        stage.epochs = 1
        num = config.train.max_steps or ASSUMED_STEPS
        timeline = Timeline((stage,), (num,), num)
        return [timeline.learning_rate(0, step) for step in range(num)], True
    train, _ = split_validation(read_manifest(folder), config.data.validation_fraction, config.run.seed)
    timeline = timeline_of(config, train, buckets_of(config))
    rates: list[float] = []
    for epoch in range(timeline.num_epochs):
        per_epoch = timeline.stage_steps_per_epoch[timeline.stage_of(epoch)]
        rates += [timeline.learning_rate(epoch, step) for step in range(per_epoch)]
    return rates[: timeline.num_steps], False


def cache_bytes(config: Config, num_photos: int) -> int:
    """Return the bytes of cached latents of `num_photos` at the full pixel budget, all variants."""
    vae = vae_config(resolve_model(config.model), config.model.vae)
    # a posterior is kept as mean and logvar; AutoencoderTiny has none
    is_tiny = vae["_class_name"] == "AutoencoderTiny"
    channels = vae["latent_channels"] * (1 if is_tiny else 2)
    factor = latent_factor(vae)
    itemsize = {"float16": 2, "float32": 4}[config.data.cache_dtype]
    return num_photos * config.data.variants * channels * (config.data.resolution // factor) ** 2 * itemsize


def table(config: Config, device: torch.device | None = None, dtype: torch.dtype | None = None) -> dict:
    """Return the plan as plain values: bytes by part, and the run's length if its dataset is prepared."""
    buckets = buckets_of(config)
    static = static_bytes(config, device, dtype)
    result: dict = {
        "base": config.model.base,
        "dataset path": config.data.path,
        "precision": static.precision,
        "optimizer": config.optimizer.name,
        "optimizer_memory": static.memory,
        "unet_parameters": static.num_parameters,
        "unet_tensors": static.num_tensors,
        "bytes": {
            "weights": static.weights,
            "fp32 master" if static.memory == "fp32" else "remainders": static.master,
            "Adam moments": static.moments,
            **({"moving average": static.average} if static.average else {}),
            "gradients": static.gradients,
            "fp32 gradients (after those)": static.master_gradients,
            **({"of these in host memory": static.paged} if static.paged else {}),
            "peak of these": static.total,
        },
        "checkpoint bytes": static.checkpoint,
        # the newest is written before the oldest is deleted, and the best is kept beside them
        "checkpoints at most": config.save.keep + 2,
    }
    if (Path(config.data.path) / "manifest.jsonl").is_file():
        photos = read_manifest(Path(config.data.path))
        train, validation = split_validation(photos, config.data.validation_fraction, config.run.seed)
        epochs = sum(stage.epochs for stage in config.stages())
        result["dataset"] = {
            "photographs": len(photos),
            "train": len(train),
            "validation": len(validation),
            "epochs": epochs,
            "steps": timeline_of(config, train, buckets).num_steps,
            "images trained": epochs * len(train),
            "cache bytes": cache_bytes(config, len(photos)),
        }
    return result
