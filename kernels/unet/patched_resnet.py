"""What takes the place of diffusers' convolutional modules: the same Parameters under the same names, another forward pass.

A module is swapped by its class, so state dict, Parameters and the module's place stay what they are. The classes here
are made with the original as their last base when a module is swapped (kernels/unet/patch.py): diffusers is imported then.

In a residual block
    h = conv1(silu(norm1(x)))                   without its bias, which joins the time embedding's projection
    h = conv2(silu(norm2(h + addend)))          without its bias
    y = (h + bias + shortcut(x)) * scale        in one pass, the bias conv2's and the shortcut's
Everything is channels-last. diffusers' division by an output scale of 1 and its SiLU of the time embedding in every block
are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.kernels.ops.bias_residual import bias_residual
from safelight.kernels.ops.norm_then_matmul import as_images, as_tokens, norm_silu_conv
from safelight.kernels.ops.packed_linear import packed_linear
from safelight.kernels.ops.upsample_conv import upsample_conv

if TYPE_CHECKING:
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D


class Swapped:
    """A module's class in place of the original one, which is its last base."""

    original: type[nn.Module]


def channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last memory, itself where it is so already."""
    return x.contiguous(memory_format=torch.channels_last)


def detached(bias: Tensor | None) -> Tensor | None:
    """Return a bias that gets its gradient elsewhere."""
    return None if bias is None else bias.detach()


def is_plain_conv(conv: nn.Module, size: int) -> bool:
    """Return whether a module is a Conv2d with a square kernel that keeps height and width."""
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
    """Return whether a module is a norm of just this class, with weight and bias."""
    return type(norm) is kind and norm.weight is not None and norm.bias is not None


class PatchedResnetBlock(Swapped):
    """A residual block. time_index: its place among the step's time projections."""

    time_index: int

    @staticmethod
    def refusal(block: ResnetBlock2D) -> str:
        """Return why a block cannot be swapped, '' if it can."""
        if block.up or block.down:
            return "it changes the image's size itself"
        if block.time_embedding_norm != "default" or block.skip_time_act or type(block.time_emb_proj) is not nn.Linear:
            return "its time embedding is no plain addend"
        if type(block.nonlinearity) is not nn.SiLU or block.dropout.p > 0:
            return "it has another activation than SiLU, or dropout"
        convs = [(block.conv1, 3), (block.conv2, 3)] + ([(block.conv_shortcut, 1)] if block.conv_shortcut else [])
        if not all(is_plain_conv(conv, size) for conv, size in convs) or block.conv1.bias is None:
            return "its convolutions are not plain 3x3 and 1x1 ones"
        if not (is_norm(block.norm1, nn.GroupNorm) and is_norm(block.norm2, nn.GroupNorm)):
            return "its norms are no GroupNorms"
        return ""

    def forward(self, input_tensor: Tensor, temb: Tensor | Sequence[Tensor], *args, **kwargs) -> Tensor:
        """Return the block's output. temb: the embedding, (N, D), or what TimeProjections made of it."""
        x = channels_last(input_tensor)
        addend_NC = time_projections([self], temb)[0] if isinstance(temb, Tensor) else temb[self.time_index]
        norm1, norm2, shortcut = self.norm1, self.norm2, self.conv_shortcut
        # where x itself is the residual, its gradient by it and the bias' sum are of one tensor, which norm1 reads
        bias, bias_of_x = self.conv2.bias, None
        if shortcut is None:
            bias, bias_of_x = bias.detach(), bias
        x, h = norm_silu_conv(
            x,
            norm1.weight,
            norm1.bias,
            norm1.num_groups,
            self.conv1.weight,
            eps=norm1.eps,
            forks=True,
            bias_of_x=bias_of_x,
        )
        h = norm_silu_conv(
            h, norm2.weight, norm2.bias, norm2.num_groups, self.conv2.weight, eps=norm2.eps, addend_NC=addend_NC
        )
        residual, residual_bias = x, None
        if shortcut is not None:
            # 1x1: a product of the pixels, whose gradient is channels-last whatever wrote it
            tokens = F.linear(as_tokens(x), shortcut.weight.flatten(1))
            residual, residual_bias = as_images(tokens, *x.shape[2:]), shortcut.bias
        return bias_residual(h, bias, residual, 1 / self.output_scale_factor, residual_bias)


def time_projections(blocks: Sequence[ResnetBlock2D], emb_ND: Tensor) -> tuple[Tensor, ...]:
    """Return each block's addend, (N, C): the projection of silu(emb), with the bias of the convolution before it."""
    weights = [block.time_emb_proj.weight for block in blocks]
    biases = [block.time_emb_proj.bias for block in blocks] + [block.conv1.bias for block in blocks]
    return packed_linear(F.silu(emb_ND), weights, biases, contiguous=True)


def time_parameters(blocks: Sequence[ResnetBlock2D]) -> list[list[nn.Parameter]]:
    """Return the groups of Parameters that time_projections wants packed."""
    return [
        [block.time_emb_proj.weight for block in blocks],
        [block.time_emb_proj.bias for block in blocks],
        [block.conv1.bias for block in blocks],
    ]


class TimeProjections(nn.Module):
    """A UNet's `time_embed_act`: all blocks' time projections at once, in place of the embedding."""

    def __init__(self, blocks: Sequence[ResnetBlock2D]):
        super().__init__()
        # a tuple, not a ModuleList: the blocks keep their one place in the state dict
        self.blocks = tuple(blocks)

    def forward(self, emb_ND: Tensor) -> tuple[Tensor, ...]:
        return time_projections(self.blocks, emb_ND)


class PatchedUpsample(Swapped):
    """Nearest-neighbour upsampling with a convolution."""

    @staticmethod
    def refusal(module: Upsample2D) -> str:
        """Return why it cannot be swapped, '' if it can."""
        if module.norm is not None or not module.interpolate or module.name != "conv":
            return "it is no plain interpolation"
        return "" if is_plain_conv(module.conv, 3) else "it has no plain 3x3 convolution"

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None, *args, **kwargs) -> Tensor:
        x = channels_last(hidden_states)
        size = [2 * n for n in x.shape[2:]] if output_size is None else output_size
        return upsample_conv(x, self.conv.weight, self.conv.bias, tuple(size))


class PatchedConvIn(Swapped):
    """The first convolution: from here on everything is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(channels_last(x))


class PatchedConvOut(Swapped):
    """The last convolution with the norm and SiLU before it, which do nothing themselves any more."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm_before[0]
        return norm_silu_conv(
            channels_last(x), norm.weight, norm.bias, norm.num_groups, self.weight, self.bias, eps=norm.eps
        )


class Passed(Swapped):
    """A norm or an activation that the module behind it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x
