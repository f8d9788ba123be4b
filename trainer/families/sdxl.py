"""Stable Diffusion XL: two text encoders, a pooled embedding, and conditioning on sizes.

Source: Podell et al. 2023, arXiv:2307.01952.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from safelight.trainer.config.presets import SDXL
from safelight.trainer.families.conditioning import SdxlConditioning
from safelight.trainer.families.family import Family, uncropped_sizes
from safelight.trainer.families.original_layout import (
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    Layout,
    clip_layout,
    open_clip_layout,
)

# original size, crop position and target size, two numbers each
NUM_SIZES = 6
PX_PER_LATENT = 8
LOGIT_SCALE = math.log(100)


class StableDiffusionXL(Family):
    """Two text encoders (CLIP ViT-L/14 and OpenCLIP ViT-bigG/14), of which the second also gives a pooled embedding;
    conditioned on sizes; 1024 px.

    The cached row of a text is flat: the embeddings of both encoders side by side, T * D values, then the P values of
    the pooled one. The empty text is all zeros, as it was when the model was trained.
    """

    name, title = "sdxl", "Stable Diffusion XL"
    text_widths, published_channels = (2048,), [320, 640, 1280]
    text_encoders: ClassVar = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    skipped_layers, zeroes_empty_text, vae_allows_fp16 = 1, True, False
    pipeline = "StableDiffusionXLPipeline"
    text_prefixes = (SDXL_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX)
    kohya_version, kohya_uses_original_names = "sdxl_base_v1-0", True
    # A1111 and ComfyUI detect v-prediction by the marker that our files have too
    default_configs = SDXL
    implementation = "https://github.com/Stability-AI/generative-models"

    def owns(self, unet_config: Mapping) -> bool:
        return unet_config.get("addition_embed_type") == "text_time" or super().owns(unet_config)

    def architecture(self, prediction_type: str) -> str:
        return "stable-diffusion-xl-v1-base"

    def text_encoder_layout(self, part: str, names: Iterable[str]) -> Layout:
        if part == "text_encoder":
            return clip_layout(names, SDXL_CLIP_PREFIX)
        return open_clip_layout(names, SDXL_OPEN_CLIP_PREFIX)

    def text_encoder_extras(self, part: str, num_tokens: int) -> dict[str, Tensor]:
        if part == "text_encoder":
            return {f"{SDXL_CLIP_PREFIX}embeddings.position_ids": torch.arange(num_tokens)[None]}
        # of the contrastive training, unused; as in the published file
        return {f"{SDXL_OPEN_CLIP_PREFIX}logit_scale": torch.tensor(LOGIT_SCALE)}

    def encode_ids(self, text_encoder: nn.Module, ids_BT: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """Return the hidden state before the last layer, without norm, and the second encoder's pooled embedding."""
        output = text_encoder(ids_BT, output_hidden_states=True)
        states = output.hidden_states[-1 - self.skipped_layers - clip_skip]
        return states, getattr(output, "text_embeds", None)

    def read_parts(self, text_encoder: nn.Module, clip_skip: int) -> tuple[int, bool]:
        num_layers = text_encoder.config.num_hidden_layers
        # the pooled embedding is made of the last layer
        if hasattr(text_encoder, "text_projection"):
            return num_layers, True
        return num_layers - self.skipped_layers - clip_skip, False

    def pooled_width(self, unet_config: Mapping) -> int:
        return unet_config["projection_class_embeddings_input_dim"] - NUM_SIZES * unet_config["addition_time_embed_dim"]

    def text_row(self, embeddings_BTD: Tensor, pooled_BP: Tensor | None) -> Tensor:
        return torch.cat([embeddings_BTD.flatten(1), pooled_BP], dim=1)

    def text_row_shape(self, num_tokens: int, width: int, pooled_width: int) -> tuple[int, ...]:
        return (num_tokens * width + pooled_width,)

    def conditioning(self, unet_config: Mapping, rows: Tensor, sizes_B6: Tensor) -> SdxlConditioning:
        pooled_width = self.pooled_width(unet_config)
        embeddings, pooled = rows[:, :-pooled_width], rows[:, -pooled_width:]
        text_BTD = embeddings.unflatten(1, (-1, unet_config["cross_attention_dim"]))
        return SdxlConditioning(text_BTD.contiguous(), pooled.contiguous(), sizes_B6)

    def stand_in_conditioning(
        self, unet_config: Mapping, rows_BTD: Tensor, latent_size: tuple[int, int]
    ) -> SdxlConditioning:
        """Return the text embeddings with a pooled embedding of unit variance and the sizes of an uncropped image."""
        num = len(rows_BTD)
        pooled = _pooled_row(self.pooled_width(unet_config)).to(rows_BTD.dtype).repeat(num, 1)
        sizes = uncropped_sizes(num, *(PX_PER_LATENT * side for side in latent_size)).to(rows_BTD.dtype)
        return SdxlConditioning(rows_BTD, pooled.to(rows_BTD.device), sizes.to(rows_BTD.device))

    def pipeline_of(self, unet, vae, scheduler, texts: Sequence[tuple[object, nn.Module]], *, zeroes_empty_text: bool):
        from diffusers import StableDiffusionXLPipeline

        (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = texts
        return StableDiffusionXLPipeline(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            force_zeros_for_empty_prompt=zeroes_empty_text,
            add_watermarker=False,
        )


@functools.cache
def _pooled_row(dim: int) -> Tensor:
    """Return a fixed random embedding in place of the second text encoder's pooled one, (1, dim) float32."""
    return torch.randn(1, dim, generator=torch.Generator().manual_seed(0))
