"""The tables of a run's settings, one pydantic model: names, kinds, defaults, and what each is for.

Every field carries its documentation as the docstring below it; `safelight init` writes those as comments, and the
command line shows them as help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from safelight.errors import UserError
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS, help_text

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Schedule = Literal["constant", "linear", "cosine"]
if TYPE_CHECKING:
    OptimizerName = MemoryModeName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    MemoryModeName = Literal[("auto", *MEMORY_MODES)]
AVERAGE_OF_PAGED = (
    "train.ema_decay reads the weights' remainders on the device at every step, and optimizer.memory paged keeps them in "
    "host memory; set train.ema_decay to 0, or optimizer.memory to exact"
)
# marks a stage's value that falls back to the run's, for the help
INHERITED = tyro.conf.arg(
    help_behavior_hint=lambda value: "(default: as outside the stage)" if value == "None" else f"(default: {value})"
)


def is_switch(annotation: object) -> bool:
    """Return whether a setting of this type may be true or false."""
    return annotation is bool or any(part is True for part in get_args(annotation))


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value, info: ValidationInfo):
        # Python counts true as 1, and so does pydantic
        if isinstance(value, bool) and not is_switch(cls.model_fields[info.field_name].annotation):
            raise UserError("true and false are no value here")
        return value


class Run(Section):
    """Where the run is kept and what makes it repeatable."""

    dir: str = "runs/run"
    """Folder of the run: configuration, metrics, checkpoints, samples, report."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 20230801
    """Every random draw of the run is a function of this number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    deterministic: bool = False
    """On a GPU, only operators that give the same bits every time, so that resuming is bit for bit; slower. A CPU always does."""


class Model(Section):
    """What is fine-tuned."""

    base: str = "tiny"
    """`tiny` (embedded), a diffusers folder, a hub id, an SD 1.x or 2.x .safetensors file, or `random:NAME` (untrained)."""
    config: str = ""
    """Folder or hub id with a single file's configs, tokenizer, scheduler and the parts it lacks; empty: SD 1.5's."""
    vae: str = ""
    """Another autoencoder for the base's: a folder (AutoencoderKL or AutoencoderTiny), or a .safetensors file of its size."""
    tokenizer: str = ""
    """Another CLIP tokenizer folder; needs a text encoder of its vocabulary, so only with a `random:` base."""
    clip_skip: Annotated[int, Field(ge=0, le=11)] = 0
    """Text-encoder layers to leave out at the end, as diffusers counts; 0 takes the last, which others call clip skip 1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Weights and arithmetic of the UNet. optimizer.memory completes 16-bit weights to fp32. auto: bf16 or fp16 on a GPU, fp32 on a CPU."""
    attention: Literal["auto", "xformers", "sdpa", "flash", "cudnn", "efficient", "math"] = "auto"
    """Attention's backend. auto: the fastest that a probe finds to work; xformers or sdpa: the fastest of theirs; or one of
    sdpa's by name."""


class Data(Section):
    """What it is trained on, and how photographs become batches."""

    path: str = "datasets/photos"
    """Folder written by `safelight prepare`."""
    resolution: Annotated[int, Field(ge=16, le=4096)] = 512
    """Pixel budget: buckets hold at most resolution x resolution pixels."""
    max_aspect: Annotated[float, Field(ge=1, le=16)] = 4.0
    """Widest bucket, long side over short side."""
    validation_fraction: Fraction = 0.1
    """Share of the photographs held out of training."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """Cached crops a photograph: the plain centre crop, and variants - 1 jittered and flipped ones."""
    crop_jitter: Annotated[float, Field(ge=0, lt=0.5)] = 0.02
    """Most that a jittered variant trims, as a fraction of the crop."""
    flip_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a variant is mirrored."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Chance that a sample is trained with the empty caption, which classifier-free guidance needs."""
    caption_suffix: str = ""
    """Text appended to every caption."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """Storage of latents and text embeddings."""


class Train(Section):
    """The loop."""

    batch_size: Positive = 4
    """Images a micro-step."""
    accumulate: Positive = 1
    """Micro-steps an optimizer step."""
    accumulate_dtype: Literal["auto", "fp32"] = "auto"
    """What the gradients of several micro-steps are added up in: fp32, 4 bytes a parameter; auto, as the weights are: 2 bytes
    for 16-bit ones, whose sums are then rounded at every micro-step."""
    epochs: Positive = 30
    """Passes over the photographs, if there are no [[stage]] tables."""
    max_steps: Count = 0
    """Stop after this many optimizer steps; 0: no limit."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Our kernels in the UNet; runs with and without them resume from each other. auto: on a GPU."""
    checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "none"
    """Recompute activations in backward: selective what costs little, full for about a quarter more work, offload as full,
    what it keeps in pinned host memory. auto: on a GPU the first of none, selective, full, offload that `safelight plan`
    finds to fit; on a CPU none."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record a step once for each shape of batch and replay it by one call of the host; an epoch then meets the batches of a
    bucket one after another. auto: on a GPU where they fit; the log says why not."""
    cudnn_benchmark: bool = False
    """On a GPU let cuDNN time its convolutions at the first batch of each shape and keep the fastest. It takes seconds a shape,
    and the fastest may take memory that `safelight plan` does not count."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradients' global norm; 0: never."""
    ema_decay: Fraction = 0.0
    """Keep a moving average of the weights, which validation, samples and export then use; 0.999 is usual, 0: none."""


class Optimizer(Section):
    """The optimizer and its learning rate."""

    name: Annotated[OptimizerName, Field(description=help_text())] = "adamw8bit"
    memory: MemoryModeName = "auto"
    """What completes 16-bit weights to fp32: exact keeps 2 more bytes a parameter, near 1, rounded none and rounds
    stochastically, fp32 a master of 4; paged keeps exact's and the moments in pinned host memory, 4 bytes a parameter, and
    streams them through the GPU. auto: with adamw8bit on a GPU the first of exact, near, paged, rounded that `safelight plan`
    finds to fit, on a CPU exact; the other optimizers support fp32 only."""
    lr: LearningRate = 1e-6
    """Peak learning rate."""
    fused_backward: Annotated[Literal["auto", True, False], tyro.conf.arg(metavar="{auto,true,false}")] = "auto"
    """Update each part of the UNet inside backward, as soon as its gradients are complete, and free them at once; the global
    gradient norm is then known too late to clip by. Only adamw8bit can. auto: on a GPU, if `safelight plan` finds no other
    way to fit in the same optimizer.memory; on a CPU false."""
    clipping: Literal["auto", "global", "lagged", "per-tensor"] = "auto"
    """Clip by the global norm or, with fused_backward, by the previous step's (lagged) or by each tensor's own. auto: global or
    lagged."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and second moment; adafactor has its own."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment; AdamW only."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Decoupled: weights shrink by lr * weight_decay a step."""
    schedule: Schedule = "constant"
    """constant, linear or cosine to zero, over the stage."""
    warmup_steps: Count = 0
    """Optimizer steps over which the learning rate rises from zero, at the start of the stage."""

    def fused_choices(self) -> tuple[bool, ...]:
        """Return the values that fused_backward allows, preferred first; `auto` allows what name and clipping support."""
        if self.fused_backward != "auto":
            return (self.fused_backward,)
        if not OPTIMIZERS[self.name].steps_inside_backward or self.clipping == "global":
            return (False,)
        return (False, True) if self.clipping == "auto" else (True,)

    @property
    def is_fused(self) -> bool:
        """Whether steps are taken inside backward. `auto` that no plan has resolved is the preferred choice."""
        return self.fused_choices()[0]

    def clipping_mode(self) -> str:
        """Return what clipping resolves to: global, lagged or per-tensor. Raises UserError if fused_backward rules it out."""
        if self.clipping == "auto":
            return "lagged" if self.is_fused else "global"
        if self.is_fused == (self.clipping == "global"):
            state, use = ("true", "lagged or per-tensor") if self.is_fused else ("false", "global")
            raise UserError(
                f"optimizer.clipping {self.clipping} does not go with optimizer.fused_backward {state}; use auto or {use}"
            )
        return self.clipping


class Memory(Section):
    """What a run may take of a GPU."""

    limit_gib: Annotated[float, Field(ge=0)] = 0.0
    """Never more than this, CUDA's context included: a step that needs more fails rather than spill. 0: no limit."""


class Stage(Section):
    """A stretch of training with its own values; what is not given comes from [train] and [optimizer]."""

    epochs: Positive
    """Passes over the photographs."""
    lr: Annotated[LearningRate | None, INHERITED] = None
    """Peak learning rate."""
    schedule: Annotated[Schedule | None, INHERITED] = None
    """constant, linear or cosine."""
    warmup_steps: Annotated[Count | None, INHERITED] = None
    """Warm-up of this stage."""
    weight_decay: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, INHERITED] = None
    """Weight decay of this stage."""
    max_grad_norm: Annotated[Annotated[float, Field(ge=0)] | None, INHERITED] = None
    """Clipping of this stage."""
    batch_size: Annotated[Positive | None, INHERITED] = None
    """Images a micro-step in this stage."""
    accumulate: Annotated[Positive | None, INHERITED] = None
    """Micro-steps an optimizer step in this stage."""


class Loss(Section):
    """What is predicted and how errors weigh."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """auto takes the base model's."""
    min_snr_gamma: Annotated[float, Field(ge=0)] = 0.0
    """Min-SNR weighting (Hang et al. 2023); 5 is usual, 0: off."""
    offset_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of a constant added to each channel's noise; lets the model learn very dark and light images."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2023); needs v_prediction."""


class Validate(Section):
    """Loss on held-out photographs and on as many of the training set, with fixed noise."""

    every_epochs: Count = 1
    """0: never. Step 0 and the end are always measured otherwise."""
    timesteps: Annotated[int, Field(ge=1, le=64)] = 4
    """Timesteps an image, one from each of as many equal bands."""
    batch_size: Positive = 8
    """Images at a time; does not change the noise."""
    max_images: Positive = 64
    """Most images of either set."""


class Sample(Section):
    """Images from fixed prompts and fixed noise during the run."""

    prompts: list[str] = []
    """Empty: captions of the first validation photographs."""
    num_prompts: Annotated[int, Field(ge=1, le=64)] = 5
    """How many validation captions to take where prompts is empty."""
    every_epochs: Count = 5
    """0: never. The base (step 0) and the end are sampled otherwise."""
    sampler: Literal["ddim", "dpm++", "euler"] = "dpm++"
    """How to denoise; dpm++ (2M) needs the fewest steps."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 25
    """Denoising steps."""
    cfg: Annotated[float, Field(ge=0, le=100)] = 7.0
    """Classifier-free guidance scale; 1: none."""
    negative_prompt: str = ""
    """What guidance points away from."""
    width: Count = 0
    """In px; 0: the resolution."""
    height: Count = 0
    """In px; 0: the resolution."""


class Save(Section):
    """Checkpoints, each enough to go on bit for bit."""

    every_epochs: Count = 1
    """0: not by epochs."""
    every_steps: Count = 0
    """0: not by steps."""
    keep: Positive = 2
    """The last so many are kept, and the best by validation loss."""


class Log(Section):
    """What is written while training."""

    every_steps: Positive = 10
    """Optimizer steps between lines of metrics.jsonl, each the mean over them."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""


class Config(Section):
    """Everything a run is: with the same dataset and code, the same config gives the same weights.

    The table [validate] is the attribute `validate_`, since pydantic's BaseModel owns the name `validate`.
    """

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    memory: Memory = Memory()
    stage: list[Stage] = []
    loss: Loss = Loss()
    validate_: Annotated[Validate, tyro.conf.arg(name="validate")] = Field(default=Validate(), alias="validate")
    sample: Sample = Sample()
    save: Save = Save()
    log: Log = Log()

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_by_name=True, validate_by_alias=True
    )

    def stages(self) -> list[ResolvedStage]:
        """Return the stages with every value filled in; one made of [train] and [optimizer] if none is given."""
        given = self.stage or [Stage(epochs=self.train.epochs)]
        return [ResolvedStage(self, stage) for stage in given]


class ResolvedStage:
    """A stage's values, its own or the config's."""

    def __init__(self, config: Config, stage: Stage):
        def own(name: str, table: Section):
            value = getattr(stage, name)
            return getattr(table, name) if value is None else value

        self.epochs = stage.epochs
        self.lr: float = own("lr", config.optimizer)
        self.schedule: str = own("schedule", config.optimizer)
        self.warmup_steps: int = own("warmup_steps", config.optimizer)
        self.weight_decay: float = own("weight_decay", config.optimizer)
        self.max_grad_norm: float = own("max_grad_norm", config.train)
        self.batch_size: int = own("batch_size", config.train)
        self.accumulate: int = own("accumulate", config.train)
