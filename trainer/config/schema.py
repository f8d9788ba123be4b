"""The settings of a run as pydantic models: names, types, defaults and documentation.

The docstring below a field is its documentation: `safelight init` writes it as a comment, and --help shows it.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

import tyro
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from safelight.data.tag_settings import TagSettings
from safelight.errors import UserError
from safelight.trainer.config.stage_settings import PER_STAGE, PerRun, attribute_of, overridable, overriding_model
from safelight.trainer.registry import adapters, losses, optimizers, samplers, schedules
from safelight.trainer.registry import layers as layer_patterns
from safelight.trainer.registry.losses import HUBER_SCHEDULES, KINDS, TIMESTEPS, WEIGHTINGS
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS
from safelight.trainer.registry.schedules import DEFAULTS, SCHEDULES

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
# what the schedules' own settings may be
LrEnd = Annotated[float, Field(ge=0, le=1)]
LrStart = Annotated[float, Field(gt=0, le=1)]
LrRise = Annotated[float, Field(gt=0, lt=1)]
LrCycles = Annotated[int, Field(ge=1, le=1000)]
LrCycleDecay = Annotated[float, Field(gt=0, le=1)]
LrPower = Annotated[float, Field(gt=0, le=100)]
# of a training or sample image, px
MAX_SIDE = 4096
# of a caption or prompt: 600 tokens
MAX_CHUNKS = 8
MIN_RESOLUTION = 16
# occurrences of a photograph within an epoch are counted in 16 bits, and it may repeat 10,000 times at each
MAX_RESOLUTIONS = 6
# a text encoder reads 75 tokens at a time
MAX_WORD_VECTORS = 75
MAX_TEMPLATES = 100
# layers and patterns in adapter.target
MAX_TARGETS = 64
# of an embedding: characters with a meaning in a prompt or a path, and white space, end a word
WORD = re.compile(r"[^\s()\[\]{}\\:,|\"'=/\x00-\x1f\x7f]{1,100}")
WORD_RULE = "a word without spaces, slashes and any of ( ) [ ] { } \\ : , | = and quotes"
RESOLUTION = tyro.conf.arg(metavar="INT [INT ...]")
VaePrecision = Literal["auto", "fp32", "bf16", "fp16"]
VAE_PRECISIONS = get_args(VaePrecision)
# guidance scales that samples are drawn with
MAX_CFG, MAX_CFGS = 100, 8
CFG = tyro.conf.arg(metavar="FLOAT [FLOAT ...]")
SampleSteps = Annotated[int, Field(ge=1, le=1000)]
if TYPE_CHECKING:
    OptimizerName = MemoryModeName = AdapterKind = Schedule = str
    LossKind = Weighting = HuberSchedule = TimestepsName = SamplerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    MemoryModeName = Literal[("auto", *MEMORY_MODES)]
    AdapterKind = Literal[tuple(adapters.ADAPTERS)]
    Schedule = Literal[tuple(SCHEDULES)]
    LossKind = Literal[tuple(KINDS)]
    Weighting = Literal[("auto", *WEIGHTINGS)]
    HuberSchedule = Literal[tuple(HUBER_SCHEDULES)]
    TimestepsName = Literal[tuple(TIMESTEPS)]
    SamplerName = Literal[tuple(samplers.SAMPLERS)]
AVERAGE_OF_PAGED = (
    "train.ema_decay does not work with optimizer.memory paged or streamed: the average is updated on the GPU at every "
    "step, from weights that these keep in host memory, in part; set train.ema_decay to 0, or optimizer.memory to exact"
)


def _check_side(side: int) -> int:
    if not 0 <= side <= MAX_SIDE:
        raise ValueError(
            f"expected at most {MAX_SIDE}, a multiple of the model's pixels per latent (8 for Stable Diffusion), or 0"
        )
    return side


def _check_resolution(value: object) -> object:
    """Return the value if it is a resolution, or a list of them: ascending, without repetitions, alone if only one."""
    sides = value if isinstance(value, list | tuple) else [value]
    # as pydantic reads whole numbers
    sides = [int(side) if isinstance(side, float | str) and _is_whole(side) else side for side in sides]
    if not all(type(side) is int for side in sides):
        raise ValueError("expected a whole number, or a list of them")
    if not 1 <= len(set(sides)) <= MAX_RESOLUTIONS:
        raise ValueError(f"expected 1 to {MAX_RESOLUTIONS} resolutions")
    if min(sides) < MIN_RESOLUTION:
        raise ValueError(f"expected {MIN_RESOLUTION} or more")
    if max(sides) > MAX_SIDE:
        raise ValueError(f"expected at most {MAX_SIDE}")
    sides = sorted(set(sides))
    return sides if len(sides) > 1 else sides[0]


def check_cfg(value: object) -> object:
    """Return a guidance scale, or a list of different ones; a list of one becomes the number."""
    scales = value if isinstance(value, list | tuple) else [value]
    try:
        scales = list(dict.fromkeys(float(scale) for scale in scales))
    except (TypeError, ValueError, OverflowError):
        raise ValueError("expected a number, or a list of them") from None
    if not 1 <= len(scales) <= MAX_CFGS:
        raise ValueError(f"expected 1 to {MAX_CFGS} guidance scales")
    if not all(0 <= scale <= MAX_CFG for scale in scales):
        raise ValueError(f"expected 0 to {MAX_CFG}")
    return scales if len(scales) > 1 else scales[0]


def _is_whole(value: float | str) -> bool:
    try:
        return float(value) == int(value)
    except (ValueError, OverflowError):
        return False


def _place(path: str) -> str:
    # TOML reads "runs\new" as runs, a newline, ew
    if any(ord(character) < 32 or character == "\x7f" for character in path):
        raise ValueError("it contains a control character; write / or use single quotes ('runs\\new')")
    return os.path.expanduser(path)


def _check_target(entry: str) -> str:
    entry = entry.strip()
    if not entry:
        raise ValueError(f"it is empty; use {', '.join(adapters.TARGETS)}, or a pattern of layer names")
    if "," in entry:
        parts = [part.strip() for part in entry.split(",") if part.strip()]
        listed = ", ".join(f'"{part}"' for part in parts)
        raise ValueError(f"separate layers by spaces: --adapter.target {' '.join(parts)}; in a file [{listed}]")
    # the name that train.layers has for it
    return entry.replace("_", "-") if entry.replace("_", "-") in adapters.TARGETS else entry


def _check_targets(entries: object) -> object:
    entries = [entries] if isinstance(entries, str) else entries
    if isinstance(entries, list | tuple) and not 1 <= len(entries) <= MAX_TARGETS:
        known = ", ".join(adapters.TARGETS)
        raise ValueError(f"expected 1 to {MAX_TARGETS} layers or patterns, such as {known}")
    return entries


def _known_sampler(name: object) -> object:
    return samplers.sampler_named(name) if isinstance(name, str) else name


def _check_pattern(entry: str) -> str:
    layer_patterns.parse_pattern(entry)
    return entry


def _check_given(path: str) -> str:
    if not path:
        raise ValueError("it is empty; name a path")
    return path


def _check_word(word: str) -> str:
    if not WORD.fullmatch(word):
        raise ValueError(f"expected {WORD_RULE}")
    return word


def _check_templates(templates: list[str]) -> list[str]:
    if not 1 <= len(templates) <= MAX_TEMPLATES:
        raise ValueError(f"expected 1 to {MAX_TEMPLATES} texts")
    for template in templates:
        if "{word}" not in template and "{caption}" not in template:
            raise ValueError(f"{template!r} has neither {{word}} nor {{caption}}")
    return templates


Side = Annotated[int, AfterValidator(_check_side)]
# a file or folder, with ~ replaced by the home folder: a run records the result, so that it resumes under another user
Place = Annotated[str, AfterValidator(_place)]
GivenPlace = Annotated[Place, AfterValidator(_check_given)]


def is_switch(annotation: object) -> bool:
    """Return whether a setting of this type accepts true and false."""
    return annotation is bool or any(part is True or is_switch(part) for part in get_args(annotation))


class Section(BaseModel):
    """A table of settings.

    A [[stage]] may override the settings that are marked PER_STAGE; in a table whose `is_per_stage` is true, all that
    are not marked PerRun. why_per_run: the end of the message that refuses the others, unless their PerRun has its own.
    """

    is_per_stage: ClassVar[bool] = False
    why_per_run: ClassVar[str] = "it is of the whole run"

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _only_text_that_can_be_stored(cls, value):
        # a command line's bytes that are not UTF-8 are characters that config.toml cannot hold
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("it has bytes that are not UTF-8, which a settings file cannot hold")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value, info: ValidationInfo):
        # Python counts true as 1, and so does pydantic
        if isinstance(value, bool) and not is_switch(cls.model_fields[info.field_name].annotation):
            # pydantic turns it into its own error, with the setting's name
            raise ValueError("expected a number or text, got a boolean")
        return value


class Run(Section):
    """Where the run is stored, and what makes it reproducible."""

    dir: GivenPlace = "runs/run"
    """Run folder: settings, metrics, checkpoints, samples, report."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 20230801
    """Seed of all random numbers in the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: the GPU if there is one, else the CPU."""
    deterministic: bool = False
    """On a GPU, use only deterministic operators, so that a resumed run gives the same bits as one that never stopped;
    slower. A CPU always does."""
    title: Annotated[str, Field(max_length=200)] = ""
    """Title of the report. Empty: the run folder's name."""
    notes: Annotated[str, Field(max_length=20_000)] = ""
    """The author's note, below the report's title: plain text, whose line breaks are kept. May be edited in the run's
    config.toml at any time."""


class Model(Section):
    """The model to fine-tune."""

    why_per_run = "a run has one model"

    base: GivenPlace = "tiny"
    """`tiny`, `tiny-xl` or `tiny-v` (built in), a diffusers folder, a Hugging Face hub id, a .safetensors file of
    SD 1.x, 2.x or XL, or `random:NAME` (untrained)."""
    config: Place = ""
    """For a base that is a single file: folder or hub id with its configs, tokenizer, scheduler and missing parts.
    Empty: those of SD 1.5 or SDXL."""
    vae: Place = ""
    """Replaces the base's autoencoder: a folder (AutoencoderKL or AutoencoderTiny), or a .safetensors file of the same
    size."""
    vae_precision: VaePrecision = "auto"
    """Dtype of the autoencoder's arithmetic, compared with fp32 on the first photographs and refused if they differ too
    much. auto: fp16 on a GPU for SD 1.x and 2.x; fp32 on a CPU and for SDXL, whose own autoencoder overflows in fp16
    (set fp16 for one that was mended). Latents in the cache of another precision are not used."""
    tokenizer: Place = ""
    """Replaces the CLIP tokenizer: a folder. Only for `random:` bases, since a trained text encoder needs its own
    vocabulary."""
    clip_skip: Annotated[int, Field(ge=0, le=11)] = 0
    """Text-encoder layers to skip at the end, counted as in diffusers: 0 is what the base was trained with. That is the
    last layer, which other tools call clip skip 1; for SDXL the last but one of both encoders, clip skip 2."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the UNet's weights and arithmetic. With 16 bits, optimizer.memory decides how much of fp32 is kept.
    auto: bf16 on a GPU that supports it, else fp16; fp32 on a CPU."""
    attention: Literal["auto", "xformers", "sdpa", "flash", "cudnn", "efficient", "math"] = "auto"
    """Attention backend. auto: the fastest one that works on this device; xformers, sdpa: the fastest of that library;
    flash: PyTorch's, or FlashAttention 4 where flash-attn-4 is installed, which auto tries as well; others: a single
    sdpa backend. Heads are padded where that is faster."""


class Data(Section):
    """The dataset, and how photographs become training samples."""

    why_per_run = "all stages have the same split, crops, captions and cache"

    path: GivenPlace = "datasets/photos"
    """Folder written by `safelight prepare`."""
    resolution: Annotated[int | list[int], BeforeValidator(_check_resolution), RESOLUTION] = 512
    """Image size: every aspect-ratio bucket has at most resolution x resolution pixels. Several, such as [512, 768],
    train each photograph once an epoch at each size that it fills."""
    upscale: Literal["allow", "skip", "always"] = "allow"
    """Photographs smaller than the size they would be trained at. allow: enlarge them up to 1.25 times, leave out
    smaller ones; skip: leave them all out; always: leave none out."""
    max_aspect: Annotated[float, Field(ge=1, le=16)] = 4.0
    """Largest aspect ratio of a bucket, long side to short side."""
    validation_fraction: Fraction = 0.1
    """Fraction of the photographs held out for validation."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """Crops cached for each photograph: the center crop, and variants - 1 jittered and flipped ones."""
    crop_jitter: Annotated[float, Field(ge=0, lt=0.5)] = 0.02
    """Jittered crops are smaller by up to this fraction of their side."""
    flip_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a variant is mirrored."""
    caption_dropout: Annotated[float, Field(ge=0, le=1), PER_STAGE] = 0.04
    """Probability of replacing a caption by the empty one, which classifier-free guidance requires."""
    caption_variants: Annotated[int, Field(ge=1, le=64)] = 4
    """Orders of a photograph's tags whose captions are cached; training draws one at each use. The first, which
    validation uses, has the heaviest tags first; in the others tags are drawn by weight, so that heavier ones tend to
    come first. Photographs without tags have one."""
    max_tags: Count = 0
    """Largest number of tags in a caption. 0: all of them."""
    keep_tags: Count = 0
    """Number of a photograph's first tags that always stay in front."""
    shuffle_tags: bool = True
    """Put tags in the order in which they were drawn. false: in the order in which they were written; without max_tags
    a photograph then has one caption variant."""
    caption_suffix: str = ""
    """Text appended to every caption, without a separator."""
    prompt_weights: bool = False
    """Read captions as A1111 reads prompts: (word:1.3) counts more, [word] less, and \\( is a plain bracket. Prompts of
    samples are always read so."""
    caption_chunks: Annotated[int, Field(ge=1, le=MAX_CHUNKS)] = 1
    """How many chunks of 75 tokens are read of a caption, each encoded by itself; 2 reads 150 tokens, 3 reads 225."""
    short_batches: Literal["keep", "carry", "merge"] = "keep"
    """What becomes of photographs that do not fill a batch when an epoch ends. keep: each bucket's last batch is
    smaller. carry: they wait for the next epoch, so that every batch is full; what waits when the run ends is not
    trained. merge: like keep, but buckets with fewer photographs than a batch join the bucket of the nearest shape."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """Dtype of cached latents and text embeddings."""

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All resolutions, ascending."""
        return (self.resolution,) if isinstance(self.resolution, int) else tuple(self.resolution)

    @property
    def max_resolution(self) -> int:
        return self.resolutions[-1]

    @property
    def tags(self) -> TagSettings:
        """How a photograph's tags are ordered."""
        return TagSettings(self.caption_variants, self.keep_tags, self.max_tags, self.shuffle_tags)

    @property
    def carries(self) -> bool:
        """Whether photographs that do not fill a batch wait for the next epoch."""
        return self.short_batches == "carry"


class Train(Section):
    """The training loop."""

    why_per_run = "the UNet is prepared and its memory planned once, when the run starts"

    batch_size: Annotated[Positive, PER_STAGE] = 4
    """Images per micro-step."""
    accumulate: Annotated[Positive, PER_STAGE] = 1
    """Micro-steps per optimizer step (gradient accumulation)."""
    accumulate_dtype: Literal["auto", "fp32"] = "auto"
    """Dtype in which gradients accumulate over micro-steps. fp32: 4 bytes per parameter. auto: the dtype of the
    weights; with 16 bits that is 2 bytes, and the sum is rounded at every micro-step."""
    epochs: Positive = 30
    """Passes over the photographs; unused if there are [[stage]] tables."""
    max_steps: Annotated[Count, PerRun("it limits the run; set the stage's epochs")] = 0
    """Stop after this many optimizer steps. 0: no limit."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Use Safelight's fused kernels in the UNet. auto: on a GPU. A run may switch when it resumes."""
    checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "none"
    """Activation checkpointing. selective: recompute only what is cheap; full: recompute every block, about a quarter
    more work; offload: like full, with the checkpoints in pinned host memory. auto: on a GPU the first of none,
    selective, full, offload that fits according to `safelight plan`; on a CPU none."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Capture a step as a CUDA graph once per batch shape and replay it. Batches of one bucket then follow each other
    within an epoch. auto: on a GPU if the graphs fit; the log gives the reason if not."""
    cudnn_benchmark: bool = False
    """On a GPU, let cuDNN time its convolution algorithms on the first batch of each shape and keep the fastest. Takes
    seconds per shape, and the fastest may need memory that `safelight plan` does not include."""
    max_grad_norm: Annotated[float, Field(ge=0), PER_STAGE] = 1.0
    """Clip the global norm of the gradients to this. 0: no clipping."""
    ema_decay: Annotated[Fraction, PerRun("the average is one over the whole run")] = 0.0
    """Keep an exponential moving average of the weights, used for validation, samples and export. 0.999 is usual; 0:
    none. Update n takes the smaller of this and (1 + n) / (10 + n); diffusers' EMAModel, whose first update copies the
    weights, is one update behind."""
    layers: Annotated[
        list[Annotated[str, AfterValidator(_check_pattern)]],
        Field(description=layer_patterns.help_text(), max_length=layer_patterns.MAX_PATTERNS),
    ] = []


class Optimizer(Section):
    """The optimizer and its learning rate."""

    why_per_run = "the optimizer and its state are made once, when the run starts"

    name: Annotated[OptimizerName, Field(description=optimizers.help_text())] = "adamw8bit"
    memory: MemoryModeName = "auto"
    """How much of fp32 is kept for 16-bit weights, in addition to the weights. exact: all of it, 2 bytes per parameter;
    near: half of that, 1 byte; rounded: nothing, so updates are rounded stochastically; fp32: a master copy, 4 bytes;
    paged: like exact, but together with the moments in pinned host memory, 4 bytes per parameter, and streamed through
    the GPU; streamed: like paged, and the blocks' weights too, 6 bytes per parameter, which needs fused_backward. auto:
    for adamw8bit on a GPU the first of exact, near, paged, streamed, rounded that fits according to `safelight plan`,
    on a CPU exact. The other optimizers only support fp32."""
    moments: Literal["8bit", "4bit"] = "8bit"
    """How adamw8bit keeps its two moments of each weight. 8bit: 2 bytes per parameter, as bitsandbytes; 4bit: 1 byte,
    at a cost in accuracy that short runs do not show (docs/memory.md). A resume cannot change it."""
    lr: Annotated[LearningRate, PER_STAGE] = 1e-6
    """Peak learning rate. `safelight train RUN.TOML --find-lr` proposes one. Of prodigy a factor on its own estimate,
    by default 1."""
    fused_backward: Annotated[Literal["auto", True, False], tyro.conf.arg(metavar="{auto,true,false}")] = "auto"
    """Update each part of the UNet during the backward pass, as soon as its gradients are complete, and free them at
    once. The global gradient norm is then known too late to clip by. Only adamw8bit supports it. auto: true on a GPU if
    `safelight plan` finds that the run does not fit otherwise with the same optimizer.memory; false on a CPU."""
    clipping: Literal["auto", "global", "lagged", "per-tensor"] = "auto"
    """Norm to clip the gradients by. global: of all gradients. With fused_backward, lagged: the previous step's global
    norm, or per-tensor: each tensor's own. auto: global, or lagged with fused_backward."""
    betas: Annotated[
        tuple[Fraction, Fraction],
        PerRun("the moments are averages by these since the run's first step, and corrected for it"),
    ] = (0.9, 0.999)
    """Decay of the first and second moment. adafactor ignores it."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment. Only for AdamW, Prodigy and the schedule-free ones."""
    d0: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Learning rate from which prodigy's estimate rises; it never falls. Lower it if the first steps do harm."""
    d_coef: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Factor on prodigy's estimate, the preferred way to tune it: 0.5 and 2 are usual."""
    safeguard_warmup: bool = False
    """Leave lr out of prodigy's estimate, so that a warm-up does not raise it. Set it with warmup_steps."""
    use_bias_correction: bool = False
    """Correct prodigy's moments as Adam does, which lowers its first steps."""
    slice_p: Annotated[int, Field(ge=1, le=1000)] = 1
    """Estimate prodigy's rate from every slice_p-th value of each tensor; 11 saves nearly half of its state."""
    average_power: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weigh step k of a schedule-free average by k^average_power, so that early steps count less. 0: all equally."""
    average_lr_power: Annotated[float, Field(ge=0, le=100)] = 2.0
    """Weigh each step of a schedule-free average by the highest lr so far to this power, so that a warm-up counts
    less."""
    weight_decay: Annotated[float, Field(ge=0, lt=1), PER_STAGE] = 0.01
    """Decoupled weight decay: weights shrink by lr * weight_decay per step."""
    schedule: Annotated[Schedule, Field(description=schedules.help_text()), PER_STAGE] = "constant"
    warmup_steps: Annotated[Count, PER_STAGE] = 0
    """Optimizer steps over which the learning rate rises from zero to where the schedule begins, at the start of the
    stage."""
    lr_end: Annotated[LrEnd, PER_STAGE] = DEFAULTS["lr_end"]
    """Where a falling schedule would arrive after the last step, as a fraction of lr. Not for constant."""
    lr_start: Annotated[LrStart, PER_STAGE] = DEFAULTS["lr_start"]
    """Where one_cycle begins, as a fraction of lr: 1 / div_factor of PyTorch's OneCycleLR."""
    lr_rise: Annotated[LrRise, PER_STAGE] = DEFAULTS["lr_rise"]
    """Fraction of the steps over which one_cycle rises."""
    lr_cycles: Annotated[LrCycles, PER_STAGE] = DEFAULTS["lr_cycles"]
    """Number of cosines of cosine_restarts."""
    lr_cycle_decay: Annotated[LrCycleDecay, PER_STAGE] = DEFAULTS["lr_cycle_decay"]
    """Peak of each cosine of cosine_restarts after the first, as a fraction of the one before."""
    lr_power: Annotated[LrPower, PER_STAGE] = DEFAULTS["lr_power"]
    """Exponent of polynomial. 1 is linear."""

    @model_validator(mode="before")
    @classmethod
    def _default_lr_of_its_own(cls, values: object) -> object:
        if isinstance(values, dict) and "lr" not in values:
            spec = OPTIMIZERS.get(values["name"]) if isinstance(values.get("name"), str) else None
            if spec is not None and spec.default_lr:
                return {**values, "lr": spec.default_lr}
        return values

    def fused_choices(self) -> tuple[bool, ...]:
        """Return the allowed values of fused_backward, preferred first. For auto they depend on name and clipping."""
        if self.fused_backward != "auto":
            return (self.fused_backward,)
        if not OPTIMIZERS[self.name].steps_inside_backward or self.clipping == "global":
            return (False,)
        if self.memory != "auto" and MEMORY_MODES[self.memory].streams_weights:
            return (True,)
        return (False, True) if self.clipping == "auto" else (True,)

    def for_fp32(self) -> Optimizer:
        """Return these settings for fp32 weights stepped after backward: a text encoder's, or the vectors of a word."""
        return self.model_copy(update={"memory": "auto", "fused_backward": False, "clipping": "auto"})

    @property
    def is_fused(self) -> bool:
        """Whether steps are taken inside backward. Before a plan resolves `auto`, this is the preferred choice."""
        return self.fused_choices()[0]

    def clipping_mode(self) -> str:
        """Return the resolved clipping: global, lagged or per-tensor. Raises UserError if fused_backward forbids it."""
        if self.clipping == "auto":
            return "lagged" if self.is_fused else "global"
        if self.is_fused == (self.clipping == "global"):
            state, use = ("true", "lagged or per-tensor") if self.is_fused else ("false", "global")
            raise UserError(
                f"optimizer.clipping {self.clipping} does not work with optimizer.fused_backward {state}; "
                f"use auto or {use}"
            )
        return self.clipping


class TextEncoder(Section):
    """Training of the text encoder, of both of SDXL's, together with the UNet."""

    why_per_run = "the text encoder has a schedule of its own, over all epochs in which it is trained"

    train: bool = False
    """Train it. Its weights are fp32; validation, samples and exports use it as it is at that step."""
    lr: LearningRate = 5e-7
    """Peak learning rate. Everything else of the optimizer is as the UNet's."""
    schedule: Annotated[Schedule, Field(description=schedules.help_text())] = "constant"
    warmup_steps: Count = 0
    """Optimizer steps over which the learning rate rises from zero to where the schedule begins, at the start of the
    run."""
    lr_end: LrEnd = DEFAULTS["lr_end"]
    """Where a falling schedule would arrive after the last step, as a fraction of lr. Not for constant."""
    lr_start: LrStart = DEFAULTS["lr_start"]
    """Where one_cycle begins, as a fraction of lr: 1 / div_factor of PyTorch's OneCycleLR."""
    lr_rise: LrRise = DEFAULTS["lr_rise"]
    """Fraction of the steps over which one_cycle rises."""
    lr_cycles: LrCycles = DEFAULTS["lr_cycles"]
    """Number of cosines of cosine_restarts."""
    lr_cycle_decay: LrCycleDecay = DEFAULTS["lr_cycle_decay"]
    """Peak of each cosine of cosine_restarts after the first, as a fraction of the one before."""
    lr_power: LrPower = DEFAULTS["lr_power"]
    """Exponent of polynomial. 1 is linear."""
    last_layers: Count = 0
    """Train only this many of its last layers, and its final norm. 0: all layers and the embeddings."""
    epochs: Count = 0
    """Stop after this many epochs: captions are then encoded once more, and it leaves the GPU. 0: train it as long as
    the run lasts."""

    def trained_epochs(self, num_epochs: int) -> int:
        """Return in how many epochs of a run of num_epochs it is trained."""
        return 0 if not self.train else min(self.epochs or num_epochs, num_epochs)

    def is_trained_at(self, epoch: int, num_epochs: int) -> bool:
        """Return whether it is trained in an epoch, counted from 0.

        A run that ends with its training ends in this state, as if there were no epochs.
        """
        last = self.trained_epochs(num_epochs)
        return self.train and (epoch < last or last == num_epochs)


class Adapter(Section):
    """What is trained: the UNet itself, or an adapter on it."""

    why_per_run = "a run trains one thing"

    kind: Annotated[AdapterKind, Field(description=adapters.help_text())] = "none"
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of a LoRA's matrices: 8 to 32 for a look or a subject, more for more of both. Its size is proportional."""
    alpha: Annotated[float, Field(ge=0, le=65536)] = 0.0
    """What a LoRA adds is multiplied by alpha / rank; half the alpha learns about half as fast. 0: the rank, so that
    nothing is multiplied."""
    dropout: Fraction = 0.0
    """Probability with which an element of a LoRA's input is dropped in training. 0.05 to 0.1 for few photographs."""
    target: Annotated[list[Annotated[str, AfterValidator(_check_target)]], BeforeValidator(_check_targets)] = [
        "attention"
    ]
    """Layers that a LoRA is added to: attention, feed-forward, linear (all linear layers), convolution (all
    convolutions), and patterns of layer names such as up_blocks.*.attn2.to_k, in which * stands for anything."""
    dora: bool = False
    """Also train the norm of each output's weights (DoRA), which comes closer to training the weights themselves. A
    step takes longer."""
    base: Literal[("full", *adapters.QUANTIZED_FORMATS)] = "full"
    """How the frozen weights are held while an adapter is trained. full: in model.precision. 8bit: half of 16 bits;
    nf4: about a quarter (QLoRA). Both are dequantized layer by layer, which makes a step slower, and need
    bitsandbytes. Exports are merged into the full weights."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rank-stabilized LoRA), so that high ranks learn as fast as low ones."""

    @property
    def quantized_base(self) -> str:
        """The format of frozen weights that are quantized, '' if they are not."""
        return self.base if self.base != "full" and "base" in self.spec.settings else ""

    @property
    def spec(self) -> adapters.AdapterSpec:
        return adapters.ADAPTERS[self.kind]


class Embedding(Section):
    """The word that adapter.kind embedding trains."""

    why_per_run = "a run trains one thing"

    word: Annotated[str, AfterValidator(_check_word)] = "<look>"
    """The word. Prompts name it, also in A1111 and ComfyUI, where the name of the exported file counts."""
    initial_text: str = "photograph"
    """What the word means before training: its vectors begin as those of this text's tokens."""
    vectors: Annotated[int, Field(ge=1, le=MAX_WORD_VECTORS)] = 4
    """How many vectors the word has, each of which takes the place of a token in prompts. More can learn more; 1 to 8
    are usual. The tokens of initial_text are repeated over them."""
    templates: Annotated[list[str], AfterValidator(_check_templates)] = ["{word}, {caption}"]
    """What is read in place of a photograph's caption: one of these is drawn at each use, with the word for {word} and
    the caption for {caption}. For a look or a thing without captions, "a photograph of {word}". Captions that have the
    word already: "{caption}"."""
    negative: bool = False
    """The word is for negative prompts: train it on pictures that show what is unwanted. Samples then have it in the
    negative prompt, and its file says so."""


class Memory(Section):
    """Limits on GPU memory."""

    why_per_run = "memory is planned once, when the run starts"

    limit_gib: Annotated[float, Field(ge=0)] = 0.0
    """GPU memory the run may use, in GiB, including the CUDA context. A step that needs more fails. 0: no limit."""


class Distributed(Section):
    """Several GPUs that train one run, each in a process of its own."""

    why_per_run = "the processes meet once, when the run starts"

    shard: Literal["none", "states", "full"] = "none"
    """What the processes divide among themselves. none: each holds everything. states: moments, remainders or masters
    and moving averages, each part of the UNet's with one process, which steps it and sends the others its new weights;
    same results. full: these and the weights, gathered block by block for each pass (torch's FSDP2)."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """After so many seconds without an answer from another process, a process ends the run."""


class Loss(Section):
    """What the UNet predicts, from which noise and timesteps, and how its errors are measured and weighted."""

    is_per_stage = True

    prediction: Annotated[Literal["auto", "epsilon", "v_prediction"], PerRun("a model predicts one thing")] = "auto"
    """What the UNet predicts. auto: as the base model."""
    kind: Annotated[LossKind, Field(description=losses.help_text("kind"))] = "mse"
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """Error above which huber is linear, in standard deviations of the noise. Smaller is more robust."""
    huber_schedule: Annotated[HuberSchedule, Field(description=losses.help_text("huber_schedule"))] = "constant"
    weighting: Annotated[Weighting, Field(description=losses.help_text("weighting"))] = "auto"
    min_snr_gamma: Annotated[float, Field(ge=0)] = 0.0
    """SNR above which min_snr reduces the weight. 5 is usual; 0: no min-SNR weighting."""
    p2_gamma: Annotated[float, Field(gt=0)] = 1.0
    """Strength of p2, whose weight is 1 / (1 + SNR)^p2_gamma. 0.5 and 1 are usual."""
    timesteps: Annotated[TimestepsName, Field(description=losses.help_text("timesteps"))] = "uniform"
    timestep_location: Annotated[float, Field(ge=-10, le=10)] = 0.0
    """Mean of logit_normal's logits. Above 0: more noise; below: less."""
    timestep_scale: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Standard deviation of logit_normal's logits. Smaller: closer to the middle."""
    min_timestep: Count = 0
    """First timestep that is drawn, counted from 0, the least noise. Validation still measures all of them."""
    max_timestep: Count = 0
    """Timestep before which the range ends. 0: the base's last one is included, which is 999."""
    mask_weight: Annotated[
        float,
        Field(ge=0, le=1),
        PerRun("validation is masked as training is, and its losses in all stages are compared with each other"),
    ] = 0.0
    """How much of a photograph with a mask is learned where the mask is black. 0: nothing; 1: everything, as without a
    mask."""
    offset_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of a constant added to each channel's noise, so that the model can learn very dark and very
    light images. 0: none."""
    pyramid_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Add coarser noise as well, each octave this much weaker than the last, so that the model learns large shapes and
    brightness. 0.1 to 0.4 are usual; 0: none."""
    pyramid_octaves: Annotated[int, Field(ge=2, le=16)] = 6
    """Largest number of sizes of pyramid_noise. It ends earlier with noise that is one latent wide or high."""
    input_perturbation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Strength of noise that the UNet's input has and its target lacks, so that it learns to correct its own errors
    (Ning et al. 2023). 0.1 is usual; 0: none."""
    zero_terminal_snr: Annotated[bool, PerRun("a run has one noise schedule")] = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2023). Requires v_prediction."""

    @property
    def chosen_weighting(self) -> str:
        """The weighting, with `auto` replaced by what min_snr_gamma implies."""
        if self.weighting != "auto":
            return self.weighting
        return "min_snr" if self.min_snr_gamma > 0 else "none"

    def contradiction(self) -> str:
        """Return why weighting and min_snr_gamma contradict each other, '' if they do not."""
        if self.weighting == "min_snr" and self.min_snr_gamma == 0:
            return "loss.weighting 'min_snr' needs a loss.min_snr_gamma above 0; 5 is usual"
        if self.weighting not in ("auto", "min_snr") and self.min_snr_gamma > 0:
            return (
                f"loss.weighting {self.weighting!r} contradicts loss.min_snr_gamma {self.min_snr_gamma}; "
                "set loss.min_snr_gamma to 0, or loss.weighting to min_snr"
            )
        if self.huber_schedule != "constant" and "huber_schedule" in self._used() and self.huber_delta >= 1:
            return (
                f"loss.huber_schedule {self.huber_schedule!r} falls from 1 to loss.huber_delta, which is "
                f"{self.huber_delta:g}; set loss.huber_delta below 1, 0.1 is usual, or loss.huber_schedule to constant"
            )
        if 0 < self.max_timestep <= self.min_timestep:
            return (
                f"loss.min_timestep {self.min_timestep} and loss.max_timestep {self.max_timestep} leave no timestep; "
                f"set loss.min_timestep below {self.max_timestep}"
            )
        return ""

    def _chosen(self) -> tuple[losses.Row, ...]:
        return KINDS[self.kind], WEIGHTINGS[self.chosen_weighting], TIMESTEPS[self.timesteps]

    def _used(self) -> set[str]:
        used = {name for row in self._chosen() for name in row.parameters}
        return used | ({"pyramid_octaves"} if self.pyramid_noise else set())

    def unused_parameters(self) -> set[str]:
        """Return the settings that belong to another choice than the chosen ones."""
        rows = (*KINDS.values(), *WEIGHTINGS.values(), *TIMESTEPS.values())
        return {"pyramid_octaves", *(name for row in rows for name in row.parameters)} - self._used()

    def chosen_instead_of(self, parameter: str) -> str:
        """Return the settings, as loss.kind mse, that leave a parameter without effect."""
        if parameter == "pyramid_octaves":
            return f"loss.pyramid_noise {self.pyramid_noise:g}"
        for name, chosen, rows in (
            ("kind", self.kind, KINDS),
            ("weighting", self.chosen_weighting, WEIGHTINGS),
            ("timesteps", self.timesteps, TIMESTEPS),
        ):
            if any(parameter in row.parameters for row in rows.values()):
                return f"loss.{name} {chosen}"
        raise ValueError(f"{parameter} belongs to no choice")

    def kernel_options(self) -> dict[str, str | float]:
        """Return the arguments of kernels.ops.diffusion_loss.LossOptions: kind, weighting and their parameters."""
        options: dict[str, str | float] = {"kind": self.kind, "weighting": self.chosen_weighting}
        for row in self._chosen():
            options |= {option: getattr(self, name) for name, option in row.parameters.items() if option}
        return options

    def noise_options(self) -> dict[str, float]:
        """Return the arguments of kernels.ops.noising.NoiseOptions."""
        return {
            "offset": self.offset_noise,
            "pyramid_discount": self.pyramid_noise,
            "pyramid_octaves": self.pyramid_octaves,
            "perturbation": self.input_perturbation,
        }


class Prior(Section):
    """Prior preservation: class images, trained beside the photographs so that the model does not forget their class.

    Photographs of the dataset that say `class_image: true` are class images, too, and the first to be used.
    """

    why_per_run = "class images are drawn and cached before the run's first step"

    prompt: Annotated[str, Field(max_length=2000)] = ""
    """What class images show, such as `a photograph of a dog`, and their caption. The base draws as many as the dataset
    lacks before training. Empty: none are drawn."""
    num_images: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Number of class images, the dataset's included. An epoch uses them as often as photographs, however many there
    are."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """What the loss of class images is multiplied by."""
    negative_prompt: str = ""
    """Text that guidance steers away from when class images are drawn."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 30
    """Number of DDIM steps that draw a class image."""
    cfg: Annotated[float, Field(ge=0, le=100)] = 7.0
    """Classifier-free guidance scale of class images."""

    def unused_parameters(self) -> set[str]:
        """Return the settings that have no effect without a prompt."""
        return set() if self.prompt else {"num_images", "negative_prompt", "steps", "cfg"}


class Validate(Section):
    """Validation: the loss on held-out photographs and on equally many training photographs, with fixed noise."""

    why_per_run = "the held-out losses of all stages are compared with each other"

    every_epochs: Annotated[Count, PER_STAGE] = 1
    """Validate every this many epochs, and at step 0 and the end. 0: never."""
    timesteps: Annotated[int, Field(ge=1, le=64)] = 4
    """Timesteps per image, one from each of this many equal ranges."""
    batch_size: Annotated[Positive, PerRun("memory is planned once, when the run starts")] = 8
    """Images at a time. Does not change the noise."""
    max_images: Positive = 64
    """Largest number of images from either set."""
    patience: Annotated[Count, PER_STAGE] = 0
    """End a stage after this many epochs in which held-out loss has not become better: neither the mean of all ranges,
    each relative to its loss when the stage began, nor half of them. Each value is the mean of the last three
    validations. 0: stages are as long as their epochs say; over-fitting is then only reported."""
    min_gain: Annotated[float, Field(ge=0, le=100), PER_STAGE] = 1.0
    """By how much a held-out loss must fall to count as better, in units of its own noise: of how far validations
    scatter about a smooth curve. Only with patience."""
    patience_ends: Annotated[Literal["stage", "run"], PER_STAGE] = "stage"
    """What patience ends. stage: the next one begins; run: the whole run."""


class Sample(Section):
    """Sample images during the run, from fixed prompts and fixed noise."""

    why_per_run = "the pictures of all steps are compared with each other"

    prompts: list[str] = []
    """Prompts to sample. Empty: captions of the first validation photographs."""
    prompts_file: Place = ""
    """File with the prompts instead: .txt with one a line, .json or .toml, which may give each its own negative prompt,
    seed, cfg, steps, size and sampler. Files of EveryDream and kohya are read as they are. It is read again at every
    sampling; while it has an error, the prompts stay as they were."""
    num_prompts: Annotated[int, Field(ge=1, le=64)] = 5
    """Number of validation captions to use if there are no prompts."""
    every_epochs: Annotated[Count, PER_STAGE] = 5
    """Sample every this many epochs, and at step 0 (the base) and the end. 0: never."""
    compare_at_end: bool = True
    """After the last step, lay the samples of base, best and last checkpoint side by side in RUN/compare, as `safelight
    compare` does. Without samples (every_epochs 0) there is nothing to compare."""
    sampler: Annotated[
        SamplerName, BeforeValidator(_known_sampler), Field(description=samplers.help_text()), PER_STAGE
    ] = "dpm++"
    spacing: Literal[samplers.SPACINGS] = "trailing"
    """Timesteps of the steps. trailing: from the last one, which is pure noise, evenly down; leading: evenly up from
    the first, so that the last is left out, as Stable Diffusion 1.x was published; linspace: from the last to the
    first. dpm++-karras spaces them by noise level whatever this says."""
    steps: Annotated[SampleSteps, PER_STAGE] = 25
    """Number of denoising steps."""
    cfg: Annotated[float | list[float], BeforeValidator(check_cfg), CFG] = 7.0
    """Classifier-free guidance scale. 1 turns it off. Several, such as [3, 7], draw each prompt with each, from the
    same noise; comparisons, grids and evaluations use the first."""
    negative_prompt: str = ""
    """Text that guidance steers away from."""
    embeddings: list[str] = []
    """Files of embeddings (textual inversion) that prompts may name, also negative ones: .safetensors, .pt or .bin of
    diffusers or A1111, for SDXL with the vectors of both text encoders. The file's name without its ending is the word;
    NAME=FILE gives another."""
    width: Side = 0
    """Image width in pixels, up to 4096. 0: data.resolution, the largest if there are several."""
    height: Side = 0
    """Image height in pixels, up to 4096. 0: data.resolution, the largest if there are several."""

    @property
    def cfgs(self) -> tuple[float, ...]:
        """All guidance scales."""
        return tuple(self.cfg) if isinstance(self.cfg, list) else (self.cfg,)


class Save(Section):
    """Checkpoints. A run resumed from one continues bit for bit."""

    is_per_stage = True

    every_epochs: Count = 1
    """Save every this many epochs. 0: not by epochs."""
    every_steps: Count = 0
    """Save every this many optimizer steps. 0: not by steps."""
    keep: Positive = 2
    """Number of latest checkpoints to keep, besides the one with the best validation loss."""


class Log(Section):
    """Training logs."""

    why_per_run = "a run has one log"

    every_steps: Positive = 10
    """Write a line to metrics.jsonl every this many optimizer steps; each holds the mean over them."""
    tensorboard: bool = True
    """Also write TensorBoard event files, with samples and settings."""
    wandb: Annotated[Literal[False, True, "offline"], tyro.conf.arg(metavar="{true,false,offline}")] = False
    """Also log to Weights & Biases: losses, samples and settings under the same names. true: upload them, which needs
    the wandb package and `wandb login`; offline: keep them in RUN/wandb for `wandb sync`. If it fails, training goes
    on."""
    wandb_project: Annotated[str, Field(min_length=1, max_length=128)] = "safelight"
    """Project on W&B."""
    wandb_entity: Annotated[str, Field(max_length=128)] = ""
    """User or team on W&B. Empty: that of the API key."""
    wandb_name: Annotated[str, Field(max_length=128)] = ""
    """Name of the run on W&B. Empty: run.title, or the run folder's name."""


class OwnOfStage(Section):
    """A stage of training. Values that are not set come from the tables outside the stage."""

    epochs: Positive
    """Passes over the photographs."""
    start_from: Literal["last", "best"] = "last"
    """Where the stage begins. last: where the stage before it ended; best: at the checkpoint of the stage before it
    with the lowest held-out loss, of which it takes everything, the optimizer's moments included."""


# tables whose settings a stage overrides by their own names: `lr`, not `optimizer.lr`
FLAT_TABLES: dict[str, type[Section]] = {"train": Train, "optimizer": Optimizer}
# tables that a stage has, too: [stage.loss], or --stage.0.loss.offset-noise
NESTED_TABLES: dict[str, type[Section]] = {
    "data": Data,
    "loss": Loss,
    "validate": Validate,
    "sample": Sample,
    "save": Save,
}
if TYPE_CHECKING:
    Stage = OwnOfStage
else:
    Stage = overriding_model("Stage", OwnOfStage, FLAT_TABLES, NESTED_TABLES)


class Config(Section):
    """All settings of a run. The same config, dataset and code give the same weights.

    The table [validate] is the attribute `validate_`, because pydantic's BaseModel defines `validate`.
    """

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    text_encoder: TextEncoder = TextEncoder()
    adapter: Adapter = Adapter()
    embedding: Embedding = Embedding()
    memory: Memory = Memory()
    distributed: Distributed = Distributed()
    stage: list[Stage] = []
    loss: Loss = Loss()
    prior: Prior = Prior()
    validate_: Annotated[Validate, tyro.conf.arg(name="validate")] = Field(default=Validate(), alias="validate")
    sample: Sample = Sample()
    save: Save = Save()
    log: Log = Log()

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_by_name=True, validate_by_alias=True
    )

    @property
    def trains_word(self) -> bool:
        """Whether the vectors of a word are trained, and nothing of the model."""
        return self.adapter.spec.trains_word

    @property
    def reads_captions_in_step(self) -> bool:
        """Whether captions are cached as token ids and read inside the step, because gradients pass through the text
        encoders."""
        return self.text_encoder.train or self.adapter.spec.reads_captions_in_step

    def reads_captions_in_step_at(self, epoch: int) -> bool:
        """Whether captions are read inside the step in an epoch: the text encoder may be trained for some of them."""
        num_epochs = sum(stage.epochs for stage in self.stages())
        return self.adapter.spec.reads_captions_in_step or self.text_encoder.is_trained_at(epoch, num_epochs)

    @property
    def trained_optimizer(self) -> Optimizer:
        """The settings of the optimizer of what adapter.kind trains."""
        return self.optimizer.for_fp32() if self.adapter.spec.is_fp32 else self.optimizer

    @property
    def caption_templates(self) -> tuple[str, ...]:
        """What is read in place of captions, with {caption} in it; empty if captions are read as they are."""
        word = self.embedding.word
        return tuple(one.replace("{word}", word) for one in self.embedding.templates) if self.trains_word else ()

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        """What is sampled in place of captions; empty if captions are. A negative word is not for prompts."""
        return () if self.embedding.negative else self.caption_templates

    @property
    def negative_text(self) -> str:
        """The negative prompt of samples. The word that a run trains is added to it if the word is a negative one."""
        given, word = self.sample.negative_prompt, self.embedding.word
        if not (self.trains_word and self.embedding.negative) or word.lower() in given.lower():
            return given
        return f"{given}, {word}" if given else word

    def stages(self) -> list[ResolvedStage]:
        """Return the stages with inherited values filled in. Without [[stage]] there is one of train.epochs."""
        stages = self.stage or [Stage(epochs=self.train.epochs)]
        return [ResolvedStage(self, stage) for stage in stages]


def optimizer_conflict(config: Config) -> str:
    """Return why other settings do not go with the optimizer, '' if they do."""
    spec, text = OPTIMIZERS[config.optimizer.name], config.text_encoder
    if config.optimizer.moments != "8bit" and "moments" not in spec.settings:
        return (
            f"optimizer.moments {config.optimizer.moments} does not go with {spec.name}, whose moments have a form of "
            "their own; use optimizer.name adamw8bit, or leave moments out"
        )
    names = [f"stage {number}'s lr" for number in range(1, len(config.stage) + 1)] or ["optimizer.lr"]
    rates = [(name, stage.lr) for name, stage in zip(names, config.stages(), strict=True)]
    if text.train:
        rates.append(("text_encoder.lr", text.lr))
    for name, lr in rates:
        if lr < spec.min_lr:
            return (
                f"{name} {lr:g} is a factor on the learning rate that {spec.name} estimates itself, and nothing would "
                f"be learned with it; set it to {spec.default_lr:g}, or at least to {spec.min_lr:g}"
            )
    factors = {layer_patterns.parse_pattern(entry).factor for entry in config.train.layers} - {0.0, 1.0}
    if factors and spec.estimates_rate:
        return (
            f"train.layers: {spec.name} estimates one learning rate for all layers, so none can have a factor such as "
            f"={max(factors):g}; leave it out"
        )
    if not spec.averages_weights:
        return ""
    if config.optimizer.betas[0] == 0:
        return f"optimizer.betas: the first is 0, and {spec.name} averages with it; use 0.9"
    schedule = next((stage.schedule for stage in config.stages() if stage.schedule != "constant"), "")
    if schedule:
        return f"schedule {schedule} does not go with {spec.name}, whose average replaces a schedule; use constant"
    if config.train.ema_decay > 0:
        decay = config.train.ema_decay
        return f"train.ema_decay {decay:g} does not go with {spec.name}, which averages the weights itself; set it to 0"
    if text.train or config.trains_word:
        what = "text_encoder.train" if text.train else f"adapter.kind {config.adapter.kind}"
        return (
            f"{what} does not go with {spec.name}: what it trains is used as it is at a step, and the weights of this "
            "optimizer are meant to be averaged; use adamw8bit or prodigy"
        )
    return ""


def shard_conflict(config: Config, memory: str = "") -> str:
    """Return why other settings do not go with distributed.shard, '' if they do. memory: instead of optimizer.memory"""
    shard, spec, memory = config.distributed.shard, OPTIMIZERS[config.optimizer.name], memory or config.optimizer.memory
    mode = MEMORY_MODES.get(memory)
    if shard == "none":
        return ""
    if spec.estimates_rate:
        return (
            f"distributed.shard {shard} does not go with {spec.name}, which estimates one learning rate from all "
            "weights at once; use adamw8bit, or distributed.shard none"
        )
    if mode is not None and mode.streams_weights:
        return (
            f"distributed.shard {shard} does not go with optimizer.memory {memory}, which keeps each "
            "process's weights in its own host memory; use paged, or distributed.shard none"
        )
    if shard == "states":
        return ""
    if not spec.steps_inside_backward:
        return (
            f"distributed.shard full needs optimizer.name adamw8bit, not {spec.name}; or use distributed.shard states"
        )
    if config.optimizer.moments != "8bit":
        return (
            f"distributed.shard full does not go with optimizer.moments {config.optimizer.moments}, whose blocks are "
            "not put together from pieces of a weight; use 8bit, or distributed.shard states"
        )
    if config.adapter.kind != "none":
        return (
            f"distributed.shard full cuts all of the UNet's weights, and adapter.kind {config.adapter.kind} trains a "
            "few MB beside them; use distributed.shard none"
        )
    if config.train.kernels == "on":
        return (
            "distributed.shard full does not go with train.kernels on, whose layers share weights that would be cut; "
            "set train.kernels to auto, or use distributed.shard states"
        )
    if config.train.checkpointing == "offload":
        return (
            "distributed.shard full does not go with train.checkpointing offload, which would copy gathered "
            "weights to host memory with the activations; use full"
        )
    if config.optimizer.clipping == "per-tensor":
        return (
            "distributed.shard full does not go with optimizer.clipping per-tensor, which needs each weight's norm "
            "over all processes inside the backward pass; use auto"
        )
    return ""


class ResolvedStage:
    """A stage with inherited values filled in.

    config: the run's settings as they are in this stage. Settings of [train] and [optimizer] that a stage may override
    are attributes, too.
    """

    batch_size: int
    accumulate: int
    max_grad_norm: float
    lr: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    lr_start: float
    lr_end: float
    lr_rise: float
    lr_cycles: int
    lr_cycle_decay: float
    lr_power: float

    def __init__(self, config: Config, stage: OwnOfStage):
        self.epochs, self.start_from = stage.epochs, stage.start_from
        self.config = with_stage(config, stage)
        for table, section in FLAT_TABLES.items():
            for name in overridable(section):
                setattr(self, name, getattr(getattr(self.config, table), name))

    def flat(self) -> dict[str, object]:
        """Return the stage's own settings, and those of [train] and [optimizer] by name."""
        names = [name for section in FLAT_TABLES.values() for name in overridable(section)]
        own = {name: getattr(self, name) for name in OwnOfStage.model_fields}
        return own | {name: getattr(self, name) for name in names}


def with_stage(config: Config, stage: OwnOfStage) -> Config:
    """Return a run's settings as they are in a stage: those that the stage sets replace the run's."""
    changed: dict[str, Section] = {}
    for table, section in (*FLAT_TABLES.items(), *NESTED_TABLES.items()):
        attribute = attribute_of(table)
        own = stage if table in FLAT_TABLES else getattr(stage, attribute)
        values = {} if own is None else {name: getattr(own, name) for name in overridable(section)}
        values = {name: value for name, value in values.items() if value is not None}
        if values:
            changed[attribute] = getattr(config, attribute).model_copy(update=values)
    return config.model_copy(update=changed) if changed else config


def changed_settings(before: Config, after: Config) -> list[str]:
    """Return what differs between two runs' settings, such as "loss.kind huber"; [[stage]] tables are left out."""
    changes = []
    for attribute, field in Config.model_fields.items():
        one, other = getattr(before, attribute), getattr(after, attribute)
        if attribute == "stage" or one is other:
            continue
        changes += [
            f"{field.alias or attribute}.{name} {getattr(other, name)}"
            for name in type(one).model_fields
            if getattr(one, name) != getattr(other, name)
        ]
    return changes
