"""Nearest-neighbour upsampling followed by a convolution, as one function that saves only the small input.

The upsampled image is four times as large, and backward needs it only for the weight gradient, so it is recomputed
there: one memory-bound pass. The convolution itself is PyTorch's. Letters: N batch, C input channels, K output
channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# keeps height and width under the 3x3 kernels of diffusers' upsamplers
PADDING = (1, 1)


class _UpsampleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, size, padding):
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.padding = size, padding
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        # behind a concatenation dy is a channel slice, which the convolution would copy itself; copy it here, visibly
        dy = dy.contiguous(memory_format=torch.channels_last if dy.stride(1) == 1 else torch.contiguous_format)
        # dupsampled = conv_transpose(dy, weight);  dweight = correlation of upsampled x with dy;  dbias = sum of dy
        upsampled = F.interpolate(x, size=ctx.size, mode="nearest")
        dupsampled, dweight, dbias = torch.ops.aten.convolution_backward(
            dy,
            upsampled,
            weight,
            ctx.bias_sizes,
            [1, 1],
            list(ctx.padding),
            [1, 1],
            False,
            [0, 0],
            1,
            [True, ctx.needs_input_grad[1], ctx.bias_sizes is not None and ctx.needs_input_grad[2]],
        )
        del upsampled
        # dx = sum of dupsampled over the pixels that each pixel of x was copied to
        dx = torch.ops.aten.upsample_nearest2d_backward(dupsampled, ctx.size, x.shape)
        return dx, dweight, dbias, None, None


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Return conv2d(x upsampled to `size` by nearest neighbours), saving only x.

    x: (N, C, H, W), any floating dtype -> (N, K, ...) of the same. weight: (K, C, h, w); bias: (K,) or None.
    Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"a convolution weight of {tuple(weight.shape)} does not fit x of {tuple(x.shape)}")
    return _UpsampleConv.apply(x, weight, bias, list(size), PADDING)
