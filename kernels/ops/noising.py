"""Cached latents to noisy latents and prediction target, in one kernel: the noise is never stored.

    z_0 = (mean + exp(logvar / 2) * e_p) * scaling_factor        e = e_n + offset_noise * e_o (one e_o per channel)
    z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) e                        a_t = alphas_cumprod[t]
    target: e for epsilon;  sqrt(a_t) e - sqrt(1 - a_t) z_0 for v_prediction

The normals e_p (posterior), e_n (noise), e_o (offset) and the timestep t are Philox draws (kernels/philox.py), so they
depend on the sample's key alone. Every product and sum is rounded separately: numpy, torch and Triton give equal bits,
except that with a logvar exp is the device's own. a_t = 0, a zero terminal SNR, needs no special case.

A program computes 4 * BLOCK elements of one sample, since Philox makes normals four at a time. There is no backward
pass: nothing before the UNet is trained.
Letters: B batch, C latent channels, H W latent height and width, T timesteps.
Source: Ho et al. 2020, arXiv:2006.11239; v: Salimans and Ho 2022, arXiv:2202.00512; zero terminal SNR: Lin et al. 2023,
arXiv:2305.08891.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from safelight.kernels.ops.diffusion_loss import PREDICTION_TYPES
from safelight.kernels.philox import Key, Purpose, integers, normals_torch
from safelight.kernels.philox_triton import philox_normals, philox_words
from safelight.kernels.reference import correctly_rounded_sqrt
from safelight.kernels.triton.jit import cdiv, kernel, next_power_of_2, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

MAX_BLOCK = 64  # Philox blocks per program: 256 elements; latents are small, and this gives them more programs


class Purposes(NamedTuple):
    """The purposes in the keys of the draws. Training and validation use different ones."""

    noise: Purpose = Purpose.NOISE
    posterior: Purpose = Purpose.POSTERIOR
    offset: Purpose = Purpose.OFFSET_NOISE
    timestep: Purpose = Purpose.TIMESTEP


TRAINING = Purposes()


class Noised(NamedTuple):
    """noisy_BCHW, in the requested dtype; target_BCHW, float32; timesteps_B, int64."""

    noisy_BCHW: Tensor
    target_BCHW: Tensor
    timesteps_B: Tensor


def key_words(keys: list[Key], device: torch.device | str = "cpu") -> Tensor:
    """Return (B, 5) int64: counter words c1, c2 (with purpose 0) and c3 of each key, and its seed's two words."""
    rows = []
    for key in keys:
        k0, k1, c1, c2, c3 = key.words()
        rows.append((c1, c2 & ~0xFF, c3, k0, k1))
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def _keys(words_B5: Tensor, purpose: Purpose) -> list[Key]:
    return [
        Key(k1 << 32 | k0, purpose, c2 >> 8 << 32 | c1, c3 >> 16, c3 & 0xFFFF)
        for c1, c2, c3, k0, k1 in words_B5.tolist()
    ]


def noising_reference(
    mean_BCHW: Tensor,
    logvar_BCHW: Tensor | None,
    words_B5: Tensor,
    alphas_cumprod_T: Tensor,
    *,
    prediction_type: str,
    scaling_factor: float,
    offset_noise: float = 0.0,
    timesteps_B: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    purposes: Purposes = TRAINING,
) -> Noised:
    """Return what `noising` returns, in plain PyTorch; arguments as there."""
    device, shape = mean_BCHW.device, tuple(mean_BCHW.shape[1:])

    def normals(purpose: Purpose, shape: tuple[int, ...]) -> Tensor:
        return normals_torch(_keys(words_B5, purpose), shape, device)

    latents = mean_BCHW.float()
    if logvar_BCHW is not None:
        # clamped as in diffusers' DiagonalGaussianDistribution
        std = (0.5 * logvar_BCHW.float().clamp(-30.0, 20.0)).exp()
        latents = latents + std * normals(purposes.posterior, shape)
    latents = latents * scaling_factor
    noise = normals(purposes.noise, shape)
    if offset_noise > 0:
        noise = noise + offset_noise * normals(purposes.offset, (shape[0], 1, 1))
    if timesteps_B is None:
        draws = [integers(key, len(alphas_cumprod_T))[0] for key in _keys(words_B5, purposes.timestep)]
        timesteps_B = torch.tensor(np.array(draws)).to(device)
    a_B111 = alphas_cumprod_T[timesteps_B][:, None, None, None]
    signal, sigma = correctly_rounded_sqrt(a_B111), correctly_rounded_sqrt(1 - a_B111)
    target = noise if prediction_type == "epsilon" else signal * noise - sigma * latents
    noisy = signal * latents + sigma * noise
    return Noised(
        noisy.to(dtype).contiguous(memory_format=memory_format),
        target.contiguous(memory_format=memory_format),
        timesteps_B,
    )


@kernel(fp_fusion=False, do_not_specialize=("num_elements", "num_pixels", "num_channels", "num_timesteps"))
def _noising_kernel(
    mean_ptr,
    logvar_ptr,
    words_ptr,
    alphas_cumprod_ptr,
    timesteps_ptr,
    noisy_ptr,
    target_ptr,
    num_elements,
    num_pixels,
    num_channels,
    num_timesteps,
    scaling_factor,
    offset_noise,
    HAS_LOGVAR: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    DRAW_TIMESTEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PREDICTION: tl.constexpr,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    OFFSET: tl.constexpr,
    TIMESTEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write noisy and target for 4 * BLOCK elements of one sample; the grid is (element blocks, samples).

    With DRAW_TIMESTEP every program draws its sample's timestep and the first one writes it. NOISE, POSTERIOR, OFFSET,
    TIMESTEP: purposes of the draws. CHANNELS_LAST: the memory order of noisy and target; mean and logvar are
    contiguous.
    """
    sample = tl.program_id(1).to(tl.int64)
    c1 = tl.load(words_ptr + sample * 5).to(tl.uint32)
    c2 = tl.load(words_ptr + sample * 5 + 1).to(tl.uint32)
    c3 = tl.load(words_ptr + sample * 5 + 2).to(tl.uint32)
    k0 = tl.load(words_ptr + sample * 5 + 3).to(tl.uint32)
    k1 = tl.load(words_ptr + sample * 5 + 4).to(tl.uint32)
    if DRAW_TIMESTEP:
        zero = tl.full((), 0, tl.uint32)
        word, _w1, _w2, _w3 = philox_words(zero, c1, c2 | TIMESTEP, c3, k0, k1)
        timestep = ((word.to(tl.uint64) * num_timesteps) >> 32).to(tl.int64)
        if tl.program_id(0) == 0:
            tl.store(timesteps_ptr + sample, timestep)
    else:
        timestep = tl.load(timesteps_ptr + sample)
    a = tl.load(alphas_cumprod_ptr + timestep)
    signal = tl.sqrt_rn(a)
    sigma = tl.sqrt_rn(1.0 - a)

    block = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    element = tl.program_id(0).to(tl.int64) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    mask = element < num_elements
    latents = tl.load(mean_ptr + sample * num_elements + element, mask=mask, other=0.0).to(tl.float32)
    if HAS_LOGVAR:
        logvar = tl.load(logvar_ptr + sample * num_elements + element, mask=mask, other=0.0).to(tl.float32)
        std = tl.exp(0.5 * tl.minimum(tl.maximum(logvar, -30.0), 20.0))
        latents = latents + std * philox_normals(block, c1, c2 | POSTERIOR, c3, k0, k1, BLOCK)
    latents = latents * scaling_factor
    noise = philox_normals(block, c1, c2 | NOISE, c3, k0, k1, BLOCK)
    channel = element // num_pixels
    if HAS_OFFSET:
        # one normal per channel: each element computes its channel's block of four normals and picks its own
        four = philox_normals((channel // 4).to(tl.uint32), c1, c2 | OFFSET, c3, k0, k1, 4 * BLOCK)
        is_own = tl.arange(0, 4)[None, :] == (channel % 4)[:, None]
        offset = tl.reduce(tl.where(is_own, tl.reshape(four, (4 * BLOCK, 4)), 0.0), 1, tl.standard._sum_combine)
        noise = noise + offset_noise * offset
    # z_t = sqrt(a) z_0 + sqrt(1 - a) e
    noisy = signal * latents + sigma * noise
    if PREDICTION == "epsilon":
        target = noise
    else:
        tl.static_assert(PREDICTION == "v_prediction", "a prediction type without a formula in the kernel")
        target = signal * noise - sigma * latents
    at = sample * num_elements + element
    if CHANNELS_LAST:
        at = sample * num_elements + (element - channel * num_pixels) * num_channels + channel
    tl.store(noisy_ptr + at, noisy.to(noisy_ptr.dtype.element_ty), mask=mask)
    tl.store(target_ptr + at, target, mask=mask)


@torch.no_grad()
def noising(
    mean_BCHW: Tensor,
    logvar_BCHW: Tensor | None,
    words_B5: Tensor,
    alphas_cumprod_T: Tensor,
    *,
    prediction_type: str,
    scaling_factor: float,
    offset_noise: float = 0.0,
    timesteps_B: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    purposes: Purposes = TRAINING,
) -> Noised:
    """Return each sample's noisy latents, target and timestep, drawn from its key.

    mean_BCHW, logvar_BCHW: the cached posterior, fp32 | fp16 | bf16; without a logvar the latents are the mean.
    words_B5: from `key_words`. alphas_cumprod_T: (T,) float32. prediction_type: epsilon | v_prediction.
    timesteps_B: (B,) int64 in 0 .. T - 1, or None to draw them. dtype, memory_format: of noisy_BCHW; the target is
    float32 in the same memory order.
    Raises ValueError for an unknown prediction type or shapes that do not fit.
    Source: see the module's docstring; epsilon and v_prediction match diffusers' DDPMScheduler.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction type {prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")
    if mean_BCHW.dim() != 4 or words_B5.shape != (len(mean_BCHW), 5):
        raise ValueError(f"key words of {tuple(words_B5.shape)} do not fit latents of {tuple(mean_BCHW.shape)}")
    if logvar_BCHW is not None and logvar_BCHW.shape != mean_BCHW.shape:
        raise ValueError(f"logvar has shape {tuple(logvar_BCHW.shape)}, the mean {tuple(mean_BCHW.shape)}")
    if not runs_kernel(mean_BCHW):
        return noising_reference(
            mean_BCHW,
            logvar_BCHW,
            words_B5,
            alphas_cumprod_T,
            prediction_type=prediction_type,
            scaling_factor=scaling_factor,
            offset_noise=offset_noise,
            timesteps_B=timesteps_B,
            dtype=dtype,
            memory_format=memory_format,
            purposes=purposes,
        )
    mean = mean_BCHW.contiguous()
    logvar = mean if logvar_BCHW is None else logvar_BCHW.contiguous()
    batch, channels, height, width = mean.shape
    noisy = torch.empty(mean.shape, dtype=dtype, device=mean.device, memory_format=memory_format)
    target = torch.empty(mean.shape, dtype=torch.float32, device=mean.device, memory_format=memory_format)
    draw = timesteps_B is None
    timesteps_B = torch.empty(batch, dtype=torch.int64, device=mean.device) if draw else timesteps_B
    num_elements = channels * height * width
    block = min(MAX_BLOCK, next_power_of_2(cdiv(num_elements, 4)))
    _noising_kernel[(cdiv(num_elements, 4 * block), batch)](
        mean,
        logvar,
        words_B5,
        alphas_cumprod_T,
        timesteps_B,
        noisy,
        target,
        num_elements,
        height * width,
        channels,
        len(alphas_cumprod_T),
        scaling_factor,
        offset_noise,
        HAS_LOGVAR=logvar_BCHW is not None,
        HAS_OFFSET=offset_noise > 0,
        DRAW_TIMESTEP=draw,
        CHANNELS_LAST=memory_format == torch.channels_last,
        PREDICTION=prediction_type,
        NOISE=int(purposes.noise),
        POSTERIOR=int(purposes.posterior),
        OFFSET=int(purposes.offset),
        TIMESTEP=int(purposes.timestep),
        BLOCK=block,
    )
    return Noised(noisy, target, timesteps_B)
