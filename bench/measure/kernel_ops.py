"""What `safelight bench kernels` measures of each kernel: ours, the plain PyTorch it stands for, and the bytes it moves.

`plain` is what diffusers' graph computes there, without the divisions by 1.0. Bytes are those the kernels read and
write, each time that they do, by formula: a tensor read twice counts twice, though the second time may find it in a
cache. Statistics, parameters and partial sums, which are small beside them, are left out.
Letters as in bench/core/layers.py; n elements of the input, b bytes of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.kernels.ops.bias_residual import bias_residual
from safelight.kernels.ops.diffusion_loss import LossOptions, diffusion_loss
from safelight.kernels.ops.geglu import geglu
from safelight.kernels.ops.group_norm_silu import group_norm_silu
from safelight.kernels.ops.layer_norm import add_layer_norm, layer_norm
from safelight.kernels.ops.noising import noising
from safelight.kernels.ops.norm_then_matmul import feed_forward, norm_linear, norm_silu_conv

NUM_GROUPS, EPS, SCALING = 32, 1e-5, 0.18215
Shape = tuple[int, ...]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """parameters: shapes of its weights, which are no activations; forward_bytes, backward_bytes: of (shape, b); both
    None where matrix products, not memory, take the time. is_differentiable: False for what has no backward pass.
    """

    activations: Callable[[Shape], dict[str, Shape]]
    parameters: Callable[[Shape], dict[str, Shape]]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    forward_bytes: Callable[[Shape, int], int] | None = None
    backward_bytes: Callable[[Shape, int], int] | None = None
    is_differentiable: bool = True

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device, layout: torch.memory_format) -> Inputs:
        """Return random inputs that want gradients; images in this memory order."""
        found = {}
        for name, size in (*self.activations(shape).items(), *self.parameters(shape).items()):
            # what the step's ends get is fp32, and no gradient goes into it
            is_given = name in FIXED
            x = _random(name, size, torch.float32 if is_given else dtype, device)
            if x.dim() == 4:
                x = x.to(memory_format=layout)
            found[name] = x if is_given or not self.is_differentiable else x.requires_grad_()
        return found


# cached rows, targets, the schedule: fp32 or integers, without gradients
FIXED = ("mean", "logvar", "words", "alphas", "target", "timesteps")


def _random(name: str, size: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    if name == "words":
        return torch.zeros(size, dtype=torch.int64, device=device)
    if name == "timesteps":
        return torch.full(size, 500, dtype=torch.int64, device=device)
    if name == "alphas":
        return torch.linspace(0.999, 0.005, *size, device=device)
    # weights of a size that keeps products near 1
    scale = size[1] ** -0.5 if name.endswith("weight") and len(size) > 1 else 1.0
    return torch.randn(size, device=device).mul_(scale).to(dtype)


def _norm(channels: int) -> dict[str, Shape]:
    return {"norm_weight": (channels,), "norm_bias": (channels,)}


def _plain_group_norm(x, norm_weight, norm_bias, addend=None, silu=True):
    z = x if addend is None else x + addend[:, :, None, None]
    u = F.group_norm(z, NUM_GROUPS, norm_weight, norm_bias, EPS)
    return F.silu(u) if silu else u


def _plain_add_layer_norm(x, residual, norm_weight, norm_bias):
    s = x + residual
    return s, F.layer_norm(s, s.shape[-1:], norm_weight, norm_bias, EPS)


def _plain_geglu(x):
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)


def _plain_noising(mean, logvar, words, alphas):
    """As diffusers' examples: posterior sample, scale, noise, add_noise; the timestep's draw costs a launch in both."""
    latents = (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * torch.randn_like(mean)) * SCALING
    noise = torch.randn_like(latents)
    a = alphas[torch.randint(0, len(alphas), (len(mean),), device=mean.device)][:, None, None, None]
    return (a.sqrt() * latents + (1 - a).sqrt() * noise).bfloat16(), noise


def _our_noising(mean, logvar, words, alphas):
    found = noising(
        mean,
        logvar,
        words,
        alphas,
        prediction_type="epsilon",
        scaling_factor=SCALING,
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
    )
    return found.noisy_BCHW, found.target_BCHW


def _plain_loss(predicted, target, timesteps, alphas):
    losses = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    a = alphas[timesteps]
    snr = a / (1 - a)
    return (losses * snr.clamp(max=5.0) / snr).mean()


def _our_loss(predicted, target, timesteps, alphas):
    options = LossOptions(weighting="min_snr")
    return diffusion_loss(predicted, target, timesteps, alphas, options, num_samples=len(predicted)).total


def _plain_feed_forward(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias):
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    return F.linear(_plain_geglu(F.linear(h, in_weight, in_bias)), out_weight, out_bias)


def _our_group_norm(x, norm_weight, norm_bias, addend=None, silu=True):
    return group_norm_silu(x, norm_weight, norm_bias, NUM_GROUPS, EPS, silu=silu, addend_NC=addend)


def _image(shape: Shape) -> dict[str, Shape]:
    return {"x": shape[:4]}


def _rows(shape: Shape) -> dict[str, Shape]:
    return {"x": shape[:3]}


OPS: dict[str, Op] = {
    "group_norm_silu": Op(
        _image,
        lambda s: _norm(s[1]),
        _our_group_norm,
        _plain_group_norm,
        # statistics read x, the norm reads x and writes y; the sums read dy and x, dx reads both and is written
        lambda s, b: 3 * prod(s) * b,
        lambda s, b: 5 * prod(s) * b,
    ),
    "add_group_norm_silu": Op(
        lambda s: {"x": s, "addend": s[:2]},
        lambda s: _norm(s[1]),
        _our_group_norm,
        _plain_group_norm,
        lambda s, b: 3 * prod(s) * b,
        lambda s, b: 5 * prod(s) * b,
    ),
    "group_norm": Op(
        _image,
        lambda s: _norm(s[1]),
        lambda **x: _our_group_norm(**x, silu=False),
        lambda **x: _plain_group_norm(**x, silu=False),
        lambda s, b: 3 * prod(s) * b,
        lambda s, b: 5 * prod(s) * b,
    ),
    "layer_norm": Op(
        _rows,
        lambda s: _norm(s[-1]),
        lambda x, norm_weight, norm_bias: layer_norm(x, norm_weight, norm_bias, EPS),
        lambda x, norm_weight, norm_bias: F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS),
        # x to y; dy and x to dx
        lambda s, b: 2 * prod(s) * b,
        lambda s, b: 3 * prod(s) * b,
    ),
    "add_layer_norm": Op(
        lambda s: {"x": s, "residual": s},
        lambda s: _norm(s[-1]),
        lambda x, residual, norm_weight, norm_bias: add_layer_norm(x, residual, norm_weight, norm_bias, EPS),
        _plain_add_layer_norm,
        # x and residual to s and y; ds, dy and s to dx, which both inputs get
        lambda s, b: 4 * prod(s) * b,
        lambda s, b: 4 * prod(s) * b,
    ),
    "geglu": Op(
        _rows,
        lambda s: {},
        geglu,
        _plain_geglu,
        # x to y, half as large; dy and x to dx
        lambda s, b: 3 * prod(s) * b // 2,
        lambda s, b: 5 * prod(s) * b // 2,
    ),
    "bias_residual": Op(
        lambda s: {"x": s, "residual": s},
        lambda s: {"bias": s[1:2]},
        lambda x, residual, bias: bias_residual(x, bias, residual),
        lambda x, residual, bias: residual + (x + bias[:, None, None]),
        # dy is the gradient of both inputs as it is; the bias' sum reads it
        lambda s, b: 3 * prod(s) * b,
        lambda s, b: prod(s) * b,
    ),
    "noising": Op(
        lambda s: {"mean": s, "logvar": s, "words": (s[0], 5), "alphas": (1000,)},
        lambda s: {},
        _our_noising,
        _plain_noising,
        # mean and logvar in fp32 to the noisy latents in 16 bits and the target in fp32
        lambda s, b: prod(s) * (4 + 4 + 2 + 4),
        is_differentiable=False,
    ),
    "diffusion_loss": Op(
        lambda s: {"predicted": s, "target": s, "timesteps": s[:1], "alphas": (1000,)},
        lambda s: {},
        _our_loss,
        _plain_loss,
        lambda s, b: prod(s) * (b + 4),
        lambda s, b: prod(s) * (2 * b + 4),
    ),
    "norm_silu_conv": Op(
        _image,
        lambda s: {**_norm(s[1]), "conv_weight": (s[4], s[1], 3, 3), "conv_bias": (s[4],)},
        lambda x, norm_weight, norm_bias, conv_weight, conv_bias: norm_silu_conv(
            x, norm_weight, norm_bias, NUM_GROUPS, conv_weight, conv_bias, eps=EPS
        ),
        lambda x, norm_weight, norm_bias, conv_weight, conv_bias: F.conv2d(
            _plain_group_norm(x, norm_weight, norm_bias), conv_weight, conv_bias, padding=1
        ),
    ),
    "norm_linear": Op(
        _rows,
        lambda s: {**_norm(s[2]), "weight": (s[3], s[2])},
        lambda x, norm_weight, norm_bias, weight: norm_linear(x, norm_weight, norm_bias, weight, eps=EPS),
        lambda x, norm_weight, norm_bias, weight: F.linear(
            F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS), weight
        ),
    ),
    "feed_forward": Op(
        _rows,
        lambda s: {
            **_norm(s[2]),
            "in_weight": (2 * s[3], s[2]),
            "in_bias": (2 * s[3],),
            "out_weight": (s[2], s[3]),
            "out_bias": (s[2],),
        },
        lambda **x: feed_forward(*x.values(), eps=EPS, recompute=True),
        _plain_feed_forward,
    ),
}


def reduced(shape: Shape) -> Shape:
    """Return a shape small enough for a CPU: the same channels and features up to 320, few pixels or rows."""
    if len(shape) == 4 and shape[1] == 4:
        return shape
    if len(shape) >= 4 and shape[2] == shape[3]:
        return (shape[0], min(shape[1], 320), min(shape[2], 16), min(shape[3], 16), *(min(k, 320) for k in shape[4:]))
    return (shape[0], min(shape[1], 256), *(min(k, 2560 if len(shape) == 3 else 320) for k in shape[2:]))
