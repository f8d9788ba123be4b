"""The training loss: weighted squared or Huber errors of each sample, and their sum over a batch.

    l_b = mean_i m_i error(p_i - t_i)        L = sum_b s_b w(t_b) l_b / num_samples

error(d), with u = t / T, how far the timestep is on the way to nothing but noise:
    mse           d^2
    huber         d^2 where |d| <= delta, else delta (2 |d| - delta)      twice the usual form, so that it begins as mse
    pseudo_huber  2 delta (sqrt(d^2 + delta^2) - delta)                   the same limits without a corner
    mse_huber     u mse + (1 - u) huber
    huber_mse     u huber + (1 - u) mse

delta may depend on the timestep. It then falls from 1 without noise to `delta` at the noisiest timestep:
    constant      delta
    exponential   delta^u
    snr           (1 - delta) / (1 + sigma)^2 + delta, with sigma = sqrt((1 - a) / a)

m is a mask, the weight of each latent pixel, and s the scale of a sample's loss; both are optional and 1 without. The
mean is over all elements, whatever the mask: a pixel's gradient does not depend on how much of its photo is masked.

Every weighting is defined as a weight on the epsilon error. For v-prediction it is converted, because the same mistake
is (SNR + 1) / SNR times as large when measured in v, with SNR = a / (1 - a):
    min_snr     min(SNR, gamma) / SNR         (in v: min(SNR, gamma) / (SNR + 1))
    debiased    1 / sqrt(min(SNR, 1000))
    p2          1 / (1 + SNR)^gamma
    none        1 for both prediction types, as in other trainers

Two launches, no host sync: partial sums, then one program that finishes all samples in a fixed order.
To add a weighting: a function in WEIGHTINGS, its branch in `_weight`, and a row in trainer/registry/losses.py. To add a
kind: its formula in `_errors`, in the forward and, as a slope, in the backward kernel, and its row.
Letters: B batch, C latent channels, H W latent height and width, T timesteps, P partial sums of a sample.
Source: min-SNR: Hang et al. 2023, arXiv:2303.09556; P2: Choi et al. 2022, arXiv:2204.00227; debiased: Yu et al. 2023,
arXiv:2310.08442, with kohya's cap on the SNR; pseudo-Huber and its schedules: Khrapov et al. 2024, arXiv:2403.16728, as
kohya has them; blends: EveryDream2, which takes half of this Huber error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from safelight.kernels.triton.jit import cdiv, kernel, next_power_of_2, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

KINDS = ("mse", "huber", "pseudo_huber", "mse_huber", "huber_mse")
DELTA_SCHEDULES = ("constant", "exponential", "snr")
PREDICTION_TYPES = ("epsilon", "v_prediction")
DEBIASED_MAX_SNR = 1000.0
BLOCK = 4096
MAX_PARTS = 32
BLOCK_B = 32


def _min_snr(snr_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    # the conversion to v cancels the division by an SNR that may be 0
    return snr_B.clamp(max=gamma) / (snr_B if prediction_type == "epsilon" else snr_B + 1)


def _debiased(snr_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    capped_B = snr_B.clamp(max=DEBIASED_MAX_SNR)
    # SNR 0 occurs in v-prediction only, where the converted weight tends to 0
    return torch.where(capped_B > 0, capped_B.rsqrt(), 0) * _conversion(snr_B, prediction_type)


def _p2(snr_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    return (1 + snr_B) ** -gamma * _conversion(snr_B, prediction_type)


def _conversion(snr_B: Tensor, prediction_type: str) -> Tensor:
    """Return the squared epsilon error divided by the squared error of this prediction type."""
    return torch.ones_like(snr_B) if prediction_type == "epsilon" else snr_B / (snr_B + 1)


# name -> function of (SNR, gamma, prediction type)
WEIGHTINGS = {
    "none": lambda snr_B, gamma, prediction_type: torch.ones_like(snr_B),
    "min_snr": _min_snr,
    "debiased": _debiased,
    "p2": _p2,
}


@dataclass(frozen=True)
class LossOptions:
    """How a sample's error is computed and weighted; the formulas are in the module's docstring.

    kind: one of KINDS; delta, delta_schedule: of all but mse. weighting: none | min_snr | debiased | p2; gamma: of
    min_snr and p2. Raises ValueError for an unknown name, and for delta or gamma of 0 or less.
    """

    kind: str = "mse"
    delta: float = 1.0
    weighting: str = "none"
    gamma: float = 5.0
    prediction_type: str = "epsilon"
    delta_schedule: str = "constant"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("weighting", self.weighting, WEIGHTINGS),
            ("prediction type", self.prediction_type, PREDICTION_TYPES),
            ("delta schedule", self.delta_schedule, DELTA_SCHEDULES),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(known)}")
        if not (self.delta > 0 and self.gamma > 0):
            raise ValueError(f"delta {self.delta} and gamma {self.gamma} must be above 0")


class DiffusionLoss(NamedTuple):
    """total: L, a differentiable scalar; losses_B: l_b, which is masked but not weighted, detached. Both float32."""

    total: Tensor
    losses_B: Tensor


def loss_weights(alphas_cumprod_T: Tensor, timesteps_B: Tensor, options: LossOptions) -> Tensor:
    """Return w(t_b), (B,), in the dtype of alphas_cumprod_T, computed in plain PyTorch."""
    a_B = alphas_cumprod_T[timesteps_B]
    return WEIGHTINGS[options.weighting](a_B / (1 - a_B), options.gamma, options.prediction_type)


def deltas(alphas_cumprod_T: Tensor, timesteps_B: Tensor, options: LossOptions) -> Tensor:
    """Return delta at each timestep, (B,), in the dtype of alphas_cumprod_T, computed in plain PyTorch."""
    a_B = alphas_cumprod_T[timesteps_B]
    if options.delta_schedule == "exponential":
        return options.delta ** _noise_fractions(alphas_cumprod_T, timesteps_B)
    if options.delta_schedule == "snr":
        # 1 / (1 + sigma)^2, also where a is 0
        near_B = a_B / (a_B.sqrt() + (1 - a_B).sqrt()).square()
        return (1 - options.delta) * near_B + options.delta
    return torch.full_like(a_B, options.delta)


def _noise_fractions(alphas_cumprod_T: Tensor, timesteps_B: Tensor) -> Tensor:
    """Return u, (B,): where each timestep is between no noise, 0, and nothing but noise, 1."""
    return timesteps_B.to(alphas_cumprod_T.dtype) / len(alphas_cumprod_T)


def _errors(difference_BCHW: Tensor, delta_B111: Tensor, fraction_B111: Tensor, kind: str) -> Tensor:
    squared = difference_BCHW.square()
    if kind == "mse":
        return squared
    if kind == "pseudo_huber":
        # as the difference of two nearly equal numbers it would lose all digits of small errors
        return 2 * delta_B111 * squared / ((squared + delta_B111.square()).sqrt() + delta_B111)
    size = difference_BCHW.abs()
    huber = torch.where(size <= delta_B111, squared, delta_B111 * (2 * size - delta_B111))
    if kind == "huber":
        return huber
    of_mse = fraction_B111 if kind == "mse_huber" else 1 - fraction_B111
    return of_mse * squared + (1 - of_mse) * huber


def diffusion_loss_reference(
    predicted_BCHW: Tensor,
    target_BCHW: Tensor,
    timesteps_B: Tensor,
    alphas_cumprod_T: Tensor,
    options: LossOptions,
    num_samples: int,
    mask_B1HW: Tensor | None = None,
    scales_B: Tensor | None = None,
) -> DiffusionLoss:
    """Return the loss in plain PyTorch; arguments as for `diffusion_loss`, and float64 is computed in float64."""
    compute = torch.float64 if predicted_BCHW.dtype == torch.float64 else torch.float32
    difference = predicted_BCHW.to(compute) - target_BCHW.to(compute)
    delta_B = deltas(alphas_cumprod_T, timesteps_B, options)
    fraction_B = _noise_fractions(alphas_cumprod_T, timesteps_B)
    delta_B111, fraction_B111 = (x[:, None, None, None].to(compute) for x in (delta_B, fraction_B))
    errors = _errors(difference, delta_B111, fraction_B111, options.kind)
    if mask_B1HW is not None:
        errors = errors * mask_B1HW
    losses_B = errors.sum(dim=(1, 2, 3)) / errors[0].numel()
    weights_B = loss_weights(alphas_cumprod_T, timesteps_B, options)
    if scales_B is not None:
        weights_B = weights_B * scales_B
    return DiffusionLoss((losses_B * weights_B).sum() / num_samples, losses_B.detach())


@kernel
def _delta(fraction, alphas_cumprod_ptr, timestep, delta, SCHEDULE: tl.constexpr):
    """Return a sample's delta, as `deltas`."""
    if SCHEDULE == "exponential":
        delta = tl.exp(fraction * tl.log(delta))
    elif SCHEDULE == "snr":
        a = tl.load(alphas_cumprod_ptr + timestep)
        root = tl.sqrt_rn(a) + tl.sqrt_rn(1.0 - a)
        delta = (1.0 - delta) * (a / (root * root)) + delta
    return delta


@kernel(do_not_specialize=("num_timesteps",))
def _partial_losses_kernel(
    predicted_ptr,
    target_ptr,
    mask_ptr,
    timesteps_ptr,
    alphas_cumprod_ptr,
    parts_ptr,
    num_elements,
    num_pixels,
    num_timesteps,
    delta,
    KIND: tl.constexpr,
    SCHEDULE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write this program's sum of errors: parts (B, P)."""
    sample = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    num_parts = tl.num_programs(0)
    if KIND != "mse":
        timestep = tl.load(timesteps_ptr + sample)
        fraction = timestep.to(tl.float32) / num_timesteps
        delta = _delta(fraction, alphas_cumprod_ptr, timestep, delta, SCHEDULE)
        of_mse = 1.0 - fraction if KIND == "huber_mse" else fraction
    error_sum = tl.full((), 0.0, tl.float32)
    for start in range(part * BLOCK, num_elements, num_parts * BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = i < num_elements
        predicted = tl.load(predicted_ptr + sample * num_elements + i, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + sample * num_elements + i, mask=inside, other=0.0).to(tl.float32)
        difference = predicted - target
        error = difference * difference
        if KIND == "pseudo_huber":
            error = 2.0 * delta * error / (tl.sqrt_rn(error + delta * delta) + delta)
        elif KIND != "mse":
            size = tl.abs(difference)
            huber = tl.where(size <= delta, error, delta * (2.0 * size - delta))
            if KIND == "huber":
                error = huber
            else:
                if KIND != "mse_huber":
                    tl.static_assert(KIND == "huber_mse", "a kind without a formula in the kernel")
                error = of_mse * error + (1.0 - of_mse) * huber
        if HAS_MASK:
            pixel = i // CHANNELS if CHANNELS else i % num_pixels
            error *= tl.load(mask_ptr + sample * num_pixels + pixel, mask=inside, other=0.0)
        error_sum += tl.reduce(error, 0, tl.standard._sum_combine)
    tl.store(parts_ptr + sample * num_parts + part, error_sum)


@kernel
def _weight(snr, gamma, max_snr, WEIGHTING: tl.constexpr, PREDICTION: tl.constexpr):
    """Return a sample's weight from its SNR, as the functions in WEIGHTINGS."""
    weight = tl.full(snr.shape, 1.0, tl.float32)
    if WEIGHTING != "none":
        divisor = snr if PREDICTION == "epsilon" else snr + 1.0
        conversion = weight if PREDICTION == "epsilon" else snr / (snr + 1.0)
        if WEIGHTING == "min_snr":
            weight = tl.minimum(snr, gamma) / divisor
        elif WEIGHTING == "debiased":
            capped = tl.minimum(snr, max_snr)
            weight = tl.where(capped > 0.0, 1.0 / tl.sqrt_rn(capped), 0.0) * conversion
        else:
            tl.static_assert(WEIGHTING == "p2", "a weighting without a formula in the kernel")
            weight = tl.exp(-gamma * tl.log(1.0 + snr)) * conversion
    return weight


@kernel(do_not_specialize=("batch", "num_parts", "num_elements", "num_samples"))
def _finish_losses_kernel(
    parts_ptr,
    timesteps_ptr,
    alphas_cumprod_ptr,
    sample_scales_ptr,
    losses_ptr,
    scales_ptr,
    total_ptr,
    batch,
    num_parts,
    num_elements,
    num_samples,
    gamma,
    max_snr,
    WEIGHTING: tl.constexpr,
    PREDICTION: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: write losses (B,), scales (B,) = s_b w_b / (num_elements num_samples), and the total."""
    p = tl.arange(0, BLOCK_P)
    # as a float: the product with num_samples may exceed 32 bits
    size = num_elements * 1.0
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = b < batch
        part_mask = mask[:, None] & (p[None, :] < num_parts)
        parts = tl.load(parts_ptr + b[:, None] * num_parts + p[None, :], mask=part_mask, other=0.0)
        loss = tl.reduce(parts, 1, tl.standard._sum_combine) / size
        timestep = tl.load(timesteps_ptr + b, mask=mask, other=0)
        a = tl.load(alphas_cumprod_ptr + timestep, mask=mask, other=0.5)
        weight = _weight(a / (1.0 - a), gamma, max_snr, WEIGHTING, PREDICTION)
        if HAS_SCALES:
            weight *= tl.load(sample_scales_ptr + b, mask=mask, other=0.0)
        tl.store(losses_ptr + b, loss, mask=mask)
        tl.store(scales_ptr + b, weight / (size * num_samples), mask=mask)
        total += tl.reduce(tl.where(mask, weight * loss, 0.0), 0, tl.standard._sum_combine)
    tl.store(total_ptr, total / num_samples)


@kernel(do_not_specialize=("num_timesteps",))
def _diffusion_loss_bwd_kernel(
    predicted_ptr,
    target_ptr,
    scales_ptr,
    upstream_ptr,
    mask_ptr,
    timesteps_ptr,
    alphas_cumprod_ptr,
    dpredicted_ptr,
    num_elements,
    num_pixels,
    num_timesteps,
    delta,
    KIND: tl.constexpr,
    SCHEDULE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_elements
    at = sample * num_elements + i
    predicted = tl.load(predicted_ptr + at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # half of derror / dd: d for mse
    slope = predicted - target
    if KIND != "mse":
        timestep = tl.load(timesteps_ptr + sample)
        fraction = timestep.to(tl.float32) / num_timesteps
        delta = _delta(fraction, alphas_cumprod_ptr, timestep, delta, SCHEDULE)
        if KIND == "pseudo_huber":
            # delta d / sqrt(d^2 + delta^2)
            slope = delta * slope / tl.sqrt_rn(slope * slope + delta * delta)
        else:
            # d inside delta, delta sign(d) outside
            clamped = tl.minimum(tl.maximum(slope, -delta), delta)
            if KIND == "huber":
                slope = clamped
            else:
                of_mse = 1.0 - fraction if KIND == "huber_mse" else fraction
                slope = of_mse * slope + (1.0 - of_mse) * clamped
    scale = tl.load(scales_ptr + sample) * tl.load(upstream_ptr)
    # dp = dL * s_b w_b / (num_elements num_samples) * derror / dd * m
    gradient = scale * 2.0 * slope
    if HAS_MASK:
        pixel = i // CHANNELS if CHANNELS else i % num_pixels
        gradient *= tl.load(mask_ptr + sample * num_pixels + pixel, mask=inside, other=0.0)
    tl.store(dpredicted_ptr + at, gradient.to(dpredicted_ptr.dtype.element_ty), mask=inside)


class _DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predicted, target, timesteps_B, alphas_cumprod_T, options, num_samples, mask, sample_scales_B):
        batch, num_elements = len(predicted), predicted[0].numel()
        num_parts = min(MAX_PARTS, cdiv(num_elements, BLOCK))

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=predicted.device)

        parts, losses_B, scales_B, total = empty(batch, num_parts), empty(batch), empty(batch), empty()
        _partial_losses_kernel[(num_parts, batch)](
            predicted,
            target,
            predicted if mask is None else mask,
            *_read_by_kind(options, timesteps_B, alphas_cumprod_T, predicted),
            parts,
            num_elements,
            predicted[0, 0].numel(),
            len(alphas_cumprod_T),
            options.delta,
            KIND=options.kind,
            SCHEDULE=options.delta_schedule,
            HAS_MASK=mask is not None,
            CHANNELS=_channels_last(predicted),
            BLOCK=BLOCK,
        )
        _finish_losses_kernel[(1,)](
            parts,
            timesteps_B,
            alphas_cumprod_T,
            parts if sample_scales_B is None else sample_scales_B,
            losses_B,
            scales_B,
            total,
            batch,
            num_parts,
            num_elements,
            num_samples,
            options.gamma,
            DEBIASED_MAX_SNR,
            WEIGHTING=options.weighting,
            PREDICTION=options.prediction_type,
            HAS_SCALES=sample_scales_B is not None,
            BLOCK_B=BLOCK_B,
            BLOCK_P=next_power_of_2(num_parts),
        )
        ctx.save_for_backward(predicted, target, scales_B, mask, timesteps_B, alphas_cumprod_T)
        ctx.options = options
        ctx.mark_non_differentiable(losses_B)
        return total, losses_B

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, _):
        predicted, target, scales_B, mask, timesteps_B, alphas_cumprod_T = ctx.saved_tensors
        num_elements = predicted[0].numel()
        dpredicted = torch.empty_like(predicted)
        _diffusion_loss_bwd_kernel[(cdiv(num_elements, BLOCK), len(predicted))](
            predicted,
            target,
            scales_B,
            dtotal.float(),
            predicted if mask is None else mask,
            *_read_by_kind(ctx.options, timesteps_B, alphas_cumprod_T, predicted),
            dpredicted,
            num_elements,
            predicted[0, 0].numel(),
            len(alphas_cumprod_T),
            ctx.options.delta,
            KIND=ctx.options.kind,
            SCHEDULE=ctx.options.delta_schedule,
            HAS_MASK=mask is not None,
            CHANNELS=_channels_last(predicted),
            BLOCK=BLOCK,
        )
        return dpredicted, None, None, None, None, None, None, None


def _read_by_kind(
    options: LossOptions, timesteps_B: Tensor, alphas_cumprod_T: Tensor, unused: Tensor
) -> tuple[Tensor, Tensor]:
    """Return timesteps and alphas_cumprod as the kernels of errors take them: `unused` for what the kind ignores."""
    reads_timesteps = options.kind != "mse"
    reads_alphas = reads_timesteps and options.delta_schedule == "snr"
    return timesteps_B if reads_timesteps else unused, alphas_cumprod_T if reads_alphas else unused


def _channels_last(latents_BCHW: Tensor) -> int:
    """Return the number of channels of channels-last latents, 0 for others."""
    return latents_BCHW.shape[1] if latents_BCHW.is_contiguous(memory_format=torch.channels_last) else 0


def diffusion_loss(
    predicted_BCHW: Tensor,
    target_BCHW: Tensor,
    timesteps_B: Tensor,
    alphas_cumprod_T: Tensor,
    options: LossOptions,
    *,
    num_samples: int,
    mask_B1HW: Tensor | None = None,
    scales_B: Tensor | None = None,
) -> DiffusionLoss:
    """Return the batch's loss and each sample's, without a host sync.

    predicted_BCHW: fp32 | fp16 | bf16, contiguous or channels-last; target_BCHW: any of these dtypes and layouts;
    timesteps_B: int64 in 0 .. T-1; alphas_cumprod_T: float32. num_samples: samples in the whole optimizer step, of
    which this batch may be a part. mask_B1HW, scales_B: float32, what the error of each latent pixel and the loss of
    each sample are multiplied by; no gradient flows to them. Raises ValueError if the shapes do not match.
    """
    if predicted_BCHW.dim() != 4 or predicted_BCHW.numel() == 0 or predicted_BCHW.shape != target_BCHW.shape:
        raise ValueError(
            f"predicted {tuple(predicted_BCHW.shape)} and target {tuple(target_BCHW.shape)} must have the same shape, "
            "(B, C, H, W) and not empty"
        )
    batch, _, height, width = predicted_BCHW.shape
    if mask_B1HW is not None and mask_B1HW.shape != (batch, 1, height, width):
        raise ValueError(f"the mask has shape {tuple(mask_B1HW.shape)}, expected {(batch, 1, height, width)}")
    if scales_B is not None and scales_B.shape != (batch,):
        raise ValueError(f"the scales have shape {tuple(scales_B.shape)}, expected {(batch,)}")
    arguments = (timesteps_B, alphas_cumprod_T, options, num_samples)
    if not runs_kernel(predicted_BCHW):
        return diffusion_loss_reference(predicted_BCHW, target_BCHW, *arguments, mask_B1HW, scales_B)
    order = torch.channels_last if _channels_last(predicted_BCHW) else torch.contiguous_format
    predicted = predicted_BCHW.contiguous(memory_format=order)
    target = target_BCHW.detach().contiguous(memory_format=order)
    mask = None if mask_B1HW is None else mask_B1HW.detach().contiguous()
    return DiffusionLoss(*_DiffusionLoss.apply(predicted, target, *arguments, mask, scales_B))
