"""The workload of the ahead-of-time gate: every op in the shapes that SD1.5, SD2.1 and SDXL train with.

Ops run on meta tensors, forward and backward, and kernels/aot/compile_all.py records the launches that a GPU would see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safelight.kernels.moment_blocks import CODE_BYTES
from safelight.kernels.ops.bias_residual import bias_residual
from safelight.kernels.ops.diffusion_loss import DELTA_SCHEDULES, KINDS, LossOptions, diffusion_loss
from safelight.kernels.ops.geglu import geglu, geglu_bwd_recompute
from safelight.kernels.ops.group_norm_silu import group_norm_silu, group_norm_silu_bwd, group_norm_silu_recompute
from safelight.kernels.ops.layer_norm import add_layer_norm, layer_norm, layer_norm_bwd, layer_norm_recompute
from safelight.kernels.ops.noising import PLAIN, NoiseOptions, noising
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.kernels.optim.ema import EMA
from safelight.kernels.optim.split_weights import REMAINDERS

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
# (channels, side in latent pixels) of the residual blocks' first norms
FIRST = (
    (320, 64),
    (640, 64),
    (960, 64),
    (320, 32),
    (640, 32),
    (1280, 32),
    (1920, 32),
    (640, 16),
    (1280, 16),
    (1920, 16),
    (2560, 16),
    (2560, 8),
)
# the same of the norms after the time embedding, and of the transformers
OUTER = ((320, 64), (640, 32), (1280, 16), (1280, 8))
# the same of SDXL at 1024 px, whose outermost level has no transformers
FIRST_XL = (
    (320, 128),
    (640, 128),
    (960, 128),
    (320, 64),
    (640, 64),
    (960, 64),
    (1280, 64),
    (1920, 64),
    (640, 32),
    (1280, 32),
    (1920, 32),
    (2560, 32),
)
OUTER_XL = ((320, 128), (640, 64), (1280, 32))
TRANSFORMERS_XL = OUTER_XL[1:]
# the same of the built-in tiny models at 64 px
FIRST_TINY = (
    (32, 8),
    (64, 8),
    (96, 8),
    (32, 4),
    (64, 4),
    (96, 4),
    (128, 4),
    (192, 4),
    (64, 2),
    (128, 2),
    (192, 2),
    (256, 2),
    # the innermost level of buckets that are not square
    (64, (3, 2)),
    (128, (3, 2)),
    (192, (3, 2)),
    (256, (3, 2)),
)
OUTER_TINY = ((32, 8), (64, 4), (128, 2), (128, (3, 2)))
GROUPS_TINY = 16


def _sides(side: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width."""
    return side if isinstance(side, tuple) else (side, side)


def _meta(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
    """Run the backward pass of an op's outputs, on meta tensors."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def _group_norm(
    channels: int,
    side: int | tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    kind: str,
    order: torch.memory_format,
    groups: int = 32,
) -> None:
    x = _meta(batch, channels, *_sides(side), dtype=dtype).to(memory_format=order)
    weight, bias = _meta(channels, dtype=dtype), _meta(channels, dtype=dtype)
    addend = _meta(batch, channels, dtype=dtype) if kind == "after the time embedding" else None
    silu = kind != "of a transformer"
    _backward(group_norm_silu(x, weight, bias, groups, silu=silu, addend_NC=addend))
    stats = [torch.empty(batch, groups, device="meta") for _ in range(2)]
    group_norm_silu_recompute(x, weight, bias, addend, *stats, groups, 1e-5, silu)
    saved, dy = (x, weight, bias, addend, *stats, groups, 1e-5, silu), torch.empty_like(x)
    # with the gradient of a skip path: all norms but a residual block's second and the UNet's last
    if addend is None:
        group_norm_silu_bwd(dy, *saved, ds=dy)


def _layer_norm(rows: int, features: int, dtype: torch.dtype) -> None:
    x, residual = _meta(1, rows, features, dtype=dtype), _meta(1, rows, features, dtype=dtype)
    weight, bias = _meta(features, dtype=dtype), _meta(features, dtype=dtype)
    _backward(add_layer_norm(x, residual, weight, bias))
    _backward(layer_norm(x, weight, bias))
    stats = [torch.empty(rows, device="meta") for _ in range(2)]
    layer_norm_recompute(x, weight, bias, *stats, 1e-5)
    for sum_ds in (False, True):
        layer_norm_bwd(x.detach(), x.detach(), x, weight, bias, *stats, 1e-5, sum_dx=True, sum_ds=sum_ds)


def _geglu(rows: int, features: int, dtype: torch.dtype) -> None:
    x, dy = _meta(1, rows, features, dtype=dtype), _meta(1, rows, features // 2, dtype=dtype, grad=False)
    _backward(geglu(x))
    # without the sum: where the projection's bias is frozen
    for with_sum in (True, False):
        geglu_bwd_recompute(dy, x.detach(), with_sum=with_sum)


def _bias_residual(channels: int, side: int | tuple[int, int], dtype: torch.dtype, order: torch.memory_format) -> None:
    x = _meta(1, channels, *_sides(side), dtype=dtype).to(memory_format=order)
    bias = _meta(channels, dtype=dtype)
    for residual, residual_bias in ((x, bias), (x, None), (None, None)):
        for scale in (1.0, 0.5):
            _backward(bias_residual(x, bias, residual, scale, residual_bias))
    tokens = _meta(1, math.prod(_sides(side)), channels, dtype=dtype)
    _backward(bias_residual(tokens, bias, tokens))


def _around_the_unet(side: int | tuple[int, int], dtype: torch.dtype, every_option: bool) -> None:
    """Noising, loss, optimizer and moving average: what a step runs before and after the UNet."""
    alphas, words = torch.empty(1000, device="meta"), torch.empty(1, 5, dtype=torch.int64, device="meta")
    mean, cdf = torch.empty(1, 4, *_sides(side), device="meta"), torch.empty(1000, dtype=torch.int64, device="meta")
    for kind in ("epsilon", "v_prediction") if every_option else ("epsilon",):
        offset = NoiseOptions(offset=0.1)
        everything = NoiseOptions(offset=0.1, pyramid_discount=0.3, perturbation=0.1)
        for logvar, noise, table in (
            (mean, PLAIN, None),
            (mean, offset, None),
            (None, offset, None),
            (mean, everything, cdf),
        ):
            noised = noising(
                mean,
                logvar,
                words,
                alphas,
                prediction_type=kind,
                scaling_factor=0.18215,
                options=noise,
                timestep_cdf_T=table,
                dtype=dtype,
            )
        # the UNet's output is channels-last, the target is not
        predicted = noised.noisy_BCHW.to(memory_format=CHANNELS_LAST).requires_grad_()
        for weighting in ("none", "min_snr", "debiased", "p2") if every_option else ("none", "min_snr"):
            error = "huber" if weighting == "p2" else "mse"
            options = LossOptions(error, weighting=weighting, prediction_type=kind)
            ends = (noised.target_BCHW, noised.timesteps_B, alphas, options)
            diffusion_loss(predicted, *ends, num_samples=1).total.backward()
            mask, scales = torch.empty(1, 1, *_sides(side), device="meta"), torch.empty(1, device="meta")
            for extra in ((mask, None), (None, scales), (mask, scales)) if weighting == "min_snr" else ():
                masked = dict(zip(("mask_B1HW", "scales_B"), extra, strict=True))
                diffusion_loss(predicted, *ends, num_samples=1, **masked).total.backward()
        ends = (noised.target_BCHW, noised.timesteps_B, alphas)
        for error, schedule in zip(KINDS[1:], ("constant", *DELTA_SCHEDULES), strict=True) if every_option else ():
            options = LossOptions(error, 0.1, delta_schedule=schedule, prediction_type=kind)
            diffusion_loss(predicted, *ends, options, num_samples=1).total.backward()
    _optimizers([torch.empty(320, 320, device="meta"), torch.empty(320, device="meta")], dtype)


def _optimizers(weights: list[Tensor], dtype: torch.dtype) -> None:
    """AdamW with both kinds of moments and the moving average in every memory mode."""
    for memory in ("fp32",) if dtype == torch.float32 else REMAINDERS:
        gradients = [torch.empty_like(w, dtype=dtype) for w in weights]
        for moments in CODE_BYTES:
            AdamW8bit([w.to(dtype) for w in weights], memory=memory, moments=moments).step(gradients, 1e-6)
    averaged = [w.to(dtype) for w in weights]
    EMA(weights, averaged).update(torch.empty((), device="meta"))
    for remainder in () if dtype == torch.float32 else (torch.int16, torch.int8):
        EMA(weights, averaged, [w.to(remainder) for w in weights]).update(torch.empty((), device="meta"))


def odd(dtype: torch.dtype) -> None:
    """Run ops on meta tensors in shapes that no vectorized access fits."""
    # 9 x 9 pixels in NCHW, and one program per group
    _group_norm(1280, 9, 1, dtype, "of a transformer", NCHW)
    _optimizers([torch.empty(65, 65, device="meta")], dtype)


def representative(dtype: torch.dtype) -> None:
    """Run every op once or twice on meta tensors: all kernels, few shapes."""
    _group_norm(320, 64, 1, dtype, "after the time embedding", CHANNELS_LAST)
    _group_norm(1280, 8, 1, dtype, "of a transformer", CHANNELS_LAST)
    _layer_norm(4096, 320, dtype)
    _geglu(4096, 2560, dtype)
    _bias_residual(320, 64, dtype, CHANNELS_LAST)
    _around_the_unet(64, dtype, every_option=False)


def full(dtype: torch.dtype) -> None:
    """Run every op on meta tensors in the shapes of SD1.5, SD2.1 and SDXL."""
    representative(dtype)
    for batch in (1, 16):
        for channels, side in FIRST:
            _group_norm(channels, side, batch, dtype, "first", CHANNELS_LAST)
        for channels, side in FIRST_XL:
            _group_norm(channels, side, batch, dtype, "first", CHANNELS_LAST)
        for channels, side in (*OUTER, *OUTER_XL):
            _group_norm(channels, side, batch, dtype, "after the time embedding", CHANNELS_LAST)
        for channels, side in (*OUTER, *TRANSFORMERS_XL):
            _group_norm(channels, side, batch, dtype, "of a transformer", CHANNELS_LAST)
    for channels, side in (*OUTER, *TRANSFORMERS_XL):
        _layer_norm(side * side, channels, dtype)
        _geglu(side * side, 8 * channels, dtype)
    for channels, side in (*OUTER, *OUTER_XL):
        _bias_residual(channels, side, dtype, CHANNELS_LAST)
    # the number of partial losses is compiled in, as the next power of two: 4, 8 and 16
    for side in (64, 88, 128):
        _around_the_unet(side, dtype, every_option=True)


def tiny(dtype: torch.dtype) -> None:
    """Run every op on meta tensors in the shapes of the built-in tiny models at 64 px."""
    for batch in (1, 2, 8):
        for channels, side in FIRST_TINY:
            _group_norm(channels, side, batch, dtype, "first", CHANNELS_LAST, GROUPS_TINY)
        for channels, side in OUTER_TINY:
            for kind in ("after the time embedding", "of a transformer"):
                _group_norm(channels, side, batch, dtype, kind, CHANNELS_LAST, GROUPS_TINY)
            _layer_norm(batch * math.prod(_sides(side)), channels, dtype)
            _geglu(batch * math.prod(_sides(side)), 8 * channels, dtype)
            _bias_residual(channels, side, dtype, CHANNELS_LAST)
    for sides in (8, (10, 6)):
        _around_the_unet(sides, dtype, every_option=False)
