"""A norm and the convolution or projection after it as one autograd function, which saves the norm's input only.

A norm's output is as large as its input, and backward needs it only for the weight gradient of the layer after it. Here
it is recomputed from the input and the saved statistics: one memory-bound pass, no matmul. The convolutions and
projections themselves are PyTorch's.

    norm_silu_conv      conv2d(silu(group_norm(x + addend)))                    residual blocks
    group_norm_linear   linear(group_norm(x)), pixels as tokens                 entry to a transformer
    norm_linear         linear(layer_norm(s)), s = x or x + residual            transformer blocks' projections
    feed_forward        linear(geglu(linear(layer_norm(s)))), plus s if that    transformer blocks' feed-forward
                        is x + residual

Skip connections. Where x is also used beside its norm, the function returns x too, and the caller uses that one. Its
gradient, ds, is then added to dx inside the norm's backward kernel, and autograd has no two gradients of x to add.

Bias gradients. The gradient of a bias is the sum of a gradient that some norm's backward kernel reads or writes anyway,
so these functions can compute it for a bias that is added outside of them. Whoever adds the bias adds it detached, and
passes it here as
    input_bias   a bias already contained in x, from the layer that produced x: its gradient is the sum of dx
    skip_bias    a bias added later to the returned x (and to nothing else): its gradient is the sum of ds

Frozen weights (requires_grad False) cost no matmul for their gradient, and the norm's output is then not recomputed.

Letters: N batch, C input channels, K output channels, M rows, D input features, F output features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from safelight.kernels.ops.geglu import geglu_bwd_recompute, geglu_fwd
from safelight.kernels.ops.group_norm_silu import (
    check_group_norm,
    group_norm_silu_bwd,
    group_norm_silu_fwd,
    group_norm_silu_recompute,
)
from safelight.kernels.ops.layer_norm import check_layer_norm, layer_norm_bwd, layer_norm_fwd, layer_norm_recompute
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
        skip_bias,
        num_groups,
        eps,
        return_x,
    ):
        norm = (x, norm_weight, norm_bias, addend_NC)
        h, mean_NG, rstd_NG = group_norm_silu_fwd(*norm, num_groups, eps, True)
        ctx.save_for_backward(*norm, mean_NG, rstd_NG, conv_weight)
        ctx.norm_options = (num_groups, eps, True)
        ctx.bias_sizes = None if conv_bias is None else list(conv_bias.shape)
        ctx.return_x, ctx.has_skip_bias = return_x, skip_bias is not None
        ctx.set_materialize_grads(False)
        y = F.conv2d(h, conv_weight, conv_bias, padding=1)
        return (x, y) if return_x else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ds, dy = grads if ctx.return_x else (None, *grads)
        sum_ds = ctx.has_skip_bias and ds is not None
        if dy is None:
            return ds, *[None] * 5, channel_sum(ds) if sum_ds else None, *[None] * 3
        *norm, conv_weight = ctx.saved_tensors
        # without a weight gradient only the shape of h is read
        h = group_norm_silu_recompute(*norm, *ctx.norm_options) if ctx.needs_input_grad[4] else norm[0]
        dh, dconv_weight, dconv_bias = torch.ops.aten.convolution_backward(
            dy,
            h,
            conv_weight,
            ctx.bias_sizes,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, ctx.needs_input_grad[4], ctx.bias_sizes is not None and ctx.needs_input_grad[5]],
        )
        # free h before the norm's gradients are allocated, which lowers the peak by one tensor
        del h
        dx, dnorm_weight, dnorm_bias, daddend, *total = group_norm_silu_bwd(
            dh, *norm, *ctx.norm_options, ds=ds, sum_ds=sum_ds
        )
        dskip_bias = total[0] if total else None
        return dx, dnorm_weight, dnorm_bias, daddend, dconv_weight, dconv_bias, dskip_bias, *[None] * 3


def norm_silu_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_groups: int,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    addend_NC: Tensor | None = None,
    return_x: bool = False,
    skip_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return conv2d(silu(group_norm(x + addend))), or with return_x (x, that). Saves x and fp32 statistics.

    x: (N, C, H, W), fp32 | fp16 | bf16, channels-last or not -> (N, K, H, W), same dtype. norm_weight, norm_bias: (C,);
    addend_NC: (N, C); conv_weight: (K, C, 3, 3), padding 1; conv_bias: (K,), or None, which leaves it to
    `bias_residual`. return_x: use the returned x wherever else x is used. skip_bias: (C,), see the module's docstring;
    only with return_x.
    Raises ValueError for shapes that do not fit.
    """
    check_group_norm(x, norm_weight, addend_NC, num_groups)
    if x.dim() != 4 or conv_weight.dim() != 4 or conv_weight.shape[1] != x.shape[1]:
        raise ValueError(f"a convolution weight of {tuple(conv_weight.shape)} does not fit x of {tuple(x.shape)}")
    addend_NC = None if addend_NC is None else addend_NC.contiguous()
    return _NormSiLUConv.apply(
        with_flat_pixels(x),
        norm_weight,
        norm_bias,
        addend_NC,
        conv_weight,
        conv_bias,
        skip_bias,
        num_groups,
        eps,
        return_x,
    )


def linear_gradients(
    dy: Tensor, h: Tensor | None, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (dh, dweight, dbias) of y = h weight^T + bias. h: None if no dweight is needed, which is then None."""
    rows_dy = dy.reshape(-1, dy.shape[-1])
    # dh = dy weight;  dweight = dy^T h;  dbias = sum over rows of dy
    dh = (rows_dy @ weight).view(*dy.shape[:-1], weight.shape[1])
    dweight = None if h is None else rows_dy.t() @ h.reshape(-1, h.shape[-1])
    return dh, dweight, row_sum(dy) if has_bias else None


class _GroupNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, skip_bias, num_groups, eps):
        norm = (x, norm_weight, norm_bias, None)
        h, mean_NG, rstd_NG = group_norm_silu_fwd(*norm, num_groups, eps, False)
        ctx.save_for_backward(*norm, mean_NG, rstd_NG, weight)
        # the gradient of a detached bias is computed elsewhere
        ctx.norm_options, ctx.has_bias = (num_groups, eps, False), bias is not None and ctx.needs_input_grad[4]
        ctx.has_skip_bias = skip_bias is not None
        ctx.set_materialize_grads(False)
        return x, F.linear(as_tokens(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, dy):
        sum_ds = ctx.has_skip_bias and ds is not None
        if dy is None:
            return ds, *[None] * 4, channel_sum(ds) if sum_ds else None, None, None
        *norm, weight = ctx.saved_tensors
        h = as_tokens(group_norm_silu_recompute(*norm, *ctx.norm_options)) if ctx.needs_input_grad[3] else None
        dh, dweight, dbias = linear_gradients(dy, h, weight, ctx.has_bias)
        del h
        dh = as_images(dh, *norm[0].shape[2:])
        dx, dnorm_weight, dnorm_bias, _, *total = group_norm_silu_bwd(
            dh, *norm, *ctx.norm_options, ds=ds, sum_ds=sum_ds
        )
        return dx, dnorm_weight, dnorm_bias, dweight, dbias, total[0] if total else None, None, None


def as_tokens(x: Tensor) -> Tensor:
    """Return images (N, C, H, W) as tokens (N, H W, C): a view if x is channels-last."""
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
    skip_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (x, linear(group_norm(x)) of every pixel, (N, H W, F)). Saves x and fp32 statistics.

    x: (N, C, H, W), fp32 | fp16 | bf16, channels-last or not; use the returned x wherever else x is used. weight: (F,
    C), or (F, C, 1, 1) of a convolution; bias: (F,) or None. skip_bias: (C,), see the module's docstring.
    Raises ValueError for shapes that do not fit.
    """
    check_group_norm(x, norm_weight, None, num_groups)
    matrix = weight.flatten(1)
    if x.dim() != 4 or matrix.shape[1] != x.shape[1]:
        raise ValueError(f"a projection of {tuple(weight.shape)} does not fit x of {tuple(x.shape)}")
    return _GroupNormLinear.apply(with_flat_pixels(x), norm_weight, norm_bias, matrix, bias, skip_bias, num_groups, eps)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, residual, weight, input_bias, eps):
        s, h, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, residual, eps)
        ctx.save_for_backward(s, norm_weight, norm_bias, mean, rstd, weight)
        ctx.eps, ctx.has_residual = eps, residual is not None
        ctx.has_input_bias = input_bias is not None
        ctx.set_materialize_grads(False)
        y = F.linear(h, weight)
        return (s, y) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ds, dy = grads if ctx.has_residual else (None, *grads)
        if dy is None:
            return ds, None, None, ds, None, row_sum(ds) if ctx.has_input_bias else None, None
        *norm, weight = ctx.saved_tensors
        h = layer_norm_recompute(*norm, ctx.eps) if ctx.needs_input_grad[4] else None
        dh, dweight, _ = linear_gradients(dy, h, weight, False)
        del h
        dx, dnorm_weight, dnorm_bias, *sums = layer_norm_bwd(dh, ds, *norm, ctx.eps, sum_dx=ctx.has_input_bias)
        dinput_bias = sums[0] if sums else None
        return dx, dnorm_weight, dnorm_bias, dx if ctx.has_residual else None, dweight, dinput_bias, None


def check_linear(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError if a projection's weight does not fit x."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"a projection of {tuple(weight.shape)} does not fit x of {tuple(x.shape)}")


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    input_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return linear(layer_norm(x)), or with a residual (s, linear(layer_norm(s))), s = x + residual.

    x: (..., D), fp32 | fp16 | bf16 -> (..., F), same dtype. weight: (F, D); residual: shape and dtype of x.
    input_bias: (D,), see the module's docstring. Saves x (or s) and fp32 statistics.
    Raises ValueError for shapes that do not fit.
    """
    check_layer_norm(x, norm_weight, residual)
    check_linear(x, weight)
    residual = None if residual is None else residual.contiguous()
    return _NormLinear.apply(x.contiguous(), norm_weight, norm_bias, residual, weight, input_bias, eps)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, norm_weight, norm_bias, residual, in_weight, in_bias, out_weight, out_bias, input_bias, eps, recompute
    ):
        s, h, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, residual, eps)
        projected = F.linear(h, in_weight, in_bias)
        saved = (None if recompute else projected, in_bias if recompute else None)
        ctx.save_for_backward(s, norm_weight, norm_bias, mean, rstd, in_weight, out_weight, *saved)
        ctx.eps, ctx.has_residual, ctx.has_input_bias = eps, residual is not None, input_bias is not None
        ctx.has_in_bias, ctx.has_out_bias = in_bias is not None, out_bias is not None
        y = F.linear(geglu_fwd(projected), out_weight, out_bias)
        return y.add_(s) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *norm, in_weight, out_weight, projected, in_bias = ctx.saved_tensors
        needs_in, needs_in_bias, needs_out, needs_out_bias = ctx.needs_input_grad[4:8]
        h = layer_norm_recompute(*norm, ctx.eps) if needs_in or projected is None else None
        if projected is None:
            projected = F.linear(h, in_weight, in_bias)
        rows_dy = dy.reshape(-1, dy.shape[-1])
        # dgated = dy out_weight;  dout_weight = dy^T gated, where gated overwrites dgated after its last use
        dgated = (rows_dy @ out_weight).view(*dy.shape[:-1], -1)
        dprojected, gated, din_bias = geglu_bwd_recompute(dgated, projected, ctx.has_in_bias and needs_in_bias)
        dout_weight = rows_dy.t() @ gated.view(len(rows_dy), -1) if needs_out else None
        del dgated, gated, projected
        dh, din_weight, _ = linear_gradients(dprojected, h if needs_in else None, in_weight, has_bias=False)
        del dprojected, h
        # with a residual, y = s + ...: dy is also the gradient of s by that path, and its sum is dout_bias, in one pass
        has_out_bias = ctx.has_out_bias and needs_out_bias
        ds, sum_ds = (dy, has_out_bias) if ctx.has_residual else (None, False)
        dx, dnorm_weight, dnorm_bias, *sums = layer_norm_bwd(
            dh, ds, *norm, ctx.eps, sum_dx=ctx.has_input_bias, sum_ds=sum_ds
        )
        dinput_bias = sums.pop(0) if ctx.has_input_bias else None
        dout_bias = (sums[0] if sums else row_sum(dy)) if has_out_bias else None
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
            dinput_bias,
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
    input_bias: Tensor | None = None,
    eps: float = 1e-5,
    recompute: bool = False,
) -> Tensor:
    """Return linear(geglu(linear(layer_norm(x)))), or with a residual s + the same of s, s = x + residual.

    x: (..., D), fp32 | fp16 | bf16 -> (..., E), same dtype. in_weight: (2F, D); out_weight: (E, F), E = D with a
    residual;
    in_bias: (2F,) or None; out_bias: (E,) or None; residual: shape and dtype of x. input_bias: (D,), see the module's
    docstring. Saves x (or s), fp32 statistics and the first projection's output; with recompute that output is not
    saved but recomputed, which costs its matmul again.
    Raises ValueError for shapes that do not fit.
    """
    check_layer_norm(x, norm_weight, residual)
    check_linear(x, in_weight)
    if out_weight.dim() != 2 or in_weight.shape[0] != 2 * out_weight.shape[1]:
        raise ValueError(
            f"projections of {tuple(in_weight.shape)} and {tuple(out_weight.shape)} do not fit around a GEGLU"
        )
    if residual is not None and out_weight.shape[0] != x.shape[-1]:
        raise ValueError(f"a projection of {tuple(out_weight.shape)} does not fit a residual of {tuple(x.shape)}")
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
        input_bias,
        eps,
        recompute,
    )
