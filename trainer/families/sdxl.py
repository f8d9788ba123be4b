"""Stable Diffusion XL, for plans and benchmarks: its conditioning has the right shapes, but is not encoded yet."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from safelight.trainer.families.conditioning import SdxlConditioning
from safelight.trainer.families.family import Family

# original size, crop position and target size, two numbers each
NUM_SIZES = 6
PX_PER_LATENT = 8


class StableDiffusionXL(Family):
    """Two text encoders (CLIP ViT-L/14 and OpenCLIP ViT-bigG/14), of which the second also gives a pooled embedding;
    conditioned on sizes; 1024 px."""

    name, title = "sdxl", "Stable Diffusion XL"
    # base and refiner
    text_widths, published_channels = (2048, 1280), [320, 640, 1280]
    text_encoders = ("text_encoder", "text_encoder_2")
    pipeline = "StableDiffusionXLPipeline"
    file_marker = "conditioner.embedders."
    untrainable = "so far only Stable Diffusion 1.x and 2.x can be trained; use random:sd15 or random:sd21"
    implementation = "https://github.com/Stability-AI/generative-models"

    def owns(self, unet_config: Mapping) -> bool:
        return unet_config.get("addition_embed_type") == "text_time" or super().owns(unet_config)

    def architecture(self, prediction_type: str) -> str:
        return "stable-diffusion-xl-v1-base"

    def stand_in_conditioning(
        self, unet_config: Mapping, rows_BTD: Tensor, latent_size: tuple[int, int]
    ) -> SdxlConditioning:
        """Return the text embeddings with a pooled embedding of unit variance and the sizes of an uncropped image."""
        dim = unet_config["projection_class_embeddings_input_dim"] - NUM_SIZES * unet_config["addition_time_embed_dim"]
        height_px, width_px = (PX_PER_LATENT * side for side in latent_size)
        sizes = torch.tensor([[height_px, width_px, 0, 0, height_px, width_px]], dtype=rows_BTD.dtype)
        pooled = _pooled_row(dim).to(rows_BTD.dtype)
        on_device = (row.repeat(len(rows_BTD), 1).to(rows_BTD.device) for row in (pooled, sizes))
        return SdxlConditioning(rows_BTD, *on_device)


@functools.cache
def _pooled_row(dim: int) -> Tensor:
    """Return a fixed random embedding in place of the second text encoder's pooled one, (1, dim) float32."""
    return torch.randn(1, dim, generator=torch.Generator().manual_seed(0))
