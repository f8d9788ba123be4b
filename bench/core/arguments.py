"""The arguments of `safelight bench`; torch is imported when a measurement runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

Base = Annotated[str, arg(metavar="BASE", help="as model.base: tiny, random:sd15, a diffusers folder")]
LatentSize = Annotated[
    int, arg(help="side of the square latents, in latent pixels; 64 is SD1.5 at 512 px; 0: the model's own")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    arg(help="of weights and arithmetic; auto: 16 bits on a GPU, fp32 on a CPU"),
]
Checkpointing = Annotated[
    Literal["none", "selective", "full"], arg(help="what of the activations is computed again in backward")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], arg(help="auto: the GPU where there is one")]
Images = Annotated[int, arg(help="images a step")]
Card = Annotated[
    str, arg(metavar="CARD", help="count for a card that is not here, by its data sheet: t4, rtx4090, a100")
]
AsJson = Annotated[bool, arg(help="print the result as JSON")]
_Recipe = Literal["diffusers", "diffusers-compiled", "diffusers-16bit", "everydream", "kohya", "kohya-fused", "mlperf"]
Append = Annotated[
    Path | None, arg(metavar="FILE", help="add the result lines to this .jsonl", help_behavior_hint="(default: none)")
]
BaseOfDevice = Annotated[
    str, arg(metavar="BASE", help="as model.base", help_behavior_hint="(default: random:sd15 on a GPU, tiny on a CPU)")
]


@dataclass
class Step:
    """Time the training step on this machine."""

    base: Base = "tiny"
    latent_size: LatentSize = 0
    batch_size: Annotated[
        tuple[int, ...], arg(metavar="N [N ...]", help="images a step; one variant each, interleaved")
    ] = (1, 4)
    recipe: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME [NAME ...]",
            help="safelight, with a technique more or less: -unpatched, -fused (steps inside backward), -graphs, "
            "-fused-graphs, -cudnn-benchmark; or a recipe of `bench baseline`; one variant each",
        ),
    ] = ("safelight",)
    precision: Precision = "auto"
    optimizer: Annotated[Literal["adamw8bit", "adamw"], arg(help="of ours and of the recipes")] = "adamw8bit"
    checkpointing: Checkpointing = "none"
    loader: Annotated[bool, arg(help="read the batches from a cache on disk, as training does")] = False
    separate: Annotated[bool, arg(help="one variant after another instead of interleaved: the memory of one")] = False
    repeats: Annotated[int, arg(help="timed steps a variant")] = 10
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line a variant")] = False


@dataclass
class Baseline(Step):
    """Time a published recipe's step on this machine, and ours beside it."""

    recipe: Annotated[
        Positional[tuple[_Recipe, ...]],
        arg(metavar="NAME...", help=", ".join(get_args(_Recipe))),
    ] = ("diffusers",)


@dataclass
class Count:
    base: Base = "tiny"
    latent_size: LatentSize = 0
    batch_size: Images = 1
    precision: Annotated[
        Literal["bf16", "fp16", "fp32", "autocast-bf16", "autocast-fp16"],
        arg(help="of weights, or of autocast over fp32"),
    ] = "bf16"
    layout: Annotated[Literal["nchw", "channels_last"], arg(help="memory layout of images and convolutions")] = "nchw"
    patched: Annotated[bool, arg(help="with our kernels in the UNet; wants --layout channels_last")] = False
    checkpointing: Checkpointing = "none"
    optimizer: Annotated[Literal["none", "adamw", "adamw8bit"], arg(help="adamw8bit is bitsandbytes' here")] = (
        "adamw8bit"
    )
    profile: Annotated[bool, arg(help="run the step on this machine too, and put the profiler's table beside it")] = (
        False
    )
    append: Append = None
    json: AsJson = False


@dataclass
class Roofline:
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
            help="with its memory mode: 'adamw8bit, near'; auto: adamw8bit on a GPU, adamw on a CPU",
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
    golden: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="the figures to hold",
            help_behavior_hint="(default: bench/results/counts.jsonl)",
        ),
    ] = None
    base: Annotated[
        str, arg(metavar="BASE", help="check the configs of this base alone", help_behavior_hint="(default: all)")
    ] = ""


@dataclass
class Compare:
    a: Annotated[Positional[str], arg(metavar="A", help="a .jsonl of results, or a commit in bench/results")]
    b: Annotated[Positional[str], arg(metavar="B", help="what to compare it with")]
    at_most: Annotated[
        float, arg(metavar="SHARE", help="fail where B is slower than A by more than this: 0.05 is 5 %; 0: never")
    ] = 0.0
    json: AsJson = False


@dataclass
class Plot:
    results: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="FILE...", help="results as .jsonl", help_behavior_hint="(required)")
    ]
    out: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER", help="where the pictures go")] = Path("runs/bench")


@dataclass
class Loader:
    base: Annotated[str, arg(metavar="BASE", help="whose rows' shapes")] = "random:sd15"
    latent_size: LatentSize = 0
    rows: Annotated[int, arg(help="cached rows; 100000 take about 55 GiB of disk with all sources")] = 500
    batch_size: Images = 8
    sources: Annotated[
        tuple[Literal["cache", "cache-ahead", "npz", "pt", "decode"], ...],
        arg(metavar="NAME [NAME ...]", help="what to compare: cache, cache-ahead, npz, pt, decode"),
    ] = ("cache", "cache-ahead", "npz", "pt", "decode")
    repeats: Annotated[int, arg(help="timed epochs a source")] = 3
    dir: Annotated[
        Path | None,
        arg(metavar="FOLDER", help="where the rows are written", help_behavior_hint="(default: a temporary one)"),
    ] = None
    append: Append = None
    json: AsJson = False


@dataclass
class Kernels:
    model: Annotated[
        tuple[Literal["sd15", "sd21", "sdxl"], ...],
        arg(metavar="NAME [NAME ...]", help="whose layers: sd15, sd21 (at 768 px), sdxl"),
    ] = ("sd15",)
    batch_size: Annotated[tuple[int, ...], arg(metavar="N [N ...]", help="images a step")] = (1,)
    ops: Annotated[
        tuple[str, ...], arg(metavar="NAME [NAME ...]", help="kernels by name", help_behavior_hint="(default: all)")
    ] = ()
    precision: Annotated[Literal["bf16", "fp16", "fp32"], arg(help="of what the kernels read and write")] = "bf16"
    shapes: Annotated[int, arg(help="shapes timed of each kernel, those that move most")] = 2
    times: Annotated[
        Literal["auto", "yes", "no"], arg(help="auto: on a GPU; on a CPU they are the references' and say little")
    ] = "auto"
    no_compile: Annotated[bool, arg(help="leave torch.compile out, which takes seconds a layer to begin")] = False
    repeats: Annotated[int, arg(help="timed runs of each pass")] = 20
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line a result")] = False


@dataclass
class Aot:
    all: Annotated[bool, arg(help="compile what kernels/aot/aot.json lacks, for all targets, and write it there")] = (
        False
    )
    json: AsJson = False


@dataclass
class Optimizer:
    precision: Annotated[Literal["bf16", "fp16", "fp32"], arg(help="of the weights")] = "bf16"
    every: Annotated[int, arg(help="of SD1.5's 686 tensors each n-th by size; 0: 4 on a GPU, 64 on a CPU")] = 0
    repeats: Annotated[int, arg(help="timed steps a variant")] = 10
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line a variant")] = False


@dataclass
class Memory:
    base: BaseOfDevice = ""
    latent_size: LatentSize = 0
    batch_size: Images = 1
    precision: Precision = "auto"
    optimizer: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME [NAME ...]",
            help="by name, memory mode or both: adamw, near, 'adamw8bit, exact'",
            help_behavior_hint="(default: all)",
        ),
    ] = ()
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line a combination")] = False


@dataclass
class Attention:
    model: Annotated[
        tuple[Literal["sd15", "sd21", "sdxl"], ...],
        arg(metavar="NAME [NAME ...]", help="whose shapes: sd15, sd21 (at 768 px), sdxl"),
    ] = ("sd15", "sd21", "sdxl")
    batch_size: Annotated[int, arg(help="images a step; 0: 8 on a GPU, 1 on a CPU")] = 0
    precision: Precision = "auto"
    repeats: Annotated[int, arg(help="timed runs of each pass; 0: 20 on a GPU, 3 on a CPU")] = 0
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line a shape")] = False


@dataclass
class Loop:
    base: Base = "tiny"
    latent_size: LatentSize = 0
    batch_size: Images = 4
    precision: Precision = "auto"
    optimizer: Annotated[
        Literal["adamw8bit", "bnb_adamw8bit", "adamw"], arg(help="ours; EveryDream's is adamw8bit")
    ] = "adamw8bit"
    checkpointing: Checkpointing = "none"
    photographs: Annotated[int, arg(help="how many, made for the purpose; a multiple of the batch size")] = 48
    epochs: Annotated[int, arg(help="passes over the photographs; the first of each loop is told apart")] = 4
    device: Device = "auto"
    append: Append = None
    json: Annotated[bool, arg(help="print one JSON line a loop")] = False


@dataclass
class Quick:
    device: Device = "auto"
    append: Append = None
    json: AsJson = False


@dataclass
class All:
    out: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER", help="where results.jsonl and logs go")]
    minutes: Annotated[float, arg(help="minutes to spend; what does not fit is left out")] = 8.0
    base: BaseOfDevice = ""
    latent_size: LatentSize = 0
    only: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME [NAME ...]", help="parts by name: steps, attention, ...", help_behavior_hint="(default: all)"
        ),
    ] = ()
    device: Device = "auto"
