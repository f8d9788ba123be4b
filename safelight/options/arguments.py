"""The arguments of each command, as dataclasses for tyro; parsing.py reads them. Imported only when a command runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagConversionOff, Positional, UseAppendAction, arg

from safelight.trainer.captioning.options import DEFAULT_CLIP, DEFAULT_MODEL, MIN_CONFIDENCE
from safelight.trainer.config.presets import PRESETS
from safelight.trainer.config.schema import Config
from safelight.trainer.registry.samplers import SAMPLERS, SPACINGS


def _own(metavar: str, text: str, default: str) -> object:
    """Return the help of an option whose default comes from elsewhere, such as the run's settings."""
    return arg(metavar=metavar, help=text, help_behavior_hint=f"(default: {default})")


Gpus = Annotated[
    int | None,
    _own("INT", "share the work among this many of this machine's GPUs; without a GPU, among processes", "1"),
]
EmbeddingFiles = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(name="embedding"),
    _own(
        "FILE",
        "embedding that prompts may name: a file of diffusers or A1111, whose name without ending is the word, or "
        "NAME=FILE; can be given several times",
        "those of the run's sample.embeddings",
    ),
]
RunFolder = Annotated[Positional[Path], arg(metavar="RUN", help="run folder, for example runs/tiny")]


@dataclass
class Init:
    preset: Annotated[
        Positional[str], arg(metavar="PRESET", help="; ".join(f"{name}: {text}" for name, (text, _) in PRESETS.items()))
    ]
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE", help="file to write")] = Path("run.toml")
    force: Annotated[bool, arg(help="overwrite an existing file")] = False


@dataclass
class Prepare:
    sources: Annotated[
        Positional[tuple[Path, ...]],
        arg(
            metavar="SRC...",
            help="folders of photos, single files, or a table of the Unsplash Lite dataset: unsplash:photos.tsv000",
            help_behavior_hint="(required)",
        ),
    ]
    out: Annotated[Path, arg(aliases=["-o"], metavar="DATASET", help="folder to write")] = Path("datasets/photos")
    max_megapixels: Annotated[float, arg(help="shrink larger photos to this many million pixels")] = 1.5
    quality: Annotated[int, arg(help="encoder quality of photos that must be re-encoded, 1 to 100")] = 95
    image_format: Annotated[Literal["jpeg", "webp"], arg(help="format of photos that must be re-encoded")] = "jpeg"
    alpha: Annotated[
        str,
        arg(
            metavar="COLOUR|mask",
            help="what transparent parts of photos are composited over: a colour, such as white, black or '#808080'; "
            "mask: white, and only what is opaque is learned",
        ),
    ] = "white"
    prune: Annotated[
        bool, arg(help="remove photos from the dataset that are not, or no longer, in the sources given")
    ] = False
    drop_near_duplicates: Annotated[bool, arg(help="of photos that show the same picture, keep only the largest")] = (
        False
    )
    limit: Annotated[int | None, _own("INT", "unsplash: number of photos to draw from the table", "500")] = None
    width: Annotated[int | None, _own("PX", "unsplash: download photos at most this wide", "1600")] = None
    seed: Annotated[int | None, _own("INT", "unsplash: seed of the draw", "0")] = None
    where: Annotated[
        str | None,
        _own(
            "TEXT",
            "unsplash: draw only from rows that meet conditions on columns, or on landscape, portrait, square, "
            "shorter_side, camera: 'landscape and photo_width >= 1600 and camera ~ canon'",
            "all",
        ),
    ] = None
    captions: Annotated[
        Literal["ai", "photographer", "none"] | None,
        _own("{ai,photographer,none}", "unsplash: which of the table's descriptions become captions", "none"),
    ] = None
    kohya: Annotated[
        bool, arg(help="read folders named as kohya's: in 10_my_dog, each photo is used 10 times, captioned my_dog")
    ] = False
    comma_tags: Annotated[bool, arg(help="read captions as lists: what follows the first comma are tags")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False


@dataclass
class Caption:
    dataset: Annotated[Positional[Path], arg(metavar="DATASET", help="dataset folder, as safelight prepare makes it")]
    model: Annotated[
        str | None,
        _own(
            "MODEL",
            "captioner: hub id or folder of a BLIP, BLIP-2, Florence-2 or other image-text-to-text model; tiny: the "
            "built-in one, which knows the demo's scenes; a CLIP for tags",
            f"{DEFAULT_MODEL}, or {DEFAULT_CLIP}",
        ),
    ] = None
    preset: Annotated[
        Literal["everydream2"] | None,
        _own(
            "{everydream2}",
            "settings to start from; everydream2: the source report's, 16 beams, 30 to 48 tokens, penalty 1.4",
            "none",
        ),
    ] = None
    prompt: Annotated[str | None, _own("TEXT", "what the model is asked, or a task token", "the usual one")] = None
    num_beams: Annotated[int | None, _own("INT", "beams of the search; 1 is greedy", "3, or 1 with --top-p")] = None
    min_new_tokens: Annotated[
        int | None,
        arg(aliases=["--min-words"]),
        _own("INT", "least length; EveryDream calls it min_length, and the report min_words: both are tokens", "0"),
    ] = None
    max_new_tokens: Annotated[int | None, _own("INT", "greatest length in tokens", "75, what CLIP reads")] = None
    repetition_penalty: Annotated[
        float | None,
        arg(aliases=["--q-factor"]),
        _own("FLOAT", "makes repeated words less likely; 1 does not", "1"),
    ] = None
    top_p: Annotated[
        float | None, _own("FLOAT", "sample from the likeliest tokens of this total probability", "1: no sampling")
    ] = None
    seed: Annotated[int, arg(help="seed of --top-p; each photograph has its own draws")] = 1
    prefix: Annotated[str, arg(metavar="TEXT", help="text before each caption")] = ""
    suffix: Annotated[str, arg(metavar="TEXT", help="text behind each caption, with its own space or comma")] = ""
    replace: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="OLD=NEW", help="replace whole words of the captions; can be given several times"),
    ] = ()
    overwrite: Annotated[bool, arg(help="replace captions, or tags, that people wrote, too")] = False
    tags: Annotated[
        Path | None,
        _own(
            "FILE",
            "instead of captions, write weighted tags: CLIP compares each photograph with the categories and things in "
            "this file, which is written, with the usual ones, if it does not exist",
            "none",
        ),
    ] = None
    tags_from_detector: Annotated[
        str | None,
        _own(
            "MODEL",
            "instead of captions, write weighted tags of what a detector finds: hub id or folder of a DETR, RT-DETR, "
            "D-FINE or YOLOS, or a YOLOX .onnx file; --tags has the categories",
            "none",
        ),
    ] = None
    min_confidence: Annotated[
        float | None, _own("FLOAT", "least probability of what becomes a tag, 0.1 to 1", str(MIN_CONFIDENCE))
    ] = None
    preview: Annotated[
        int | None,
        _own("NUM", "instead, show this many photographs captioned with six settings, in one HTML page", "none"),
    ] = None
    batch_size: Annotated[
        int | None, _own("INT", "photographs at a time; halved if the GPU's memory is full", "32 on a GPU, else 4")
    ] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], arg(help="where the model runs")] = "auto"
    json: Annotated[bool, arg(help="print the result as JSON")] = False


@dataclass
class Sample:
    run: RunFolder
    prompt: Annotated[
        tuple[str, ...],
        arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(required, but with --live those that the run samples)"),
        arg(help="one or more prompts; one image each"),
    ] = ()
    checkpoint: Annotated[str, arg(metavar="WHICH", help="last, best, base (untrained), or a step number")] = "last"
    steps: Annotated[int | None, _own("INT", "number of denoising steps", "the run's")] = None
    cfg: Annotated[
        tuple[float, ...],
        _own(
            "FLOAT [FLOAT ...]",
            "classifier-free guidance scale; 1 turns it off; several draw an image each",
            "the run's",
        ),
    ] = ()
    seed: Annotated[int | None, _own("INT", "seed of the noise", "the run's")] = None
    width: Annotated[int | None, _own("INT", "image width in pixels", "the run's")] = None
    height: Annotated[int | None, _own("INT", "image height in pixels", "the run's")] = None
    sampler: Annotated[
        str | None,
        _own(f"{{{','.join(SAMPLERS)}}}", "sampling algorithm, also by the name it has in A1111 or kohya", "the run's"),
    ] = None
    spacing: Annotated[
        Literal[SPACINGS] | None, _own(f"{{{','.join(SPACINGS)}}}", "spacing of the steps' timesteps", "the run's")
    ] = None
    negative_prompt: Annotated[str | None, _own("TEXT", "text that guidance steers away from", "the run's")] = None
    lora_scale: Annotated[float, arg(help="how much of the run's LoRA to use; 1 is as trained, 0 the base")] = 1.0
    embeddings: EmbeddingFiles = ()
    out: Annotated[Path | None, arg(aliases=["-o"]), _own("FOLDER", "folder for the images", "RUN/images")] = None
    live: Annotated[
        bool,
        arg(
            help="ask the training that is going on in RUN, which draws with its present weights between two steps, "
            "into RUN/samples/live"
        ),
    ] = False
    timeout: Annotated[float, arg(metavar="SECONDS", help="live: how long to wait for the images")] = 600.0
    gpus: Gpus = None


@dataclass
class Compare:
    run: RunFolder
    checkpoints: Annotated[
        str | None,
        arg(aliases=["--checkpoint"]),
        _own(
            "WHICH,...",
            "what to draw beside the base, with commas: last, best, all; a step, or else an epoch (27); 30+4: 4 epochs "
            "into the second stage, after 30 of the first; step-300 and epoch-27 say which",
            "best,last",
        ),
    ] = None
    num: Annotated[
        int, arg(help="number of prompts, up to 1000; the run's own first, then captions of held-out photographs")
    ] = 8
    seeds: Annotated[int, arg(help="pictures of each prompt and model, from as many seeds: the run's and the next")] = 1
    embeddings: EmbeddingFiles = ()
    gpus: Gpus = None


def _axis(example: str, text: str) -> object:
    return _own("AXIS=VALUES", f"{text}, for example {example}", "none")


@dataclass
class Grid:
    run: RunFolder
    x: Annotated[
        str,
        arg(
            metavar="AXIS=VALUES",
            help="what changes from column to column, for example cfg=3,5,7.5 or prompt or replace=red,blue,green",
            help_behavior_hint="(required)",
        ),
    ]
    y: Annotated[str | None, _axis("'steps=10-40 (+10)'", "what changes from row to row")] = None
    z: Annotated[str | None, _axis("checkpoint=base,best,last", "what changes from table to table")] = None
    prompt: Annotated[
        tuple[str, ...],
        arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(default: the first that the run samples)"),
        arg(help="the prompt, or with an axis prompt that has no values several"),
    ] = ()
    checkpoint: Annotated[
        str | None, _own("WHICH", "last, best, base (untrained), a step, or else an epoch", "last")
    ] = None
    steps: Annotated[int | None, _own("INT", "number of denoising steps", "the run's")] = None
    cfg: Annotated[float | None, _own("FLOAT", "classifier-free guidance scale; 1 turns it off", "the run's")] = None
    seed: Annotated[int | None, _own("INT", "seed of the noise, the same for all pictures", "the run's")] = None
    width: Annotated[int | None, _own("INT", "image width in pixels", "the run's")] = None
    height: Annotated[int | None, _own("INT", "image height in pixels", "the run's")] = None
    sampler: Annotated[
        str | None,
        _own(f"{{{','.join(SAMPLERS)}}}", "sampling algorithm, also by the name it has in A1111 or kohya", "the run's"),
    ] = None
    spacing: Annotated[
        Literal[SPACINGS] | None, _own(f"{{{','.join(SPACINGS)}}}", "spacing of the steps' timesteps", "the run's")
    ] = None
    negative_prompt: Annotated[str | None, _own("TEXT", "text that guidance steers away from", "the run's")] = None
    clip_skip: Annotated[
        int | None,
        _own("INT", "layers of the text encoder left out at its end, as in model.clip_skip", "the run's"),
    ] = None
    embeddings: EmbeddingFiles = ()
    max_cells: Annotated[int, arg(help="refuse a grid with more cells than this, up to 5000")] = 500
    name: Annotated[str, _own("NAME", "folder in RUN/grids", "the names of the axes: cfg-steps")] = ""
    gpus: Gpus = None


@dataclass
class Evaluate:
    run: RunFolder
    checkpoints: Annotated[
        str | None,
        arg(aliases=["--checkpoint"]),
        _own("WHICH,...", "what to measure beside the base, named as for `compare`: last, best, all, 27", "best,last"),
    ] = None
    num: Annotated[
        int, arg(help="number of prompts, up to 1000; the run's own first, then captions of held-out photographs")
    ] = 100
    seeds: Annotated[int, arg(help="pictures of each prompt and model")] = 1
    features: Annotated[
        UseAppendAction[tuple[str, ...]],
        _own(
            "MODEL",
            "what pictures are compared by; can be given several times, and the first gives the headline: hub id or "
            "folder of a CLIP or DINOv2, an .onnx file, FID's Inception as .safetensors; tiny: the built-in captioner",
            "the run's autoencoder alone, which is always measured too",
        ),
    ] = ()
    detector: Annotated[
        str,
        _own(
            "MODEL",
            "what finds things for the crop divergence: hub id or folder of a DETR, RT-DETR, D-FINE or YOLOS, or a "
            "YOLOX .onnx file",
            "none, and no crop divergence",
        ),
    ] = ""
    crop_features: Annotated[str, _own("MODEL", "which of --features describes the crops", "the first of them")] = ""
    lpips: Annotated[
        str, _own("FILE", "LPIPS's AlexNet as .safetensors, for the diversity of pictures", "none, and no diversity")
    ] = ""
    guidance: Annotated[
        tuple[float, ...],
        _own("CFG ...", "guidance scales at which the burn check draws all prompts as well", "the run's alone"),
    ] = ()
    flagged: Annotated[
        Path | None,
        _own(
            "FOLDER",
            "copy the pictures that the burn check flags, with their prompts as captions, to FOLDER/burnt and "
            "FOLDER/smoothed: what a negative embedding learns from",
            "none",
        ),
    ] = None
    embeddings: EmbeddingFiles = ()
    suggest: Annotated[bool, arg(help="print only the checkpoint to use, with the reasons")] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], arg(help="where the models of --features and --detector run")] = (
        "auto"
    )
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    gpus: Gpus = None


@dataclass
class Export:
    run: RunFolder
    out: Annotated[
        Path,
        arg(
            aliases=["-o"],
            metavar="FILE",
            help="NAME.safetensors for one file; any other name makes a diffusers folder; of a run that trained an "
            "embedding, its files alone",
        ),
    ]
    checkpoint: Annotated[str, arg(metavar="WHICH", help="last, best or a step number")] = "last"
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None,
        _own("{fp16,bf16,fp32}", "dtype of the exported weights", "fp16; fp32 for an embedding"),
    ] = None
    weights: Annotated[
        Literal["auto", "ema", "trained"],
        arg(help="ema: the moving average; trained: the weights themselves; auto: ema if the run has it, else trained"),
    ] = "auto"
    merge: Annotated[bool, arg(help="of a LoRA: the whole model with the LoRA merged into it")] = False
    layout: Annotated[
        Literal["diffusers", "kohya"],
        arg(help="names in a LoRA's file: those that diffusers and peft read, or kohya's for A1111, Forge and ComfyUI"),
    ] = "diffusers"
    lora_scale: Annotated[float, arg(help="with --merge: how much of the LoRA; 1 is as trained")] = 1.0
    title: Annotated[str, _own("TEXT", "model title stored in the file", "the run's name and step")] = ""
    force: Annotated[bool, arg(help="overwrite existing output")] = False
    card: Annotated[
        bool,
        arg(help="write a model card beside FILE, too: NAME.md and NAME-samples; a folder always has one"),
    ] = False
    push: Annotated[
        str,
        _own(
            "USER/REPO",
            "then upload it to this repository on the Hugging Face hub, a private one, after showing what is uploaded; "
            "the token is that of `hf auth login` or HF_TOKEN",
            "none",
        ),
    ] = ""
    push_existing: Annotated[bool, arg(help="push: upload into a repository that exists, as a new commit")] = False
    public: Annotated[bool, arg(help="push: make a public repository")] = False
    yes: Annotated[bool, arg(help="push: upload without asking")] = False


@dataclass
class Report:
    runs: Annotated[
        Positional[tuple[Path, ...]],
        arg(
            metavar="RUN...",
            help="run folder; several, up to 12, give one page that shows them side by side",
            help_behavior_hint="(required)",
        ),
    ]
    out: Annotated[
        Path | None,
        arg(aliases=["-o"]),
        _own("FILE", "file to write about several runs", "comparison.html in the folder that all of them share"),
    ] = None
    force: Annotated[bool, arg(help="overwrite FILE also if it is not a page about several runs")] = False
    serve: Annotated[
        bool,
        arg(
            help="write nothing: show the report in a browser on this computer, up to date while training goes on. RUN "
            "may be a folder that holds runs, which are listed. Ctrl-C ends it"
        ),
    ] = False
    port: Annotated[
        int | None, _own("INT", "serve: port on 127.0.0.1; 0: any that is free", "8017, or any that is free")
    ] = None


@dataclass
class Demo:
    model: Annotated[
        Literal["tiny", "tiny-xl", "tiny-v"],
        arg(
            help="built-in model to fine-tune: of the kind of Stable Diffusion 1.x, of XL, or of 2.x with v-prediction"
        ),
    ] = "tiny"
    dir: Annotated[Path, arg(metavar="FOLDER", help="folder to work in; an earlier demo there is replaced")] = Path(
        "runs/demo"
    )
    json: Annotated[bool, arg(help="print the scores as JSON")] = False


ConfigFile = Annotated[
    Positional[Path],
    arg(metavar="RUN.TOML", help="settings file of the run, or its run folder", help_behavior_hint="(required)"),
]
# only for the help: overrides.py removes the settings from the arguments before tyro reads them
Settings = Annotated[FlagConversionOff[Config], arg(name="")]


@dataclass
class TrainArguments:
    config: ConfigFile
    settings: Settings
    resume: Annotated[
        bool, arg(help="continue from the newest checkpoint in run.dir; if there is none, say so and start at step 0")
    ] = False
    find_lr: Annotated[
        bool,
        arg(help="instead of training, try rising learning rates and propose one; writes RUN/find_lr, nothing else"),
    ] = False
    gpus: Annotated[
        int | None,
        _own("INT", "train on this many of this machine's GPUs; without a GPU, in as many processes on the CPU", "1"),
    ] = None
    max_restarts: Annotated[
        int, arg(help="gpus: after a fault, go on from the newest checkpoint by itself, at most so many times")
    ] = 0


@dataclass
class CacheArguments:
    config: ConfigFile
    settings: Settings
    verify: Annotated[
        bool,
        arg(help="instead, check every row and encode some again; exit status 1 if one is damaged or missing"),
    ] = False
    sample: Annotated[int | None, _own("INT", "verify: number of rows to encode again", "32")] = None
    stats: Annotated[
        bool, arg(help="instead, show rows and bytes, the latents' mean and std, and photographs far from all others")
    ] = False
    gc: Annotated[
        bool, arg(help="instead, delete the rows that these settings do not need; others that use the dataset: --keep")
    ] = False
    keep: Annotated[
        UseAppendAction[tuple[Path, ...]],
        arg(metavar="RUN.TOML", help="gc: keep what these settings need, too; can be given several times"),
    ] = ()
    dry_run: Annotated[bool, arg(help="gc: delete nothing, only say what would be freed")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    gpus: Gpus = None


@dataclass
class ProfileArguments:
    config: ConfigFile
    settings: Settings
    steps: Annotated[int, arg(help="number of steps to profile, after warm-up")] = 5
    out: Annotated[
        Path, arg(aliases=["-o"], metavar="FOLDER", help="folder for the trace, the page and the results")
    ] = Path("runs/profile")
    append: Annotated[
        Path | None,
        arg(metavar="FILE", help="append the results to this .jsonl file", help_behavior_hint="(default: none)"),
    ] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False


@dataclass
class PlanArguments:
    config: ConfigFile
    settings: Settings
    gpu: Annotated[
        str,
        _own("CARD", "GPU to plan for: t4, rtx3060, rtx4090, ..., or its memory: 8GiB", "auto: the local one"),
    ] = ""
    gpus: Annotated[int | None, _own("N", "plan for so many of these GPUs, one process each", "one GPU")] = None
    link: Annotated[
        Literal["nvlink", "pcie3", "pcie4", "pcie5", "10GbE", "25GbE", "100GbE"] | None,
        _own(
            "{nvlink,pcie3,pcie4,pcie5,10GbE,25GbE,100GbE}",
            "what the GPUs of --gpus are connected by, at its slowest place",
            "the GPU's PCIe link",
        ),
    ] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False
