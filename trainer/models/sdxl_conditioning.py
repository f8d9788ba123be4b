"""What SDXL's UNet is given beside text, for benchmarks: the pooled embedding, and the picture's sizes and crop.

The training step knows nothing of it; a hook adds it to every call, so that every variant is given the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

PX_PER_LATENT = 8


@functools.cache
def _pooled_row(dim: int) -> Tensor:
    """Return an embedding of unit variance, (1, D) float32: the size of what the second text encoder pools."""
    return torch.randn(1, dim, generator=torch.Generator().manual_seed(0))


def give_conditioning(unet: nn.Module) -> nn.Module:
    """Return the UNet, which from now on takes SDXL's `added_cond_kwargs` as an uncropped square picture's.

    text_embeds (B, D), time_ids (B, 6): original height and width, top and left of the crop, height and width trained at.
    They are made once a shape, on the device, so that a recorded graph may read them again. Other UNets stay as they are.
    """
    if unet.config.addition_embed_type != "text_time":
        return unet
    dim = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    made: dict[tuple, dict[str, Tensor]] = {}

    def add(module, args, kwargs):
        sample = args[0] if args else kwargs["sample"]
        key = (sample.device, sample.dtype, *sample.shape)
        if key not in made:
            height, width = (PX_PER_LATENT * side for side in sample.shape[-2:])
            ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=sample.dtype)
            made[key] = {
                name: row.to(sample.device, sample.dtype).repeat(len(sample), 1)
                for name, row in (("text_embeds", _pooled_row(dim)), ("time_ids", ids))
            }
        return args, {**kwargs, "added_cond_kwargs": made[key]}

    unet.register_forward_pre_hook(add, with_kwargs=True)
    return unet
