"""A norm and the matrix work behind it as one function, which saves the norm's input and not its output.

The output of a norm is as large as its input and is needed once more only for the weight gradient behind it. Here it is
computed again in the backward pass from the input and two numbers a group or row: memory-bound work of one pass, no matrix
work. The convolution and the projection themselves are PyTorch's.

    norm_silu_conv      conv2d(silu(group_norm(x + addend)))                    the residual blocks
    group_norm_linear   linear(group_norm(x)), pixels as tokens                 the way into a transformer
    norm_linear         linear(layer_norm(x)), or of x + residual, and the sum  the transformer blocks' projections
    feed_forward        linear(geglu(linear(layer_norm(x)))), or s plus that    the transformer blocks' feed-forward

Where x goes on beside its norm, as a residual does, the function returns it: the gradient that comes back by it, ds, joins
dx in the norm's own pass, and autograd has no sum of two tensors to make.

A bias' gradient is a sum of a gradient that some norm's backward pass reads or writes anyway; whoever adds such a bias takes
it detached. `bias_in_x` is one that x has in it already, from the projection that made it: its gradient is the sum of dx.
`bias_of_x` is one that is added behind to the x returned, and to nothing of another gradient: its gradient is the sum of ds.

Letters: N batch, C K channels in and out, M rows, D F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from safelight.kernels.ops.geglu import geglu_bwd_again, geglu_fwd
from safelight.kernels.ops.group_norm_silu import (
    check_group_norm,
    group_norm_silu_again,
    group_norm_silu_bwd,
    group_norm_silu_fwd,
)
from safelight.kernels.ops.layer_norm import check_layer_norm, layer_norm_again, layer_norm_bwd, layer_norm_fwd
from safelight.kernels.reference import channel_sum, row_sum
from safelight.kernels.triton.jit import with_flat_pixels


class _NormSiLUConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight,
        norm_bias,
        addend_NC,
        conv_weight,
        conv_bias,
        bias_of_x,
        num_groups,
        eps,
        silu,
        stride,
        padding,
        forks,
    ):
        norm = (x, norm_weight, norm_bias, addend_NC)
        h, mean_NG, rstd_NG = group_norm_silu_fwd(*norm, num_groups, eps, silu)
        ctx.save_for_backward(*norm, mean_NG, rstd_NG, conv_weight)
        ctx.norm_options, ctx.conv_options = (num_groups, eps, silu), (stride, padding)
        ctx.bias_sizes = None if conv_bias is None else list(conv_bias.shape)
        ctx.forks, ctx.has_bias_of_x = forks, bias_of_x is not None
        ctx.set_materialize_grads(False)
        y = F.conv2d(h, conv_weight, conv_bias, stride, padding)
        return (x, y) if forks else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ds, dy = grads if ctx.forks else (None, *grads)
        sum_ds = ctx.has_bias_of_x and ds is not None
        if dy is None:
            return ds, *[None] * 5, channel_sum(ds) if sum_ds else None, *[None] * 6
        *norm, conv_weight = ctx.saved_tensors
        h = group_norm_silu_again(*norm, *ctx.norm_options)
        stride, padding = ctx.conv_options
        dh, dconv_weight, dconv_bias = torch.ops.aten.convolution_backward(
            dy,
            h,
            conv_weight,
            ctx.bias_sizes,
            [stride, stride],
            [padding, padding],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, ctx.needs_input_grad[4], ctx.bias_sizes is not None],
        )
        # freed before the norm's own gradients are made: the peak is one tensor lower
        del h
        dx, dnorm_weight, dnorm_bias, daddend, *total = group_norm_silu_bwd(
            dh, *norm, *ctx.norm_options, ds=ds, sum_ds=sum_ds
        )
        dbias_of_x = total[0] if total else None
        return dx, dnorm_weight, dnorm_bias, daddend, dconv_weight, dconv_bias, dbias_of_x, *[None] * 6


def norm_silu_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_groups: int,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = True,
    addend_NC: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    forks: bool = False,
    bias_of_x: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return conv2d(silu(group_norm(x + addend))), saving x and fp32 statistics alone; if it forks (x, that).

    x: (N, C, H, W), fp32 | fp16 | bf16, channels-last or not. conv_weight: (K, C, h, w). Without conv_bias, add it behind
    with `bias_residual`. forks: use the x returned for what else x is for; bias_of_x: (C,) or None, gets its gradient here
    (above). Raises ValueError for shapes that do not fit.
    """
    check_group_norm(x, norm_weight, addend_NC, num_groups)
    if x.dim() != 4 or conv_weight.dim() != 4 or conv_weight.shape[1] != x.shape[1]:
        raise ValueError(f"a kernel of {tuple(conv_weight.shape)} does not fit x of {tuple(x.shape)}")
    addend_NC = None if addend_NC is None else addend_NC.contiguous()
    return _NormSiLUConv.apply(
        with_flat_pixels(x),
        norm_weight,
        norm_bias,
        addend_NC,
        conv_weight,
        conv_bias,
        bias_of_x,
        num_groups,
        eps,
        silu,
        stride,
        padding,
        forks,
    )


def linear_gradients(dy: Tensor, h: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (dh, dweight, dbias) of y = h weight^T + bias."""
    rows_dy, rows_h = dy.reshape(-1, dy.shape[-1]), h.reshape(-1, h.shape[-1])
    # dh = dy weight;  dweight = dy^T h;  dbias = sum over rows of dy
    return (rows_dy @ weight).view(h.shape), rows_dy.t() @ rows_h, row_sum(dy) if has_bias else None


class _GroupNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, bias_of_x, num_groups, eps):
        norm = (x, norm_weight, norm_bias, None)
        h, mean_NG, rstd_NG = group_norm_silu_fwd(*norm, num_groups, eps, False)
        ctx.save_for_backward(*norm, mean_NG, rstd_NG, weight)
        # a detached bias has its gradient made elsewhere
        ctx.norm_options, ctx.has_bias = (num_groups, eps, False), bias is not None and ctx.needs_input_grad[4]
        ctx.has_bias_of_x = bias_of_x is not None
        ctx.set_materialize_grads(False)
        return x, F.linear(as_tokens(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, dy):
        sum_ds = ctx.has_bias_of_x and ds is not None
        if dy is None:
            return ds, *[None] * 4, channel_sum(ds) if sum_ds else None, None, None
        *norm, weight = ctx.saved_tensors
        h = as_tokens(group_norm_silu_again(*norm, *ctx.norm_options))
        dh, dweight, dbias = linear_gradients(dy, h, weight, ctx.has_bias)
        del h
        dh = as_images(dh, *norm[0].shape[2:])
        dx, dnorm_weight, dnorm_bias, _, *total = group_norm_silu_bwd(
            dh, *norm, *ctx.norm_options, ds=ds, sum_ds=sum_ds
        )
        return dx, dnorm_weight, dnorm_bias, dweight, dbias, total[0] if total else None, None, None


def as_tokens(x: Tensor) -> Tensor:
    """Return images (N, C, H, W) as tokens (N, H W, C): a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_images(x: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (N, H W, C) as images (N, C, H, W): a view, channels-last."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def group_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    bias_of_x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (x, linear(group_norm(x)) of every pixel, (N, H W, F)), saving x and fp32 statistics alone.

    x: (N, C, H, W), fp32 | fp16 | bf16, channels-last or not; use the x returned for what follows. weight: (F, C), or a
    convolution's of (F, C, 1, 1). bias_of_x: (C,) or None, gets its gradient here (above). Raises ValueError for shapes that
    do not fit.
    """
    check_group_norm(x, norm_weight, None, num_groups)
    matrix = weight.flatten(1)
    if x.dim() != 4 or matrix.shape[1] != x.shape[1]:
        raise ValueError(f"a projection of {tuple(weight.shape)} does not fit x of {tuple(x.shape)}")
    return _GroupNormLinear.apply(with_flat_pixels(x), norm_weight, norm_bias, matrix, bias, bias_of_x, num_groups, eps)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, residual, weight, bias, bias_in_x, eps):
        s, h, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, residual, eps)
        ctx.save_for_backward(s, norm_weight, norm_bias, mean, rstd, weight)
        ctx.eps, ctx.has_residual, ctx.has_bias = eps, residual is not None, bias is not None
        ctx.has_bias_in_x = bias_in_x is not None
        ctx.set_materialize_grads(False)
        y = F.linear(h, weight, bias)
        return (s, y) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ds, dy = grads if ctx.has_residual else (None, *grads)
        if dy is None:
            return ds, None, None, ds, None, None, row_sum(ds) if ctx.has_bias_in_x else None, None
        *norm, weight = ctx.saved_tensors
        h = layer_norm_again(*norm, ctx.eps)
        dh, dweight, dbias = linear_gradients(dy, h, weight, ctx.has_bias)
        del h
        dx, dnorm_weight, dnorm_bias, *sums = layer_norm_bwd(dh, ds, *norm, ctx.eps, sum_dx=ctx.has_bias_in_x)
        dbias_in_x = sums[0] if sums else None
        return dx, dnorm_weight, dnorm_bias, dx if ctx.has_residual else None, dweight, dbias, dbias_in_x, None


def check_linear(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError where a projection does not fit x."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"a projection of {tuple(weight.shape)} does not fit x of {tuple(x.shape)}")


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    bias_in_x: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return linear(layer_norm(x)); with a residual (s, linear(layer_norm(s))), s = x + residual.

    x: (..., D), fp32 | fp16 | bf16; weight: (F, D). Several projections of one norm are one call with their weights
    stacked, split behind it. bias_in_x: (D,), gets its gradient here (above). Saves x or s and fp32 statistics alone.
    Raises ValueError for shapes that do not fit.
    """
    check_layer_norm(x, norm_weight, residual)
    check_linear(x, weight)
    residual = None if residual is None else residual.contiguous()
    return _NormLinear.apply(x.contiguous(), norm_weight, norm_bias, residual, weight, bias, bias_in_x, eps)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, norm_weight, norm_bias, residual, in_weight, in_bias, out_weight, out_bias, bias_in_x, eps, recompute
    ):
        s, h, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, residual, eps)
        projected = F.linear(h, in_weight, in_bias)
        kept = (None if recompute else projected, in_bias if recompute else None)
        ctx.save_for_backward(s, norm_weight, norm_bias, mean, rstd, in_weight, out_weight, *kept)
        ctx.eps, ctx.has_residual, ctx.has_bias_in_x = eps, residual is not None, bias_in_x is not None
        ctx.has_in_bias, ctx.has_out_bias = in_bias is not None, out_bias is not None
        y = F.linear(geglu_fwd(projected), out_weight, out_bias)
        return y.add_(s) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *norm, in_weight, out_weight, projected, in_bias = ctx.saved_tensors
        h = layer_norm_again(*norm, ctx.eps)
        if projected is None:
            projected = F.linear(h, in_weight, in_bias)
        rows_dy = dy.reshape(-1, dy.shape[-1])
        # dgated = dy W;  dW = dy^T gated, which takes dgated's place once that is used up
        dgated = (rows_dy @ out_weight).view(*dy.shape[:-1], -1)
        dprojected, gated, din_bias = geglu_bwd_again(dgated, projected, ctx.has_in_bias)
        dout_weight = rows_dy.t() @ gated.view(len(rows_dy), -1)
        del dgated, gated, projected
        dh, din_weight, _ = linear_gradients(dprojected, h, in_weight, has_bias=False)
        del dprojected, h
        # with a residual y = s + ..., so dy is the gradient of s from elsewhere: its sum, db, is of the same pass
        ds, sum_ds = (dy, ctx.has_out_bias) if ctx.has_residual else (None, False)
        dx, dnorm_weight, dnorm_bias, *sums = layer_norm_bwd(
            dh, ds, *norm, ctx.eps, sum_dx=ctx.has_bias_in_x, sum_ds=sum_ds
        )
        dbias_in_x = sums.pop(0) if ctx.has_bias_in_x else None
        dout_bias = (sums[0] if sums else row_sum(dy)) if ctx.has_out_bias else None
        dresidual = dx if ctx.has_residual else None
        return (
            dx,
            dnorm_weight,
            dnorm_bias,
            dresidual,
            din_weight,
            din_bias,
            dout_weight,
            dout_bias,
            dbias_in_x,
            None,
            None,
        )


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    bias_in_x: Tensor | None = None,
    eps: float = 1e-5,
    recompute: bool = False,
) -> Tensor:
    """Return linear(geglu(linear(layer_norm(x)))); with a residual s + the same of s, s = x + residual.

    x: (..., D), fp32 | fp16 | bf16; in_weight: (2F, D); out_weight: (E, F), E = D with a residual. bias_in_x: (D,), gets its
    gradient here (above). Saves x or s, fp32 statistics, and the first projection; with recompute not that either, at the
    price of its matmul once more. Raises ValueError for shapes that do not fit.
    """
    check_layer_norm(x, norm_weight, residual)
    check_linear(x, in_weight)
    if out_weight.dim() != 2 or in_weight.shape[0] != 2 * out_weight.shape[1]:
        raise ValueError(
            f"projections of {tuple(in_weight.shape)} and {tuple(out_weight.shape)} do not fit a GEGLU between"
        )
    if residual is not None and out_weight.shape[0] != x.shape[-1]:
        raise ValueError(f"a projection of {tuple(out_weight.shape)} does not go back to x of {tuple(x.shape)}")
    residual = None if residual is None else residual.contiguous()
    return _FeedForward.apply(
        x.contiguous(),
        norm_weight,
        norm_bias,
        residual,
        in_weight,
        in_bias,
        out_weight,
        out_bias,
        bias_in_x,
        eps,
        recompute,
    )
