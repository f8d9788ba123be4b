"""Conditioning: a UNet's inputs other than the noisy latents and the timestep, one record per kind.

Letters: B batch, T tokens, D embedding, P pooled embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.data.tensor_record import TensorRecord


@dataclass(frozen=True)
class TextConditioning(TensorRecord):
    """The embeddings of the captions: the only conditioning of Stable Diffusion 1.x and 2.x."""

    text_BTD: Tensor

    def unet_arguments(self, dtype: torch.dtype) -> dict[str, object]:
        """Return the keyword arguments for diffusers' UNet2DConditionModel. dtype: the UNet's, for embeddings."""
        return {"encoder_hidden_states": self.text_BTD.to(dtype)}


@dataclass(frozen=True)
class SdxlConditioning(TextConditioning):
    """SDXL's additional conditioning: the second encoder's pooled embedding, and sizes in px.

    sizes_B6: original height and width, top and left of the crop, target height and width. They stay float32, because
    bfloat16 cannot tell 1021 px from 1024 px.
    Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """

    pooled_BP: Tensor
    sizes_B6: Tensor

    def unet_arguments(self, dtype: torch.dtype) -> dict[str, object]:
        added = {"text_embeds": self.pooled_BP.to(dtype), "time_ids": self.sizes_B6}
        return {**super().unet_arguments(dtype), "added_cond_kwargs": added}
