"""What a UNet is told besides noisy latents and a timestep. Shapes: B batch, T tokens, D embedding, P pooled embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.data.tensor_record import TensorRecord


@dataclass(frozen=True)
class TextConditioning(TensorRecord):
    """The captions' embeddings, all that Stable Diffusion 1.x and 2.x know of a picture."""

    text_BTD: Tensor

    def unet_arguments(self, dtype: torch.dtype) -> dict[str, object]:
        """Return the keyword arguments of diffusers' UNet2DConditionModel, floating-point values in the UNet's dtype."""
        return {"encoder_hidden_states": self.text_BTD.to(dtype)}


@dataclass(frozen=True)
class SdxlConditioning(TextConditioning):
    """SDXL adds the second encoder's pooled embedding, and sizes in px.

    sizes_B6: original height and width, top and left of the crop, height and width of what is trained on.
    Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """

    pooled_BP: Tensor
    sizes_B6: Tensor

    def unet_arguments(self, dtype: torch.dtype) -> dict[str, object]:
        added = {"text_embeds": self.pooled_BP.to(dtype), "time_ids": self.sizes_B6}
        return {**super().unet_arguments(dtype), "added_cond_kwargs": added}
