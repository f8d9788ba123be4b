"""Replacements for diffusers' convolutional modules: same Parameters under the same names, another forward pass.

kernels/unet/patch.py swaps a module's class. The new class is created at that moment with the original class as its
last base, so that importing this file does not import diffusers.

A residual block computes
    h = conv1(silu(norm1(x)))                   without conv1's bias, which is added to the time projection
    h = conv2(silu(norm2(h + addend)))          without conv2's bias; addend is the time projection
    y = (h + bias + shortcut(x)) * scale        in one pass; bias is conv2's and the shortcut's
Everything is channels-last. Unlike diffusers' block it does not divide by an output scale of 1, and does not apply the
SiLU to the time embedding again in every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.kernels.ops.bias_residual import bias_residual
from safelight.kernels.ops.group_norm_silu import group_norm_silu
from safelight.kernels.ops.norm_then_matmul import as_images, as_tokens, norm_silu_conv
from safelight.kernels.ops.packed_linear import packed_linear
from safelight.kernels.ops.upsample_conv import upsample_conv
from safelight.kernels.unet.low_rank import adapted, has_adapter

if TYPE_CHECKING:
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D


class PatchedModule:
    """Base of the classes that replace a module's class; `original` is the replaced one."""

    original: type[nn.Module]


def channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last memory order, without a copy if it already is."""
    return x.contiguous(memory_format=torch.channels_last)


def detached(bias: Tensor | None) -> Tensor | None:
    """Return a bias detached from autograd, for one whose gradient is computed elsewhere (norm_then_matmul.py)."""
    return None if bias is None else bias.detach()


def is_plain_conv(conv: nn.Module, size: int) -> bool:
    """Return whether a module is a Conv2d with a size x size kernel, stride 1, padding size // 2, else plain."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (size, size)
        and conv.stride == (1, 1)
        and conv.padding == (size // 2, size // 2)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def is_norm(norm: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is of exactly this norm class, with weight and bias."""
    return type(norm) is kind and norm.weight is not None and norm.bias is not None


class PatchedResnetBlock(PatchedModule):
    """A residual block. time_index: its index into the shared time projections."""

    time_index: int

    @staticmethod
    def why_unsupported(block: ResnetBlock2D) -> str:
        """Return why a block cannot be patched, '' if it can."""
        if block.up or block.down:
            return "it resizes the image itself"
        if block.time_embedding_norm != "default" or block.skip_time_act or type(block.time_emb_proj) is not nn.Linear:
            return "its time embedding is not simply added"
        if type(block.nonlinearity) is not nn.SiLU or block.dropout.p > 0:
            return "its activation is not SiLU, or it has dropout"
        convs = [(block.conv1, 3), (block.conv2, 3)] + ([(block.conv_shortcut, 1)] if block.conv_shortcut else [])
        if not all(is_plain_conv(conv, size) for conv, size in convs) or block.conv1.bias is None:
            return "its convolutions are not plain 3x3 and 1x1"
        if not (is_norm(block.norm1, nn.GroupNorm) and is_norm(block.norm2, nn.GroupNorm)):
            return "its norms are not GroupNorm"
        return ""

    def forward(self, input_tensor: Tensor, temb: Tensor | Sequence[Tensor], *args, **kwargs) -> Tensor:
        """Return the block's output. temb: the embedding, (N, D), or all blocks' projections, from TimeProjections."""
        x = channels_last(input_tensor)
        addend_NC = time_projections([self], temb)[0] if isinstance(temb, Tensor) else temb[self.time_index]
        norm1, norm2, shortcut = self.norm1, self.norm2, self.conv_shortcut
        # without a shortcut, conv2's bias is added to x's skip path, so its gradient is the sum of ds in norm1's
        # backward
        bias, skip_bias = self.conv2.bias, None
        if shortcut is None:
            bias, skip_bias = bias.detach(), bias
        if has_adapter(self.conv1):
            h = _adapted_norm_silu_conv(norm1, self.conv1, x)
        else:
            x, h = norm_silu_conv(
                x,
                norm1.weight,
                norm1.bias,
                norm1.num_groups,
                self.conv1.weight,
                eps=norm1.eps,
                return_x=True,
                skip_bias=skip_bias,
            )
        if has_adapter(self.conv2):
            h = _adapted_norm_silu_conv(norm2, self.conv2, h, addend_NC)
        else:
            h = norm_silu_conv(
                h, norm2.weight, norm2.bias, norm2.num_groups, self.conv2.weight, eps=norm2.eps, addend_NC=addend_NC
            )
        residual, residual_bias = x, None
        if shortcut is not None:
            # a 1x1 convolution as a matmul over pixels, so that its gradient is always channels-last
            rows = as_tokens(x)
            (tokens,) = adapted([shortcut], rows, [F.linear(rows, shortcut.weight.flatten(1))])
            residual, residual_bias = as_images(tokens, *x.shape[2:]), shortcut.bias
        return bias_residual(h, bias, residual, 1 / self.output_scale_factor, residual_bias)


def _adapted_norm_silu_conv(
    norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, addend_NC: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return what `norm_silu_conv` returns, with the convolution's adapter, which needs the norm's output."""
    h = group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, addend_NC=addend_NC)
    return adapted([conv], h, [F.conv2d(h, conv.weight, bias, padding=1)], [bias])[0]


def time_projections(blocks: Sequence[ResnetBlock2D], emb_ND: Tensor) -> tuple[Tensor, ...]:
    """Return each block's addend, (N, C): the projection of silu(emb), plus the bias of the block's conv1."""
    weights = [block.time_emb_proj.weight for block in blocks]
    biases = [block.time_emb_proj.bias for block in blocks] + [block.conv1.bias for block in blocks]
    x = F.silu(emb_ND)
    ys = packed_linear(x, weights, biases, contiguous=True)
    layers = [block.time_emb_proj for block in blocks]
    if not has_adapter(*layers):
        return ys
    added = [block.time_emb_proj.bias + block.conv1.bias for block in blocks]
    return tuple(adapted(layers, x, ys, added))


def time_parameters(blocks: Sequence[ResnetBlock2D]) -> list[list[nn.Parameter]]:
    """Return the groups of Parameters that `time_projections` needs packed: weights, biases, conv1's biases."""
    return [
        [block.time_emb_proj.weight for block in blocks],
        [block.time_emb_proj.bias for block in blocks],
        [block.conv1.bias for block in blocks],
    ]


class TimeProjections(nn.Module):
    """Replaces a UNet's `time_embed_act`: returns all blocks' time projections instead of the embedding."""

    def __init__(self, blocks: Sequence[ResnetBlock2D]):
        super().__init__()
        # a tuple, not a ModuleList, or the blocks would appear in the state dict a second time
        self.blocks = tuple(blocks)

    def forward(self, emb_ND: Tensor) -> tuple[Tensor, ...]:
        return time_projections(self.blocks, emb_ND)


class PatchedUpsample(PatchedModule):
    """Nearest-neighbour upsampling followed by a convolution."""

    @staticmethod
    def why_unsupported(module: Upsample2D) -> str:
        """Return why a module cannot be patched, '' if it can."""
        if module.norm is not None or not module.interpolate or module.name != "conv":
            return "it is not plain interpolation"
        return "" if is_plain_conv(module.conv, 3) else "its convolution is not plain 3x3"

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None, *args, **kwargs) -> Tensor:
        x = channels_last(hidden_states)
        size = [2 * n for n in x.shape[2:]] if output_size is None else output_size
        if has_adapter(self.conv):
            return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
        return upsample_conv(x, self.conv.weight, self.conv.bias, tuple(size))


class PatchedConvIn(PatchedModule):
    """The first convolution, which makes everything after it channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(channels_last(x))


class PatchedConvOut(PatchedModule):
    """The last convolution, which also computes the norm and SiLU before it; those modules become PassThrough."""

    applies_adapter = True

    def forward(self, x: Tensor) -> Tensor:
        norm = self.fused_norm[0]
        if has_adapter(self):
            return _adapted_norm_silu_conv(norm, self, channels_last(x), bias=self.bias)
        return norm_silu_conv(
            channels_last(x), norm.weight, norm.bias, norm.num_groups, self.weight, self.bias, eps=norm.eps
        )


class PassThrough(PatchedModule):
    """A norm or activation that the module after it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x
