"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, whose last hidden state is the only conditioning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from safelight.trainer.config.presets import SD15
from safelight.trainer.families.family import Family
from safelight.trainer.families.original_layout import (
    CLIP_PREFIX,
    OLD_CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    Layout,
    clip_layout,
    open_clip_layout,
)

CHANNELS = [320, 640, 1280, 1280]


class StableDiffusion1(Family):
    """CLIP ViT-L/14, epsilon prediction, 512 px. Owns every UNet that no other family owns, such as the tiny base's."""

    name, title = "sd1", "Stable Diffusion 1.x"
    text_widths, published_channels = (768,), CHANNELS
    default_configs, assumed_prediction = SD15, "epsilon"
    kohya_version = "sd_v1"
    heeds_clip_skip = True
    text_prefixes = (OLD_CLIP_PREFIX, OPEN_CLIP_PREFIX)
    implementation = "https://github.com/CompVis/stable-diffusion"

    def owns(self, unet_config: Mapping) -> bool:
        # the registry tries this family last
        return True

    def architecture(self, prediction_type: str) -> str:
        return "stable-diffusion-v1"

    def text_encoder_layout(self, part: str, names: Iterable[str]) -> Layout:
        return clip_layout(names)

    def text_layouts_in_files(self, part: str, names: Iterable[str]) -> list[Layout]:
        # small models of SD 2.x's kind belong to this family too
        names = list(names)
        return [clip_layout(names), clip_layout(names, OLD_CLIP_PREFIX), open_clip_layout(names)]

    def text_encoder_extras(self, part: str, num_tokens: int) -> dict[str, Tensor]:
        return {f"{CLIP_PREFIX}embeddings.position_ids": torch.arange(num_tokens)[None]}


class StableDiffusion2(Family):
    """OpenCLIP ViT-H/14 without its last layer; epsilon at 512 px, v-prediction at 768 px."""

    name, title = "sd2", "Stable Diffusion 2.x"
    text_widths, published_channels = (1024,), CHANNELS
    text_prefixes = (OPEN_CLIP_PREFIX,)
    kohya_version = "sd_v2"
    implementation = "https://github.com/Stability-AI/stablediffusion"

    def owns(self, unet_config: Mapping) -> bool:
        # of any width: 1.x projects by convolutions, XL is asked before
        return unet_config.get("use_linear_projection", False) or super().owns(unet_config)

    def architecture(self, prediction_type: str) -> str:
        return "stable-diffusion-v2-768-v" if prediction_type == "v_prediction" else "stable-diffusion-v2-512"

    def text_encoder_layout(self, part: str, names: Iterable[str]) -> Layout:
        return open_clip_layout(names)
