"""The arguments of each `safelight bench` command, as dataclasses for tyro. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

from safelight.errors import UserError

Base = Annotated[str, arg(metavar="BASE", help="model, as in model.base: tiny, random:sd15 or a diffusers folder")]
LatentSize = Annotated[
    int, arg(help="side of the square latents: 64 is SD1.5 at 512 px; 0: the size the model was made for")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    arg(help="dtype of weights and arithmetic; auto: 16-bit on a GPU, fp32 on a CPU"),
]
Checkpointing = Annotated[
    Literal["none", "selective", "full"], arg(help="which activations are recomputed in backward")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], arg(help="auto: the GPU if there is one")]
Images = Annotated[int, arg(help="images per step")]
Card = Annotated[
    str,
    arg(metavar="CARD", help="predict for a card that is not here, from its data sheet: t4, rtx4090, a100"),
]
AsJson = Annotated[bool, arg(help="print the result as JSON")]
RecipeName = Literal[
    "diffusers", "diffusers-compiled", "diffusers-16bit", "everydream", "kohya", "kohya-fused", "mlperf"
]
Append = Annotated[
    Path | None,
    arg(metavar="FILE", help="append the result lines to this .jsonl file", help_behavior_hint="(default: none)"),
]
BaseOfDevice = Annotated[
    str,
    arg(
        metavar="BASE",
        help="model, as in model.base",
        help_behavior_hint="(default: random:sd15 on a GPU, tiny on a CPU)",
    ),
]


@dataclass
class Step:
    """Time the training step on this machine."""

    base: Base = "tiny"
    latent_size: LatentSize = 0
    batch_size: Annotated[
        tuple[int, ...], arg(metavar="N [N ...]", help="images per step; each size is timed as a variant")
    ] = (1, 4)
    recipe: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME [NAME ...]",
            help="safelight, or safelight with one technique changed: safelight-unpatched, -fused (optimizer step "
            "inside backward), -graphs, -fused-graphs, -cudnn-benchmark, -lora, -lora-nf4 (on a quantized base); or a "
            "recipe of `bench baseline`",
        ),
    ] = ("safelight",)
    precision: Precision = "auto"
    optimizer: Annotated[Literal["adamw8bit", "adamw"], arg(help="optimizer of our step and of the recipes")] = (
        "adamw8bit"
    )
    checkpointing: Checkpointing = "none"
    loader: Annotated[bool, arg(help="read the batches from a cache on disk, as training does")] = False
    separate: Annotated[
        bool, arg(help="time one variant after another instead of interleaving them; needs less memory")
    ] = False
    repeats: Annotated[int, arg(help="timed steps per variant")] = 10
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line per variant")] = False


@dataclass
class Baseline(Step):
    """Time the step of published recipes on this machine, and ours next to them."""

    recipe: Annotated[
        Positional[tuple[RecipeName, ...]],
        arg(metavar="NAME...", help=f"recipes: {', '.join(get_args(RecipeName))}"),
    ] = ("diffusers",)


@dataclass
class Count:
    """Count what a training step does, on meta tensors."""

    base: Base = "tiny"
    latent_size: LatentSize = 0
    batch_size: Images = 1
    precision: Annotated[
        Literal["bf16", "fp16", "fp32", "autocast-bf16", "autocast-fp16"],
        arg(help="dtype of the weights, or of autocast over fp32 weights"),
    ] = "bf16"
    layout: Annotated[Literal["nchw", "channels_last"], arg(help="memory layout of images and convolutions")] = "nchw"
    patched: Annotated[bool, arg(help="use our kernels in the UNet; requires --layout channels_last")] = False
    checkpointing: Checkpointing = "none"
    optimizer: Annotated[
        Literal["none", "adamw", "adamw8bit"], arg(help="adamw8bit is bitsandbytes' implementation here, not ours")
    ] = "adamw8bit"
    profile: Annotated[
        bool, arg(help="also run the step on this machine and print the profiler's figures next to the counts")
    ] = False
    append: Append = None
    json: AsJson = False


@dataclass
class Roofline:
    """Compare a training step with the limits of the device."""

    model: Annotated[
        Literal["auto", "tiny", "sd15", "sd21", "sdxl"], arg(help="auto: sd15 on a GPU, tiny on a CPU")
    ] = "auto"
    latent_size: LatentSize = 0
    batch_size: Images = 1
    precision: Precision = "auto"
    optimizer: Annotated[
        str,
        arg(
            metavar="NAME",
            help="name, or name and memory mode: 'adamw8bit, near'; auto: adamw8bit on a GPU, adamw on a CPU",
        ),
    ] = "auto"
    checkpointing: Checkpointing = "none"
    gpu: Annotated[Card, arg(help_behavior_hint="(default: measure this machine)")] = ""
    repeats: Annotated[int, arg(help="timed steps without the profiler")] = 10
    steps: Annotated[int, arg(help="steps under the profiler")] = 3
    device: Device = "auto"
    append: Append = None
    json: AsJson = False


@dataclass
class Gate:
    """Count again what the golden lines hold, and fail if a figure rose."""

    golden: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="golden counts to compare with",
            help_behavior_hint="(default: bench/results/counts.jsonl)",
        ),
    ] = None
    base: Annotated[
        str, arg(metavar="BASE", help="check only the configs of this base", help_behavior_hint="(default: all)")
    ] = ""


@dataclass
class Compare:
    """Compare two sets of results."""

    a: Annotated[
        Positional[str],
        arg(metavar="A", help="a .jsonl of results, or a commit whose lines are in bench/results"),
    ]
    b: Annotated[Positional[str], arg(metavar="B", help="the results to compare with A, given the same way")]
    at_most: Annotated[
        float,
        arg(metavar="SHARE", help="exit with 1 if B is slower than A by more than this share: 0.05 is 5 %; 0: never"),
    ] = 0.0
    json: AsJson = False


@dataclass
class Plot:
    """Draw results as pictures."""

    results: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="FILE...", help="result files (.jsonl)", help_behavior_hint="(required)"),
    ]
    out: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER", help="folder to write the pictures to")] = Path(
        "runs/bench"
    )


@dataclass
class Report:
    """Write a page with what was predicted beside what was measured, and the goals."""

    results: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="FILE...", help="result files (.jsonl) of one machine", help_behavior_hint="(required)"),
    ]
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE", help="the page to write")] = Path(
        "runs/bench/predicted.html"
    )
    json: AsJson = False


@dataclass
class Scale:
    """Time a step over several processes."""

    base: BaseOfDevice = ""
    latent_size: LatentSize = 0
    batch_size: Annotated[int, arg(help="images per step of each process")] = 4
    processes: Annotated[
        tuple[int, ...], arg(metavar="N [N ...]", help="numbers of processes; efficiency is over the first")
    ] = (1, 2, 4)
    repeats: Annotated[int, arg(help="timed steps per variant and round")] = 5
    rounds: Annotated[int, arg(help="how often each number of processes is started, in turns")] = 2
    bucket_mib: Annotated[
        float,
        arg(help="size of a bucket of gradients; 0: as in training, and DistributedDataParallel's own"),
    ] = 0.0
    device: Device = "auto"
    append: Append = None
    json: AsJson = False


@dataclass
class Loader:
    """Time the loading of an epoch of batches from several sources."""

    base: Annotated[str, arg(metavar="BASE", help="model that the rows' shapes are taken from")] = "random:sd15"
    latent_size: LatentSize = 0
    rows: Annotated[int, arg(help="cached rows; 100000 rows of all sources take about 55 GiB of disk")] = 500
    batch_size: Images = 8
    sources: Annotated[
        tuple[Literal["cache", "cache-ahead", "npz", "pt", "decode"], ...],
        arg(
            metavar="NAME [NAME ...]",
            help="cache: our cache; cache-ahead: our cache with prefetch, as in training; npz, pt: one file per "
            "row; decode: photographs decoded every epoch",
        ),
    ] = ("cache", "cache-ahead", "npz", "pt", "decode")
    repeats: Annotated[int, arg(help="timed epochs per source")] = 3
    dir: Annotated[
        Path | None,
        arg(metavar="FOLDER", help="folder to write the rows to", help_behavior_hint="(default: a temporary one)"),
    ] = None
    append: Append = None
    json: AsJson = False


@dataclass
class Cache:
    """Time opening and reading a cache of more and more rows, and filling one."""

    rows: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]", help="numbers of rows to compare")] = (500, 100_000)
    photos: Annotated[int, arg(help="photographs to fill a cache with; 0 leaves this part out")] = 64
    batch_size: Images = 8
    repeats: Annotated[int, arg(help="times each is opened and filled")] = 5
    dir: Annotated[
        Path | None,
        arg(metavar="FOLDER", help="folder to write the rows to", help_behavior_hint="(default: a temporary one)"),
    ] = None
    append: Append = None
    json: AsJson = False


@dataclass
class Kernels:
    """Compare each kernel with plain PyTorch and torch.compile."""

    model: Annotated[
        tuple[Literal["sd15", "sd21", "sdxl"], ...],
        arg(metavar="NAME [NAME ...]", help="models whose layers are used: sd15, sd21 (at 768 px), sdxl"),
    ] = ("sd15",)
    batch_size: Annotated[tuple[int, ...], arg(metavar="N [N ...]", help="images per step")] = (1,)
    ops: Annotated[
        tuple[str, ...],
        arg(metavar="NAME [NAME ...]", help="kernels to measure, by name", help_behavior_hint="(default: all)"),
    ] = ()
    precision: Annotated[Literal["bf16", "fp16", "fp32"], arg(help="dtype that the kernels read and write")] = "bf16"
    shapes: Annotated[int, arg(help="shapes to time per kernel, starting with those that move the most bytes")] = 2
    times: Annotated[
        Literal["auto", "yes", "no"],
        arg(help="auto: only on a GPU; yes on a CPU times the PyTorch references, which says little"),
    ] = "auto"
    no_compile: Annotated[bool, arg(help="skip torch.compile, which takes seconds to compile each layer")] = False
    repeats: Annotated[int, arg(help="timed runs of each pass")] = 20
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line per result")] = False


@dataclass
class Aot:
    """Compile the kernels for other GPUs and report what they use."""

    all: Annotated[
        bool, arg(help="compile everything that kernels/aot/aot.json lacks, for all targets, and store it there")
    ] = False
    json: AsJson = False


@dataclass
class Optimizer:
    """Time every optimizer and count the bytes it holds and moves."""

    precision: Annotated[Literal["bf16", "fp16", "fp32"], arg(help="dtype of the weights")] = "bf16"
    every: Annotated[
        int, arg(help="use every n-th of SD1.5's 686 tensors, ordered by size; 0: 4 on a GPU, 64 on a CPU")
    ] = 0
    repeats: Annotated[int, arg(help="timed steps per variant")] = 10
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line per variant")] = False


@dataclass
class Memory:
    """Measure the memory of a training step by optimizer, memory mode and checkpointing."""

    base: BaseOfDevice = ""
    latent_size: LatentSize = 0
    batch_size: Images = 1
    precision: Precision = "auto"
    optimizer: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME [NAME ...]",
            help="optimizers by name, memory mode or both: adamw, near, 'adamw8bit, exact'",
            help_behavior_hint="(default: all)",
        ),
    ] = ()
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line per combination")] = False


@dataclass
class Attention:
    """Time every attention backend at the shapes of the models."""

    model: Annotated[
        tuple[Literal["sd15", "sd21", "sdxl"], ...],
        arg(metavar="NAME [NAME ...]", help="models whose attention shapes are used: sd15, sd21 (at 768 px), sdxl"),
    ] = ("sd15", "sd21", "sdxl")
    batch_size: Annotated[int, arg(help="images per step; 0: 8 on a GPU, 1 on a CPU")] = 0
    precision: Precision = "auto"
    repeats: Annotated[int, arg(help="timed runs of each pass; 0: 20 on a GPU, 3 on a CPU")] = 0
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line per shape")] = False


@dataclass
class Loop:
    """Time whole epochs of our training loop and of EveryDream's."""

    base: Base = "tiny"
    latent_size: LatentSize = 0
    batch_size: Images = 4
    precision: Precision = "auto"
    optimizer: Annotated[
        Literal["adamw8bit", "bnb_adamw8bit", "adamw"],
        arg(help="our optimizer; EveryDream's loop uses torch's AdamW for adamw, else bitsandbytes' AdamW8bit"),
    ] = "adamw8bit"
    checkpointing: Checkpointing = "none"
    photographs: Annotated[int, arg(help="number of generated photographs; a multiple of the batch size")] = 48
    epochs: Annotated[int, arg(help="passes over the photographs; the first is reported separately")] = 4
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line per loop")] = False


@dataclass
class Quick:
    """Time our step against the diffusers recipe."""

    device: Device = "auto"
    append: Append = None
    json: AsJson = False


@dataclass
class All:
    """Run every benchmark, the most valuable ones first."""

    out: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER", help="folder to write results.jsonl and logs to")]
    minutes: Annotated[float, arg(help="time limit; benchmarks that do not fit are skipped")] = 8.0
    base: BaseOfDevice = ""
    latent_size: LatentSize = 0
    only: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME [NAME ...]",
            help="parts to run, by name: steps, attention, ...",
            help_behavior_hint="(default: all)",
        ),
    ] = ()
    device: Device = "auto"


def check_positive(options: object, *names: str) -> None:
    """Raise UserError, naming the option, if one of these is below 1 or an empty list."""
    for name in names:
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if value == ():
            raise UserError(f"{option} is empty; give one or more values")
        for number in value if isinstance(value, tuple) else (value,):
            if number < 1:
                raise UserError(f"{option} {number} is below 1; use 1 or more")
