"""The layers that SD1.5, SD2.1 and SDXL train, with their shapes and how often each runs in a step.

Nothing is listed by hand: the UNets are run on meta tensors, which takes seconds and no memory, and hooks see what
passes. Letters: N batch, C K channels in and out, H W height and width, T tokens, D F features.
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
from safelight.trainer.models.architectures import RANDOM_MODELS
from safelight.trainer.models.sdxl_conditioning import give_conditioning


class Model(NamedTuple):
    """A UNet's config as diffusers reads it, and the side of the latents it is trained on."""

    config: dict
    side: int


MODELS = {
    name: Model(parts["unet"], parts["unet"]["sample_size"]) for name, parts in RANDOM_MODELS.items() if name != "small"
}


@dataclass(frozen=True)
class Layer:
    """op: what a kernel does there, as bench/measure/kernel_ops.py names it; shape: of its input, with what follows it
    (N, C, H, W, K for a convolution behind a norm, N, T, D, F for a projection); count: how often in a step's forward.
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
    """Hook a UNet so that each layer of ours that runs is added to `seen`: (op, shape)."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    def on_input(module: nn.Module, op: str, *more: int) -> None:
        def hook(module, args):
            seen[op, (*args[0].shape, *more)] += 1

        module.register_forward_pre_hook(hook)

    mine = set()
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            on_input(module.norm1, "group_norm_silu")
            on_input(module.norm2, "add_group_norm_silu")
            on_input(module.norm1, "norm_silu_conv", module.conv1.out_channels)
            on_input(module.norm2, "norm_silu_conv", module.conv2.out_channels)
            # the second convolution's output, with its bias and the skipped input added
            module.conv2.register_forward_hook(lambda m, args, out: seen.update([("bias_residual", tuple(out.shape))]))
            mine |= {module.norm1, module.norm2}
        elif isinstance(module, BasicTransformerBlock):
            on_input(module.norm1, "layer_norm")
            on_input(module.norm1, "norm_linear", 3 * module.attn1.inner_dim)
            for norm in (module.norm2, module.norm3):
                on_input(norm, "add_layer_norm")
            on_input(module.norm3, "feed_forward", module.ff.net[2].in_features)
        elif isinstance(module, GEGLU):
            module.proj.register_forward_hook(lambda m, args, out: seen.update([("geglu", tuple(out.shape))]))
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm) and module not in mine:
            on_input(module, "group_norm_silu" if name == "conv_norm_out" else "group_norm")


@functools.cache
def layers(name: str, batch_size: int = 1) -> tuple[Layer, ...]:
    """Return a model's layers of ours in the order they first run, the step's two ends included.

    Raises ValueError for an unknown model.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r} is unknown; use {', '.join(MODELS)}")
    unet, side, seen = meta_model(name), MODELS[name].side, Counter()
    _watch(unet, seen)
    latents = torch.empty(batch_size, 4, side, side, device="meta")
    seen["noising", tuple(latents.shape)] += 1
    text = torch.empty(batch_size, NUM_TEXT_TOKENS, unet.config.cross_attention_dim, device="meta")
    with torch.no_grad():
        give_conditioning(unet)(latents, torch.empty(batch_size, device="meta"), text)
    seen["diffusion_loss", tuple(latents.shape)] += 1
    return tuple(Layer(op, shape, count) for (op, shape), count in seen.items())
