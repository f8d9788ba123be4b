"""The training loss: weighted squared or Huber errors of each sample, their sum, and what each timestep band contributed.

    l_b = sum_i m_i error(p_i - t_i) / sum_i m_i        L = sum_b w(t_b) l_b / num_samples
    error(d) = d^2, or Huber's: d^2 where |d| <= delta, else delta (2 |d| - delta)   (twice the usual, so equal to d^2 inside)

Every weighting is a weight on the epsilon error; for other prediction types it is carried over exactly, because the same
mistake measured in v is (SNR + 1) / SNR times, in z_0 1 / SNR times the mistake in epsilon (SNR = a / (1 - a)):
    min_snr     min(SNR, gamma) / SNR         (for v this gives min(SNR, gamma) / (SNR + 1))
    debiased    1 / sqrt(min(SNR, 1000))
    p2          1 / (1 + SNR)^gamma
    none        1 for every prediction type, as everybody does

Two launches, no host sync: partial sums, then one program that finishes all samples in a fixed order.
Letters: B batch, C latent channels, H W latent height and width, T timesteps, K bands, P partial sums of a sample.
Source: min-SNR: Hang et al. 2023, arXiv:2303.09556; P2: Choi et al. 2022, arXiv:2204.00227; debiased: Yu et al. 2023,
arXiv:2310.08442, its cap is kohya's.
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

ERRORS = ("mse", "huber")
WEIGHTINGS = ("none", "min_snr", "debiased", "p2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
DEBIASED_MAX_SNR = 1000.0
BLOCK = 4096
MAX_PARTS = 32
BLOCK_B = 32


@dataclass(frozen=True)
class LossOptions:
    """error: mse | huber, with delta; weighting: none | min_snr | debiased | p2, with gamma (of min_snr and p2).

    Raises ValueError for anything else.
    """

    error: str = "mse"
    delta: float = 1.0
    weighting: str = "none"
    gamma: float = 5.0
    prediction_type: str = "epsilon"
    num_bands: int = 4

    def __post_init__(self) -> None:
        for name, value, known in (
            ("error", self.error, ERRORS),
            ("weighting", self.weighting, WEIGHTINGS),
            ("prediction type", self.prediction_type, PREDICTION_TYPES),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(known)}")
        if not (self.delta > 0 and self.gamma > 0 and 1 <= self.num_bands <= 64):
            raise ValueError(
                f"delta {self.delta} and gamma {self.gamma} must be above 0, num_bands {self.num_bands} 1 to 64"
            )


PLAIN = LossOptions()


class DiffusionLoss(NamedTuple):
    """total: L, differentiable; losses_B: l_b, unweighted; band_sums_K, band_counts_K: of l_b, by timestep. All float32.

    Band k holds timesteps k T / K <= t < (k + 1) T / K. Only total carries gradients.
    """

    total: Tensor
    losses_B: Tensor
    band_sums_K: Tensor
    band_counts_K: Tensor


def loss_weights(alphas_cumprod_T: Tensor, timesteps_B: Tensor, options: LossOptions) -> Tensor:
    """Return w(t_b), (B,) float32, in plain PyTorch."""
    if options.weighting == "none":
        return torch.ones_like(timesteps_B, dtype=torch.float32)
    a_B = alphas_cumprod_T[timesteps_B]
    snr_B = a_B / (1 - a_B)
    # carry: what the epsilon error is of this prediction type's error
    carry_B = {"epsilon": torch.ones_like(snr_B), "v_prediction": snr_B / (snr_B + 1), "sample": snr_B}
    if options.weighting == "min_snr":
        # written without the division by an SNR that may be 0
        over = {"epsilon": snr_B, "v_prediction": snr_B + 1, "sample": torch.ones_like(snr_B)}
        return snr_B.clamp(max=options.gamma) / over[options.prediction_type]
    if options.weighting == "debiased":
        capped_B = snr_B.clamp(max=DEBIASED_MAX_SNR)
        # at SNR 0, where only v and sample can be trained, carry / sqrt(SNR) tends to 0
        weight_B = torch.where(capped_B > 0, capped_B.rsqrt(), 0)
    else:
        weight_B = (1 + snr_B) ** -options.gamma
    return weight_B * carry_B[options.prediction_type]


def bands_of(timesteps_B: Tensor, num_timesteps: int, num_bands: int) -> Tensor:
    """Return each timestep's band, (B,) int64."""
    return timesteps_B * num_bands // num_timesteps


def diffusion_loss_reference(
    predicted_BCHW: Tensor,
    target_BCHW: Tensor,
    timesteps_B: Tensor,
    alphas_cumprod_T: Tensor,
    options: LossOptions,
    mask_B1HW: Tensor | None,
    num_samples: int,
) -> DiffusionLoss:
    """Return the loss in plain PyTorch; arguments as `diffusion_loss`."""
    compute = torch.float64 if predicted_BCHW.dtype == torch.float64 else torch.float32
    difference = predicted_BCHW.to(compute) - target_BCHW.to(compute)
    if options.error == "mse":
        errors = difference.square()
    else:
        size = difference.abs()
        errors = torch.where(size <= options.delta, size.square(), options.delta * (2 * size - options.delta))
    mask = torch.ones_like(errors) if mask_B1HW is None else mask_B1HW.to(compute).expand_as(errors)
    area_B = mask.sum(dim=(1, 2, 3))
    # a sample that is masked out altogether has no error
    losses_B = (errors * mask).sum(dim=(1, 2, 3)) / torch.where(area_B > 0, area_B, 1)
    weights_B = loss_weights(alphas_cumprod_T, timesteps_B, options)
    bands_B = bands_of(timesteps_B, len(alphas_cumprod_T), options.num_bands)
    found = losses_B.detach()
    empty_K = torch.zeros(options.num_bands, dtype=found.dtype, device=found.device)
    return DiffusionLoss(
        (losses_B * weights_B).sum() / num_samples,
        found,
        empty_K.index_add(0, bands_B, found),
        empty_K.index_add(0, bands_B, torch.ones_like(found)),
    )


@kernel(do_not_specialize=("num_channels", "num_pixels"))
def _partial_losses_kernel(
    predicted_ptr,
    target_ptr,
    mask_ptr,
    parts_ptr,
    num_elements,
    num_channels,
    num_pixels,
    delta,
    HAS_MASK: tl.constexpr,
    HUBER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write this program's sums of masked errors and of the mask: parts (B, P, 2)."""
    sample = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    num_parts = tl.num_programs(0)
    error_sum = tl.full((), 0.0, tl.float32)
    area = tl.full((), 0.0, tl.float32)
    for start in range(part * BLOCK, num_elements, num_parts * BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = i < num_elements
        predicted = tl.load(predicted_ptr + sample * num_elements + i, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + sample * num_elements + i, mask=inside, other=0.0).to(tl.float32)
        difference = predicted - target
        error = difference * difference
        if HUBER:
            size = tl.abs(difference)
            error = tl.where(size <= delta, error, delta * (2.0 * size - delta))
        if HAS_MASK:
            pixel = i // num_channels if CHANNELS_LAST else i % num_pixels
            weight = tl.load(mask_ptr + sample * num_pixels + pixel, mask=inside, other=0.0).to(tl.float32)
        else:
            weight = tl.where(inside, 1.0, 0.0)
        error_sum += tl.reduce(error * weight, 0, tl.standard._sum_combine)
        area += tl.reduce(weight, 0, tl.standard._sum_combine)
    at = (sample * num_parts + part) * 2
    tl.store(parts_ptr + at, error_sum)
    tl.store(parts_ptr + at + 1, area)


@kernel(do_not_specialize=("batch", "num_parts", "num_timesteps", "num_samples"))
def _finish_losses_kernel(
    parts_ptr,
    timesteps_ptr,
    alphas_cumprod_ptr,
    losses_ptr,
    scales_ptr,
    total_ptr,
    bands_ptr,
    batch,
    num_parts,
    num_timesteps,
    num_samples,
    gamma,
    max_snr,
    WEIGHTING: tl.constexpr,
    PREDICTION: tl.constexpr,
    NUM_BANDS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: write losses (B,), scales (B,) = w_b / (area_b num_samples), the total, and bands (2, K)."""
    p = tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    total = tl.full((), 0.0, tl.float32)
    band_sums = tl.full((BLOCK_K,), 0.0, tl.float32)
    band_counts = tl.full((BLOCK_K,), 0.0, tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = b < batch
        at = (b[:, None] * num_parts + p[None, :]) * 2
        part_mask = mask[:, None] & (p[None, :] < num_parts)
        error_sum = tl.reduce(tl.load(parts_ptr + at, mask=part_mask, other=0.0), 1, tl.standard._sum_combine)
        area = tl.reduce(tl.load(parts_ptr + at + 1, mask=part_mask, other=0.0), 1, tl.standard._sum_combine)
        area = tl.where(area > 0.0, area, 1.0)
        loss = error_sum / area
        timestep = tl.load(timesteps_ptr + b, mask=mask, other=0)
        a = tl.load(alphas_cumprod_ptr + timestep, mask=mask, other=0.5)
        snr = a / (1.0 - a)
        weight = tl.full((BLOCK_B,), 1.0, tl.float32)
        if WEIGHTING != "none":
            if PREDICTION == "epsilon":
                over = snr
                carry = weight
            elif PREDICTION == "v_prediction":
                over = snr + 1.0
                carry = snr / (snr + 1.0)
            else:
                over = weight
                carry = snr
            if WEIGHTING == "min_snr":
                weight = tl.minimum(snr, gamma) / over
            elif WEIGHTING == "debiased":
                capped = tl.minimum(snr, max_snr)
                weight = tl.where(capped > 0.0, 1.0 / tl.sqrt_rn(capped), 0.0) * carry
            else:
                weight = tl.exp(-gamma * tl.log(1.0 + snr)) * carry
        tl.store(losses_ptr + b, loss, mask=mask)
        tl.store(scales_ptr + b, weight / (area * num_samples), mask=mask)
        total += tl.reduce(tl.where(mask, weight * loss, 0.0), 0, tl.standard._sum_combine)
        band = timestep * NUM_BANDS // num_timesteps
        mine = (band[:, None] == k[None, :]) & mask[:, None]
        band_sums += tl.reduce(tl.where(mine, loss[:, None], 0.0), 0, tl.standard._sum_combine)
        band_counts += tl.reduce(tl.where(mine, 1.0, 0.0), 0, tl.standard._sum_combine)
    tl.store(total_ptr, total / num_samples)
    tl.store(bands_ptr + k, band_sums, mask=k < NUM_BANDS)
    tl.store(bands_ptr + NUM_BANDS + k, band_counts, mask=k < NUM_BANDS)


@kernel(do_not_specialize=("num_channels", "num_pixels"))
def _diffusion_loss_bwd_kernel(
    predicted_ptr,
    target_ptr,
    mask_ptr,
    scales_ptr,
    upstream_ptr,
    dpredicted_ptr,
    num_elements,
    num_channels,
    num_pixels,
    delta,
    HAS_MASK: tl.constexpr,
    HUBER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_elements
    at = sample * num_elements + i
    predicted = tl.load(predicted_ptr + at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + at, mask=inside, other=0.0).to(tl.float32)
    slope = predicted - target
    if HUBER:
        # derror / dd = 2 d inside delta, 2 delta sign(d) outside
        slope = tl.minimum(tl.maximum(slope, -delta), delta)
    scale = tl.load(scales_ptr + sample) * tl.load(upstream_ptr)
    # dp = dL * w_b / (area_b num_samples) * m * 2 d
    gradient = scale * 2.0 * slope
    if HAS_MASK:
        pixel = i // num_channels if CHANNELS_LAST else i % num_pixels
        gradient *= tl.load(mask_ptr + sample * num_pixels + pixel, mask=inside, other=0.0).to(tl.float32)
    tl.store(dpredicted_ptr + at, gradient.to(dpredicted_ptr.dtype.element_ty), mask=inside)


def _layout(predicted: Tensor, mask: Tensor | None, options: LossOptions) -> dict[str, bool]:
    return {
        "HAS_MASK": mask is not None,
        "HUBER": options.error == "huber",
        "CHANNELS_LAST": not predicted.is_contiguous(),
    }


class _DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predicted, target, timesteps_B, alphas_cumprod_T, mask, options, num_samples):
        batch, channels, height, width = predicted.shape
        num_elements = channels * height * width
        num_parts = min(MAX_PARTS, cdiv(num_elements, BLOCK))

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=predicted.device)

        parts, losses_B, scales_B, total = empty(batch, num_parts, 2), empty(batch), empty(batch), empty()
        bands = empty(2, options.num_bands)
        _partial_losses_kernel[(num_parts, batch)](
            predicted,
            target,
            predicted if mask is None else mask,
            parts,
            num_elements,
            channels,
            height * width,
            options.delta,
            **_layout(predicted, mask, options),
            BLOCK=BLOCK,
        )
        _finish_losses_kernel[(1,)](
            parts,
            timesteps_B,
            alphas_cumprod_T,
            losses_B,
            scales_B,
            total,
            bands,
            batch,
            num_parts,
            len(alphas_cumprod_T),
            num_samples,
            options.gamma,
            DEBIASED_MAX_SNR,
            WEIGHTING=options.weighting,
            PREDICTION=options.prediction_type,
            NUM_BANDS=options.num_bands,
            BLOCK_B=BLOCK_B,
            BLOCK_P=next_power_of_2(num_parts),
            BLOCK_K=next_power_of_2(options.num_bands),
        )
        ctx.save_for_backward(predicted, target, mask, scales_B)
        ctx.options = options
        band_sums_K, band_counts_K = bands.unbind()
        ctx.mark_non_differentiable(losses_B, band_sums_K, band_counts_K)
        return total, losses_B, band_sums_K, band_counts_K

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, *_):
        predicted, target, mask, scales_B = ctx.saved_tensors
        batch, channels, height, width = predicted.shape
        num_elements = channels * height * width
        dpredicted = torch.empty_like(predicted)
        _diffusion_loss_bwd_kernel[(cdiv(num_elements, BLOCK), batch)](
            predicted,
            target,
            predicted if mask is None else mask,
            scales_B,
            dtotal.float(),
            dpredicted,
            num_elements,
            channels,
            height * width,
            ctx.options.delta,
            **_layout(predicted, mask, ctx.options),
            BLOCK=BLOCK,
        )
        return dpredicted, None, None, None, None, None, None


def diffusion_loss(
    predicted_BCHW: Tensor,
    target_BCHW: Tensor,
    timesteps_B: Tensor,
    alphas_cumprod_T: Tensor,
    options: LossOptions = PLAIN,
    *,
    mask_B1HW: Tensor | None = None,
    num_samples: int | None = None,
) -> DiffusionLoss:
    """Return the loss, each sample's, and each timestep band's; without a host sync.

    predicted_BCHW: fp32 | fp16 | bf16, either memory order; target_BCHW: any of these; timesteps_B int64 in 0 .. T-1;
    alphas_cumprod_T float32. mask_B1HW: weights >= 0 of the pixels, or None; a sample's loss is the mean over its mask.
    num_samples: of a whole optimizer step; the batch if None. Raises ValueError for shapes that do not fit.
    """
    num_samples = len(predicted_BCHW) if num_samples is None else num_samples
    if predicted_BCHW.dim() != 4 or predicted_BCHW.numel() == 0 or predicted_BCHW.shape != target_BCHW.shape:
        raise ValueError(
            f"predicted {tuple(predicted_BCHW.shape)} and target {tuple(target_BCHW.shape)} must be one (B, C, H, W)"
        )
    batch, _, height, width = predicted_BCHW.shape
    if mask_B1HW is not None and mask_B1HW.shape != (batch, 1, height, width):
        raise ValueError(f"the mask is {tuple(mask_B1HW.shape)}; give it ({batch}, 1, {height}, {width})")
    arguments = (target_BCHW, timesteps_B, alphas_cumprod_T)
    if not runs_kernel(predicted_BCHW):
        return diffusion_loss_reference(predicted_BCHW, *arguments, options, mask_B1HW, num_samples)
    channels_last = predicted_BCHW.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if channels_last else torch.contiguous_format
    predicted = predicted_BCHW.contiguous(memory_format=order)
    target = target_BCHW.detach().contiguous(memory_format=order)
    mask = None if mask_B1HW is None else mask_B1HW.detach().contiguous()
    return DiffusionLoss(*_DiffusionLoss.apply(predicted, target, *arguments[1:], mask, options, num_samples))
