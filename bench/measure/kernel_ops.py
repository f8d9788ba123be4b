"""The kernels of `safelight bench kernels`: our op, the plain PyTorch it replaces, and a formula of the bytes it moves.

`plain` is what diffusers computes in that place, without its divisions by 1.0. The formulas count every read and write
of a kernel: a tensor read twice counts twice, although the second read may hit a cache. Statistics, parameters and
partial sums are small in comparison and left out. Letters in shapes are those of bench/core/layers.py.
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
    """A kernel and its plain PyTorch equivalent.

    activations, parameters: shapes of its inputs by name, for a layer's shape. forward_bytes, backward_bytes:
    functions of (shape, bytes per element); None for compute-bound ops. is_differentiable: False if there is no
    backward pass.
    """

    activations: Callable[[Shape], dict[str, Shape]]
    parameters: Callable[[Shape], dict[str, Shape]]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    forward_bytes: Callable[[Shape, int], int] | None = None
    backward_bytes: Callable[[Shape, int], int] | None = None
    is_differentiable: bool = True

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device, layout: torch.memory_format) -> Inputs:
        """Return random inputs that require gradients, 4-d tensors in the given memory format."""
        inputs = {}
        for name, size in (*self.activations(shape).items(), *self.parameters(shape).items()):
            is_fixed = name in FIXED
            x = _random(name, size, torch.float32 if is_fixed else dtype, device)
            if x.dim() == 4:
                x = x.to(memory_format=layout)
            inputs[name] = x if is_fixed or not self.is_differentiable else x.requires_grad_()
        return inputs


# inputs of noising and the loss that are fp32 or integers and never need a gradient
FIXED = ("mean", "logvar", "words", "alphas", "target", "timesteps")


def _random(name: str, size: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    if name == "words":
        return torch.zeros(size, dtype=torch.int64, device=device)
    if name == "timesteps":
        return torch.full(size, 500, dtype=torch.int64, device=device)
    if name == "alphas":
        return torch.linspace(0.999, 0.005, *size, device=device)
    # scale weights so that the outputs of a layer are near 1
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
    """As in diffusers' examples: sample the posterior, scale, draw noise and timesteps, add_noise."""
    latents = (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * torch.randn_like(mean)) * SCALING
    noise = torch.randn_like(latents)
    a = alphas[torch.randint(0, len(alphas), (len(mean),), device=mean.device)][:, None, None, None]
    return (a.sqrt() * latents + (1 - a).sqrt() * noise).bfloat16(), noise


def _our_noising(mean, logvar, words, alphas):
    noised = noising(
        mean,
        logvar,
        words,
        alphas,
        prediction_type="epsilon",
        scaling_factor=SCALING,
        dtype=torch.bfloat16,
    )
    return noised.noisy_BCHW, noised.target_BCHW


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
        # forward: statistics read x, the norm reads x and writes y; backward: sums read dy and x, dx reads both again
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
        # forward: x to y; backward: dy and x to dx
        lambda s, b: 2 * prod(s) * b,
        lambda s, b: 3 * prod(s) * b,
    ),
    "add_layer_norm": Op(
        lambda s: {"x": s, "residual": s},
        lambda s: _norm(s[-1]),
        lambda x, residual, norm_weight, norm_bias: add_layer_norm(x, residual, norm_weight, norm_bias, EPS),
        _plain_add_layer_norm,
        # forward: x and residual to s and y; backward: ds, dy and s to dx, the gradient of both inputs
        lambda s, b: 4 * prod(s) * b,
        lambda s, b: 4 * prod(s) * b,
    ),
    "geglu": Op(
        _rows,
        lambda s: {},
        geglu,
        _plain_geglu,
        # forward: x to y, which is half as large; backward: dy and x to dx
        lambda s, b: 3 * prod(s) * b // 2,
        lambda s, b: 5 * prod(s) * b // 2,
    ),
    "bias_residual": Op(
        lambda s: {"x": s, "residual": s},
        lambda s: {"bias": s[1:2]},
        lambda x, residual, bias: bias_residual(x, bias, residual),
        lambda x, residual, bias: residual + (x + bias[:, None, None]),
        # backward: dy is passed on as the gradient of both inputs; only the bias gradient's sum reads it
        lambda s, b: 3 * prod(s) * b,
        lambda s, b: prod(s) * b,
    ),
    "noising": Op(
        lambda s: {"mean": s, "logvar": s, "words": (s[0], 5), "alphas": (1000,)},
        lambda s: {},
        _our_noising,
        _plain_noising,
        # mean and logvar in fp32 to noisy latents in 16 bits and a target in fp32
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
    """Return a shape small enough for a CPU: channels and features up to 320, few pixels or rows."""
    if len(shape) == 4 and shape[1] == 4:
        return shape
    if len(shape) >= 4 and shape[2] == shape[3]:
        return (shape[0], min(shape[1], 320), min(shape[2], 16), min(shape[3], 16), *(min(k, 320) for k in shape[4:]))
    return (shape[0], min(shape[1], 256), *(min(k, 2560 if len(shape) == 3 else 320) for k in shape[2:]))
