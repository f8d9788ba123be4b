"""The layers of SD1.5, SD2.1 and SDXL that our kernels replace, with input shapes and counts per step.

They are recorded with forward hooks while each UNet runs on meta tensors, which takes seconds and no memory.
Letters in shapes: N batch; C, K channels in and out; H, W height and width; T tokens; D, F features.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from safelight.errors import UserError
from safelight.kernels.unet.attention import NUM_TEXT_TOKENS
from safelight.trainer.families.registry import family_of
from safelight.trainer.models.architectures import RANDOM_MODELS


class Model(NamedTuple):
    """A UNet's diffusers config, and the side of the latents it is trained on."""

    config: dict
    side: int


MODELS = {
    name: Model(parts["unet"], parts["unet"]["sample_size"]) for name, parts in RANDOM_MODELS.items() if name != "small"
}


@dataclass(frozen=True)
class Layer:
    """A layer that a kernel of ours replaces.

    op: a name in bench/measure/kernel_ops.py. shape: of the input, extended by the output features of a following
    convolution (N, C, H, W, K) or projection (N, T, D, F). count: number of calls in a forward pass.
    """

    op: str
    shape: tuple[int, ...]
    count: int


def meta_model(name: str) -> nn.Module:
    """Return a UNet on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(MODELS[name].config)


def _watch(unet: nn.Module, seen: Counter) -> None:
    """Register forward hooks that count each (op, shape) that runs in `seen`."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    def on_input(module: nn.Module, op: str, *more: int) -> None:
        def hook(module, args):
            seen[op, (*args[0].shape, *more)] += 1

        module.register_forward_pre_hook(hook)

    counted_norms = set()
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            on_input(module.norm1, "group_norm_silu")
            on_input(module.norm2, "add_group_norm_silu")
            on_input(module.norm1, "norm_silu_conv", module.conv1.out_channels)
            on_input(module.norm2, "norm_silu_conv", module.conv2.out_channels)
            # bias_residual adds the bias and the skip connection to the second convolution's output
            module.conv2.register_forward_hook(lambda m, args, out: seen.update([("bias_residual", tuple(out.shape))]))
            counted_norms |= {module.norm1, module.norm2}
        elif isinstance(module, BasicTransformerBlock):
            on_input(module.norm1, "layer_norm")
            on_input(module.norm1, "norm_linear", 3 * module.attn1.inner_dim)
            for norm in (module.norm2, module.norm3):
                on_input(norm, "add_layer_norm")
            on_input(module.norm3, "feed_forward", module.ff.net[2].in_features)
        elif isinstance(module, GEGLU):
            module.proj.register_forward_hook(lambda m, args, out: seen.update([("geglu", tuple(out.shape))]))
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm) and module not in counted_norms:
            on_input(module, "group_norm_silu" if name == "conv_norm_out" else "group_norm")


@functools.cache
def layers(name: str, batch_size: int = 1) -> tuple[Layer, ...]:
    """Return a model's layers in the order they first run, including noising before and the loss after the UNet.

    Raises UserError for an unknown model.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; use {', '.join(MODELS)}")
    unet, side, seen = meta_model(name), MODELS[name].side, Counter()
    _watch(unet, seen)
    latents = torch.empty(batch_size, 4, side, side, device="meta")
    seen["noising", tuple(latents.shape)] += 1
    text = torch.empty(batch_size, NUM_TEXT_TOKENS, unet.config.cross_attention_dim, device="meta")
    conditioning = family_of(unet.config).stand_in_conditioning(unet.config, text, (side, side))
    with torch.no_grad():
        unet(latents, torch.empty(batch_size, device="meta"), **conditioning.unet_arguments(text.dtype))
    seen["diffusion_loss", tuple(latents.shape)] += 1
    return tuple(Layer(op, shape, count) for (op, shape), count in seen.items())
