"""What can be computed about a run without tracing it: static device memory, host memory, steps, learning rates, disk.

The memory of activations and temporaries comes from a trace (estimator.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import nn

from safelight.data.buckets import Bucket
from safelight.data.epochs import count_uses
from safelight.data.manifest import has_manifest, read_manifest
from safelight.data.photo import Photo
from safelight.data.placement import Placement
from safelight.errors import UserError
from safelight.kernels.moment_blocks import MIN_8BIT_ELEMENTS
from safelight.kernels.ops.quantized_weight import quantizable_layers, quantized_bytes
from safelight.kernels.optim.paged_state import state_bytes
from safelight.kernels.unet import patch
from safelight.kernels.unet.activation_offload import SLAB_BYTES
from safelight.kernels.unet.attention import NUM_TEXT_TOKENS, attention_cases, choose_attention
from safelight.kernels.unet.weight_streaming import streamed_blocks
from safelight.trainer.adapters.trained import trained_dtype, trained_of
from safelight.trainer.checkpoint.snapshot import SNAPSHOT_SLAB_BYTES
from safelight.trainer.config.schema import Config
from safelight.trainer.config.schema import Optimizer as OptimizerConfig
from safelight.trainer.config.timeline import StageSteps, Timeline
from safelight.trainer.inference.prompt_file import check_prompts, prompts_of
from safelight.trainer.memory_plan.plan_cache import PlanCache, checked_int, checked_table, checked_text
from safelight.trainer.models.base import Base, check_vae, latent_factor, resolve_model, vae_config
from safelight.trainer.models.class_photos import has_own_scale, is_class_image, split_photos, stand_ins
from safelight.trainer.models.device import PRECISIONS, pick_device, pick_dtype
from safelight.trainer.models.placing import Placed, budgets_of, crop_loss, once_each, place
from safelight.trainer.models.timesteps import timestep_range
from safelight.trainer.models.weights import meta_texts, meta_unet
from safelight.trainer.optim.base import part_of
from safelight.trainer.optim.optimizer import memory_mode
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS, Shape
from safelight.trainer.step.text_training import mark

# steps of a run whose dataset does not exist yet
ASSUMED_STEPS = 1000


@dataclass(frozen=True)
class StaticBytes:
    """Device memory allocated for the whole run, and gradients, which are allocated again in every step.

    master: what optimizer.memory keeps in addition to 16-bit weights; paged: how much of master and moments is in
    host memory; streamed: how much of the weights is. num_parameters: of the UNet, its adapter included; num_trained:
    how many of them are trained; frozen ones have no master, moments, average or gradients. saved_weights: those in a
    checkpoint, which has no frozen ones if it holds an adapter. gradients: with a fused step, those of the largest part
    of the UNet. master_gradients: fp32 copies for an optimizer that cannot read 16-bit gradients; each gradient is
    freed when its copy is made, so both never exist at once. text_weights, text_moments, text_gradients: of the text
    encoders, in fp32, if they are trained; num_text_parameters: how many of them are. frozen_text: their weights if a
    word is trained, whose gradients pass through them.
    """

    num_parameters: int
    num_tensors: int
    num_trained: int
    precision: str
    memory: str
    weights: int
    saved_weights: int
    master: int
    moments: int
    average: int
    gradients: int
    master_gradients: int
    paged: int = 0
    streamed: int = 0
    num_text_parameters: int = 0
    text_weights: int = 0
    text_moments: int = 0
    text_gradients: int = 0
    frozen_text: int = 0

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Return what `asdict` gave. Raises ValueError for anything else."""
        texts = {"precision": tuple(PRECISIONS.values()), "memory": tuple(MEMORY_MODES)}
        table = checked_table(values, {field.name for field in fields(cls)})
        return cls(
            **{name: checked_text(x, texts[name]) if name in texts else checked_int(x) for name, x in table.items()}
        )

    @property
    def total(self) -> int:
        """The peak on the device: everything kept, plus gradients or their fp32 copies, whichever are larger."""
        held = self.checkpoint - self.saved_weights + self.weights + self.frozen_text - self.paged - self.streamed
        return held + max(self.gradients, self.master_gradients) + self.text_gradients

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint on disk, which holds both the 16-bit weights and their master or remainders."""
        kept = self.saved_weights + self.master + self.moments + self.average
        return kept + self.text_weights + self.text_moments


def static_bytes(config: Config, device: torch.device | None = None, dtype: torch.dtype | None = None) -> StaticBytes:
    """Return the exact bytes of weights, master, moments and gradients of a run. Loads no weights.

    device, dtype: None for what the config selects on this machine.
    """
    device = device or pick_device(config.run.device)
    dtype = dtype or pick_dtype(config.model.precision, device)
    base = resolve_model(config.model)
    cache = PlanCache({**planned_inputs(config, base), "device": device.type, "dtype": PRECISIONS[dtype]})
    make = partial(_static_bytes, config, base, device, dtype)
    found = cache.remembered("static", make, asdict, StaticBytes.from_json)
    cache.save()
    return found


def planned_inputs(config: Config, base: Base) -> dict:
    """Return the settings and the configs of a base that a plan depends on, as plain values."""
    settings = config.model_dump(mode="json")
    # neither takes memory or time
    settings["run"] = {name: x for name, x in settings["run"].items() if name not in ("dir", "title", "notes")}
    configs = {part: base.config_of(part) for part in ("unet", "scheduler")}
    if config.reads_captions_in_step:
        configs |= {part: base.config_of(part) for part in base.family.text_encoders}
        configs["zeroes empty text"] = base.zeroes_empty_text
    return {"config": settings, "base": {**configs, "vae": vae_config(base, config.model.vae)}}


def _static_bytes(config: Config, base: Base, device: torch.device, dtype: torch.dtype) -> StaticBytes:
    unet = meta_unet(base)
    if patch.should_patch(config.train.kernels, device):
        first = next(unet.parameters())
        patch.apply(unet, choose_attention(first.device, dtype, attention_cases(unet), setting="sdpa"))
    trained = trained_of(unet, config)
    trained.mark()
    shared = patch.shared_projections(unet)
    shapes = {name: tuple(p.shape) for name, p in trained.module.named_parameters() if p.requires_grad}
    sizes = [math.prod(shape) for shape in shapes.values()]
    optimizer, own_dtype = config.trained_optimizer, trained_dtype(config, dtype)
    in_flight: dict[str, int] = {}
    for name, shape in shapes.items():
        part = (shared.get(name) or part_of(name)) if optimizer.is_fused else ""
        in_flight[part] = in_flight.get(part, 0) + math.prod(shape)
    num, num_parameters = sum(sizes), sum(p.numel() for p in unet.parameters())
    format = config.adapter.quantized_base
    quantized = [layer.weight.numel() for layer in quantizable_layers(unet)] if format else []
    num_dense = num_parameters - sum(quantized)
    # what is trained beside the UNet is held, too
    beside = num if trained.module is not unet else 0
    is_16_bit = own_dtype != torch.float32
    memory, spec = memory_mode(optimizer, own_dtype), OPTIMIZERS[optimizer.name]
    return StaticBytes(
        num_parameters=num_parameters,
        num_tensors=len(list(unet.parameters())),
        num_trained=num,
        precision=PRECISIONS[dtype],
        weights=num_dense * dtype.itemsize
        + sum(quantized_bytes(n, format) for n in quantized)
        + beside * own_dtype.itemsize,
        saved_weights=sum(x.numel() for x in trained.tensors().values()) * own_dtype.itemsize,
        memory=memory,
        master=MEMORY_MODES[memory].bytes_per_weight * num if is_16_bit else 0,
        moments=sum(spec.moment_bytes(shape, optimizer) for shape in shapes.values()),
        average=4 * num if config.train.ema_decay > 0 else 0,
        gradients=max(in_flight.values()) * own_dtype.itemsize,
        master_gradients=4 * num if is_16_bit and not spec.reads_16bit_gradients else 0,
        paged=sum(sum(state_bytes(size, optimizer.moments).values()) for size in sizes if size >= MIN_8BIT_ELEMENTS)
        if MEMORY_MODES[memory].pages_state
        else 0,
        streamed=_streamed_bytes(unet, dtype) if MEMORY_MODES[memory].streams_weights else 0,
        **_text_bytes_of(config, base),
    )


def _text_bytes_of(config: Config, base: Base) -> dict[str, int]:
    """Return the fields of StaticBytes about the text encoders, which are held if captions are read in the step."""
    if not config.reads_captions_in_step:
        return {}
    parts = meta_texts(base).values()
    if not config.text_encoder.train:
        return {"frozen_text": 4 * sum(p.numel() for part in parts for p in part.parameters())}
    mark(base.family, parts, config.model.clip_skip, config.text_encoder.last_layers)
    parameters = [p for part in parts for p in part.parameters()]
    trained = [tuple(p.shape) for p in parameters if p.requires_grad]
    num = sum(map(math.prod, trained))
    return {
        "num_text_parameters": num,
        "text_weights": 4 * sum(p.numel() for p in parameters),
        "text_moments": sum(
            OPTIMIZERS[config.optimizer.name].moment_bytes(shape, config.optimizer) for shape in trained
        ),
        "text_gradients": 4 * num,
    }


def _streamed_bytes(unet: nn.Module, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(p.numel() for _, weights in streamed_blocks(unet) for p in weights)


@dataclass(frozen=True)
class HostBytes:
    """Host memory of a run on a GPU, in addition to Python and its libraries.

    states: optimizer state that streams to the GPU; weights: those that do; activations: offloaded ones; snapshot: of a
    checkpoint while it is written; these four are pinned. autoencoder: kept until samples are decoded. loading: peak
    while loading, which holds the fp32 UNet, the states and the weights.
    """

    states: int
    weights: int
    activations: int
    snapshot: int
    autoencoder: int
    loading: int


def host_bytes(
    shapes: Sequence[Shape],
    itemsize: int,
    optimizer: OptimizerConfig,
    memory: str,
    has_average: bool,
    paged: int,
    streamed: int,
    offloaded: int,
    autoencoder: int,
    num_loaded: int,
    num_saved: int,
    text: int = 0,
) -> HostBytes:
    """Return the host memory of a run.

    shapes: of the trained weights; itemsize: of all; num_loaded, num_saved: how many weights the UNet and a checkpoint
    have; paged, streamed, offloaded, autoencoder: bytes of paged optimizer state, streamed
    weights, offloaded activations and the fp32 autoencoder. text: what a checkpoint holds of the text encoders.
    """
    num = sum(map(math.prod, shapes))
    master = MEMORY_MODES[memory].bytes_per_weight if itemsize < 4 else 0
    moments = sum(OPTIMIZERS[optimizer.name].moment_bytes(shape, optimizer) for shape in shapes)
    saved = text + itemsize * num_saved + (master + 4 * has_average) * num + moments
    activations, snapshot = _in_slabs(offloaded, SLAB_BYTES), _in_slabs(saved, SNAPSHOT_SLAB_BYTES)
    return HostBytes(paged, streamed, activations, snapshot, autoencoder, loading=4 * num_loaded + paged + streamed)


def _in_slabs(num_bytes: int, slab: int) -> int:
    return -(-num_bytes // slab) * slab


def placed_photos(config: Config) -> Placed | None:
    """Return the run's photographs in their buckets, None if its dataset is not prepared.

    Raises UserError if a resolution allows no bucket for the model, or if no photograph is large enough.
    """
    folder = Path(config.data.path)
    if not has_manifest(folder):
        return None
    budgets = _budgets(config)
    split = split_photos(config, budgets, read_manifest(folder), partial(stand_ins, config))
    return place(config, budgets, *split)


def _budgets(config: Config) -> list[tuple[Bucket, ...]]:
    base = resolve_model(config.model)
    return budgets_of(base, config.data, latent_factor(vae_config(base, config.model.vae)))


def planned_timeline(config: Config, ended: Sequence[tuple[int, int]] = ()) -> Timeline | None:
    """Return the timeline of a run, None if its dataset is not prepared. ended: as `Timeline.of` takes it."""
    placed = placed_photos(config)
    return Timeline.of(config, placed.train, ended) if placed else None


def learning_rates(config: Config) -> tuple[list[float], bool]:
    """Return each step's learning rate, and whether their number is assumed.

    Without a dataset: ASSUMED_STEPS steps of the first stage, or train.max_steps.
    """
    timeline = planned_timeline(config)
    if timeline is None:
        stage = config.stages()[0]
        stage.epochs = 1
        num = config.train.max_steps or ASSUMED_STEPS
        timeline = Timeline((stage,), (StageSteps(1, (num,)),), num)
        return [timeline.learning_rate(0, step) for step in range(num)], True
    rates: list[float] = []
    for epoch in range(timeline.num_epochs):
        rates += [timeline.learning_rate(epoch, step) for step in range(timeline.steps_of(epoch))]
    return rates[: timeline.num_steps], False


def num_masks(config: Config, placed: Sequence[Placement]) -> int:
    """Return how many of the placed photos have a mask that has an effect."""
    return 0 if config.loss.mask_weight == 1 else sum(bool(one.photo.mask) for one in once_each(placed))


def has_masks(config: Config) -> bool:
    """Return whether a run's batches have masks; False if its dataset is not prepared."""
    placed = placed_photos(config)
    return placed is not None and num_masks(config, placed.train) > 0


def num_batch_ids(config: Config) -> int:
    """Return how many different batch ids a run's photographs have; 0 if its dataset is not prepared."""
    placed = placed_photos(config)
    return len({one.photo.settings.batch_id for one in placed.train} - {""}) if placed else 0


def cache_bytes(config: Config, num_photos: int, num_masks: int = 0) -> int:
    """Return an upper bound of the bytes of cached latents and masks: all variants at every resolution."""
    vae = vae_config(resolve_model(config.model), config.model.vae)
    # AutoencoderKL's posterior is cached as mean and logvar; AutoencoderTiny has a latent only
    is_tiny = vae["_class_name"] == "AutoencoderTiny"
    channels = vae["latent_channels"] * (1 if is_tiny else 2)
    factor = latent_factor(vae)
    num_latents = sum((resolution // factor) ** 2 for resolution in config.data.resolutions)
    itemsize = {"float16": 2, "float32": 4}[config.data.cache_dtype]
    return (num_photos * channels + num_masks) * config.data.variants * num_latents * itemsize


def text_bytes(config: Config, photos: Iterable[Photo]) -> int:
    """Return an upper bound of the bytes of cached embeddings: every caption, with tags in every order, and prompts."""
    base, data = resolve_model(config.model), config.data
    num = sum(len(photo.captions) * (data.caption_variants if photo.tags else 1) for photo in photos)
    num *= max(1, len(config.caption_templates))
    # the empty caption and the negative prompt
    num += 2 + config.sample.num_prompts
    if (prompts := prompts_of(config)) is not None:
        num += len(prompts) + sum(prompt.negative_prompt is not None for prompt in prompts) - config.sample.num_prompts
    num_tokens = base.config_of("text_encoder").get("max_position_embeddings", NUM_TEXT_TOKENS) * data.caption_chunks
    unet = base.config_of("unet")
    row = base.family.text_row_shape(num_tokens, unet["cross_attention_dim"], base.family.pooled_width(unet))
    return num * math.prod(row) * {"float16": 2, "float32": 4}[data.cache_dtype]


def most_checkpoints(config: Config) -> int:
    """Return how many checkpoints a run has at most.

    save.keep recent ones, the best, in a later stage the best of that, too, and a new one that is written before the
    oldest is deleted.
    """
    stages = config.stages()
    return max(stage.config.save.keep for stage in stages) + 2 + (len(stages) > 1)


def _num_images(config: Config, samples: Sequence[Placement], timeline: Timeline) -> int:
    """Return how many images a run trains on; the most that may be where max_steps ends it within an epoch."""
    epochs = timeline.epochs_begun
    whole, uses = (count_uses(samples, seed=config.run.seed, num_epochs=num) for num in (max(0, epochs - 1), epochs))
    in_last = timeline.num_steps - timeline.steps_before(max(0, epochs - 1))
    stage = timeline.stages[timeline.stage_of(max(0, epochs - 1))]
    return min(uses, whole + in_last * stage.batch_size * stage.accumulate)


def summary(config: Config, device: torch.device | None = None, dtype: torch.dtype | None = None) -> dict:
    """Return bytes by part as plain values, and the run's length if its dataset is prepared.

    device, dtype: as for static_bytes.
    """
    if Path(config.data.path).is_file():
        raise UserError(f"data.path {config.data.path} is a file; give a folder written by `safelight prepare`")
    # what training would refuse
    base = resolve_model(config.model)
    check_vae(base, config.model.vae)
    _budgets(config)
    schedule = base.noise_schedule(config.loss.prediction, config.loss.zero_terminal_snr)
    for stage in config.stages():
        timestep_range(stage.config.loss, schedule.num_timesteps)
    check_prompts(config, latent_factor(vae_config(base, config.model.vae)), schedule.zero_terminal_snr)
    placed = placed_photos(config)
    static = static_bytes(config, device, dtype)
    in_host_memory = static.paged + static.streamed
    result: dict = {
        "base": config.model.base,
        "dataset path": config.data.path,
        "precision": static.precision,
        "optimizer": config.optimizer.name,
        "optimizer_memory": static.memory,
        "unet_parameters": static.num_parameters,
        "unet_tensors": static.num_tensors,
        **({"trained_parameters": static.num_trained} if static.num_trained < static.num_parameters else {}),
        **({"text_encoder_parameters": static.num_text_parameters} if config.text_encoder.train else {}),
        "bytes": {
            "weights": static.weights,
            "fp32 master" if static.memory == "fp32" else "remainders": static.master,
            "Adam moments": static.moments,
            **({"moving average": static.average} if static.average else {}),
            "gradients": static.gradients,
            **({"text encoder: frozen weights, fp32": static.frozen_text} if static.frozen_text else {}),
            **(
                {
                    "text encoder: weights, fp32": static.text_weights,
                    "text encoder: Adam moments": static.text_moments,
                    "text encoder: gradients": static.text_gradients,
                }
                if config.text_encoder.train
                else {}
            ),
            "fp32 gradients, replacing those": static.master_gradients,
            **({"of these in host memory": in_host_memory} if in_host_memory else {}),
            "peak of these": static.total,
        },
        "checkpoint bytes": static.checkpoint,
        "checkpoints at most": most_checkpoints(config),
    }
    if placed:
        timeline, train = Timeline.of(config, placed.train), once_each(placed.train)
        num_photos = len(train) + len(placed.validation)
        num_class_images = sum(is_class_image(one.photo) for one in train)
        result["dataset"] = {
            "photographs": num_photos - num_class_images,
            "train": len(train) - num_class_images,
            "class images": num_class_images,
            "validation": len(placed.validation),
            "too small": len(placed.too_small),
            "epochs": timeline.num_epochs,
            "steps": timeline.num_steps,
            # train.max_steps may end the run sooner than its epochs
            "end": timeline.cut_words,
            "images trained": _num_images(config, placed.train, timeline),
            "crop loss": round(crop_loss(placed.train), 6),
            "masks": num_masks(config, train),
            "loss scales": sum(has_own_scale(one.photo) for one in train),
            "cache bytes": cache_bytes(config, num_photos, num_masks(config, [*placed.train, *placed.validation]))
            + text_bytes(config, [one.photo for one in once_each([*placed.train, *placed.validation])]),
        }
    return result
