"""Cached latents to noisy latents and prediction target, in one kernel: the noise is never stored.

    z_0 = (mean + exp(logvar / 2) * e_p) * scaling_factor        e = pyramid(e_n) + offset * e_o (one e_o per channel)
    z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) (e + perturbation * e_i)        a_t = alphas_cumprod[t]
    target: e for epsilon;  sqrt(a_t) e - sqrt(1 - a_t) z_0 for v_prediction

The normals e_p (posterior), e_n (noise), e_o (offset), e_i (input perturbation) and the timestep t are Philox draws
(kernels/philox.py), so they depend on the sample's key alone. Every product and sum is rounded separately: numpy, torch
and Triton give equal bits, except that with a logvar exp is the device's own. a_t = 0, a zero terminal SNR, needs no
special case.

Pyramid noise adds coarser noise to e_n, enlarged bilinearly. Octave k has H / r^k by W / r^k elements (at least 1 by 1)
for an r between 2 and 4 drawn for each sample and octave, and octaves end with the first that is one element wide or
high:

    pyramid(e_n) = (sqrt(2) e_n + sum_{k >= 1} discount^k enlarged(e_k)) / sqrt(2 + sum_k discount^(2k) v_k)

v_k is the variance of enlarged(e_k), which depends on the element, so that every element of the result is a standard
normal. Other trainers add noise of full size twice, hence the 2, and divide by the standard deviation measured over the
batch, by which samples would depend on each other.

Timesteps are uniform over 0 .. T - 1, or drawn by a table: t is the first timestep whose entry, the probability of
timesteps up to it in units of 2^-32, is above a random word.

A program computes 4 * BLOCK elements of one sample, since Philox makes normals four at a time. There is no backward
pass: nothing before the UNet is trained.
Letters: B batch, C latent channels, H W latent height and width, T timesteps.
Source: Ho et al. 2020, arXiv:2006.11239; v: Salimans and Ho 2022, arXiv:2202.00512; zero terminal SNR: Lin et al. 2023,
arXiv:2305.08891; input perturbation: Ning et al. 2023, arXiv:2301.11706; pyramid noise: Whitaker 2023,
"Multi-Resolution Noise for Diffusion Model Training", with the sizes of kohya's octaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from safelight.kernels.ops.diffusion_loss import PREDICTION_TYPES
from safelight.kernels.philox import Key, Purpose, integers, normals_torch, words
from safelight.kernels.philox_triton import philox_normal_at, philox_normals, philox_words
from safelight.kernels.reference import correctly_rounded_sqrt
from safelight.kernels.triton.jit import cdiv, kernel, next_power_of_2, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

# of the pyramid: octave k's element blocks begin at k * OCTAVE_BLOCKS
MAX_OCTAVES = 16
OCTAVE_BLOCKS = 1 << 26
SQRT_2 = 1.4142135623730951
MAX_BLOCK = 64  # Philox blocks per program: 256 elements; latents are small, and this gives them more programs


class Purposes(NamedTuple):
    """The purposes in the keys of the draws. Training and validation use different ones."""

    noise: Purpose = Purpose.NOISE
    posterior: Purpose = Purpose.POSTERIOR
    offset: Purpose = Purpose.OFFSET_NOISE
    timestep: Purpose = Purpose.TIMESTEP
    pyramid: Purpose = Purpose.PYRAMID_NOISE
    pyramid_scale: Purpose = Purpose.PYRAMID_SCALE
    perturbation: Purpose = Purpose.INPUT_NOISE


TRAINING = Purposes()


@dataclass(frozen=True)
class NoiseOptions:
    """What noise is added besides one normal for each element; the formulas are in the module's docstring.

    offset: standard deviation of each channel's constant. pyramid_discount: 0 for no pyramid; pyramid_octaves: how many
    sizes it has at most, the full one included. perturbation: strength of the noise that the input has and the target
    lacks. Raises ValueError for a value out of range.
    """

    offset: float = 0.0
    pyramid_discount: float = 0.0
    pyramid_octaves: int = 6
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        if min(self.offset, self.pyramid_discount, self.perturbation) < 0:
            raise ValueError(f"{self} has a strength below 0")
        if not 2 <= self.pyramid_octaves <= MAX_OCTAVES:
            raise ValueError(f"{self.pyramid_octaves} octaves of pyramid noise are outside 2 .. {MAX_OCTAVES}")


PLAIN = NoiseOptions()


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


def draw_timesteps(
    words_B5: Tensor, purpose: Purpose, num_timesteps: int, timestep_cdf_T: Tensor | None = None
) -> Tensor:
    """Return each sample's timestep, (B,) int64, in plain numpy; arguments as for `noising`."""
    keys = _keys(words_B5, purpose)
    if timestep_cdf_T is None:
        draws = [int(integers(key, num_timesteps)[0]) for key in keys]
    else:
        table = timestep_cdf_T.cpu().numpy()
        draws = [int(np.searchsorted(table, np.int64(words(key, 1)[0]), side="right")) for key in keys]
    return torch.tensor(draws, device=words_B5.device)


def _along(side: int, full: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return how `side` elements are enlarged to `full`: the two neighbours, the second's weight, and the variance."""
    f = np.float32
    at = np.maximum((np.arange(full, dtype=f) + f(0.5)) * (f(side) / f(full)) - f(0.5), f(0))
    low = at.astype(np.int64)
    high = np.minimum(low + 1, side - 1)
    weight = at - low.astype(f)
    rest = f(1) - weight
    return low, high, weight, np.where(low == high, f(1), rest * rest + weight * weight)


def _pyramid_reference(noise_CHW: Tensor, key: Key, options: NoiseOptions, purposes: Purposes) -> Tensor:
    """Return a sample's pyramid noise, (C, H, W). noise_CHW: its noise of full size."""
    f, device = np.float32, noise_CHW.device
    channels, height, width = noise_CHW.shape
    total, variance = noise_CHW * float(f(SQRT_2)), torch.full((height, width), 2.0, device=device)
    draws = words(key._replace(purpose=purposes.pyramid_scale), 4 * options.pyramid_octaves)[::4]
    amplitude = f(1)
    for octave in range(1, options.pyramid_octaves):
        amplitude = amplitude * f(options.pyramid_discount)
        ratio = f(2) + f(2) * (f(draws[octave] >> 8) * f(2**-24))
        factor = ratio
        for _ in range(octave - 1):
            factor = factor * ratio
        rows, columns = (max(1, int(f(side) / factor)) for side in (height, width))
        own = key._replace(purpose=purposes.pyramid)
        (coarse,) = normals_torch([own], (channels, rows, columns), device, octave * OCTAVE_BLOCKS)
        y0, y1, y, variance_y = (torch.from_numpy(part).to(device) for part in _along(rows, height))
        x0, x1, x, variance_x = (torch.from_numpy(part).to(device) for part in _along(columns, width))
        y = y[:, None]
        upper = (1 - x) * coarse[:, y0][:, :, x0] + x * coarse[:, y0][:, :, x1]
        lower = (1 - x) * coarse[:, y1][:, :, x0] + x * coarse[:, y1][:, :, x1]
        total = total + float(amplitude) * ((1 - y) * upper + y * lower)
        variance = variance + float(amplitude * amplitude) * (variance_y[:, None] * variance_x)
        if 1 in (rows, columns):
            break
    return total / correctly_rounded_sqrt(variance)


def noising_reference(
    mean_BCHW: Tensor,
    logvar_BCHW: Tensor | None,
    words_B5: Tensor,
    alphas_cumprod_T: Tensor,
    *,
    prediction_type: str,
    scaling_factor: float,
    options: NoiseOptions = PLAIN,
    timesteps_B: Tensor | None = None,
    timestep_cdf_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
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
    if options.pyramid_discount > 0:
        keys = _keys(words_B5, purposes.pyramid)
        noise = torch.stack([_pyramid_reference(n, key, options, purposes) for n, key in zip(noise, keys, strict=True)])
    if options.offset > 0:
        noise = noise + options.offset * normals(purposes.offset, (shape[0], 1, 1))
    if timesteps_B is None:
        timesteps_B = draw_timesteps(words_B5, purposes.timestep, len(alphas_cumprod_T), timestep_cdf_T)
    a_B111 = alphas_cumprod_T[timesteps_B][:, None, None, None]
    signal, sigma = correctly_rounded_sqrt(a_B111), correctly_rounded_sqrt(1 - a_B111)
    target = noise if prediction_type == "epsilon" else signal * noise - sigma * latents
    if options.perturbation > 0:
        noise = noise + options.perturbation * normals(purposes.perturbation, shape)
    noisy = signal * latents + sigma * noise
    return Noised(noisy.to(dtype).contiguous(), target.contiguous(), timesteps_B)


@kernel(fp_fusion=False)
def _timestep(num_timesteps, cdf_ptr, c1, c2, c3, k0, k1, HALVINGS: tl.constexpr):
    """Return a sample's timestep: uniform if HALVINGS is 0, else found in the table by as many halvings."""
    zero = tl.full((), 0, tl.uint32)
    word, _w1, _w2, _w3 = philox_words(zero, c1, c2, c3, k0, k1)
    if HALVINGS == 0:
        timestep = ((word.to(tl.uint64) * num_timesteps) >> 32).to(tl.int64)
    else:
        timestep = tl.full((), 0, tl.int64)
        last = timestep + num_timesteps - 1
        for _ in tl.static_range(HALVINGS):
            middle = (timestep + last) // 2
            is_at_most = tl.load(cdf_ptr + middle) > word.to(tl.int64)
            last = tl.where(is_at_most, middle, last)
            timestep = tl.where(is_at_most, timestep, middle + 1)
    return timestep


@kernel(fp_fusion=False)
def _along_side(position, side, full):
    """Return what `_along` returns at a position."""
    at = (position.to(tl.float32) + 0.5) * tl.div_rn(side.to(tl.float32), full.to(tl.float32)) - 0.5
    at = tl.maximum(at, 0.0)
    low = at.to(tl.int64)
    high = tl.minimum(low + 1, side - 1)
    weight = at - low.to(tl.float32)
    rest = 1.0 - weight
    return low, high, weight, tl.where(low == high, 1.0, rest * rest + weight * weight)


@kernel(fp_fusion=False)
def _pyramid(
    noise,
    channel,
    pixel,
    height,
    width,
    discount,
    num_octaves,
    c1,
    c2,
    c3,
    k0,
    k1,
    PYRAMID: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Return the pyramid noise of elements from their noise of full size, step by step as `_pyramid_reference`."""
    zero = tl.full((), 0, tl.uint32)
    high_side = height + tl.full((), 0, tl.int64)
    wide_side = width + tl.full((), 0, tl.int64)
    row, column = pixel // width, pixel % width
    total = noise * SQRT_2
    variance = tl.full(noise.shape, 2.0, tl.float32)
    amplitude = tl.full((), 1.0, tl.float32)
    for octave in range(1, num_octaves):
        amplitude = amplitude * discount
        word, _w1, _w2, _w3 = philox_words(zero + octave, c1, c2 | SCALE, c3, k0, k1)
        ratio = 2.0 + 2.0 * ((word >> 8).to(tl.float32) * 5.960464477539063e-08)
        factor = ratio
        for _ in range(octave - 1):
            factor = factor * ratio
        rows = tl.maximum(tl.div_rn(high_side.to(tl.float32), factor).to(tl.int64), 1)
        columns = tl.maximum(tl.div_rn(wide_side.to(tl.float32), factor).to(tl.int64), 1)
        y0, y1, y, variance_y = _along_side(row, rows, high_side)
        x0, x1, x, variance_x = _along_side(column, columns, wide_side)
        first = zero + octave * OCTAVE_BLOCKS
        own = c2 | PYRAMID
        upper_row, lower_row = (channel * rows + y0) * columns, (channel * rows + y1) * columns
        n00 = philox_normal_at(upper_row + x0, first, c1, own, c3, k0, k1)
        n01 = philox_normal_at(upper_row + x1, first, c1, own, c3, k0, k1)
        n10 = philox_normal_at(lower_row + x0, first, c1, own, c3, k0, k1)
        n11 = philox_normal_at(lower_row + x1, first, c1, own, c3, k0, k1)
        upper = (1.0 - x) * n00 + x * n01
        lower = (1.0 - x) * n10 + x * n11
        total = total + amplitude * ((1.0 - y) * upper + y * lower)
        variance = variance + amplitude * amplitude * (variance_y * variance_x)
        # the octave after one that is one element wide or high adds nothing
        amplitude = tl.where((rows == 1) | (columns == 1), 0.0, amplitude)
    return tl.div_rn(total, tl.sqrt_rn(variance))


@kernel(
    fp_fusion=False,
    do_not_specialize=("num_elements", "num_pixels", "width", "num_timesteps", "num_octaves"),
)
def _noising_kernel(
    mean_ptr,
    logvar_ptr,
    words_ptr,
    alphas_cumprod_ptr,
    timesteps_ptr,
    cdf_ptr,
    noisy_ptr,
    target_ptr,
    num_elements,
    num_pixels,
    width,
    num_timesteps,
    scaling_factor,
    offset_noise,
    discount,
    num_octaves,
    perturbation,
    HAS_LOGVAR: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_PYRAMID: tl.constexpr,
    IS_PERTURBED: tl.constexpr,
    DRAW_TIMESTEP: tl.constexpr,
    HALVINGS: tl.constexpr,
    PREDICTION: tl.constexpr,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    OFFSET: tl.constexpr,
    TIMESTEP: tl.constexpr,
    PYRAMID: tl.constexpr,
    PYRAMID_SCALE: tl.constexpr,
    PERTURBATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write noisy and target for 4 * BLOCK elements of one sample; the grid is (element blocks, samples).

    With DRAW_TIMESTEP every program draws its sample's timestep and the first one writes it. NOISE to PERTURBATION:
    purposes of the draws.
    """
    sample = tl.program_id(1).to(tl.int64)
    c1 = tl.load(words_ptr + sample * 5).to(tl.uint32)
    c2 = tl.load(words_ptr + sample * 5 + 1).to(tl.uint32)
    c3 = tl.load(words_ptr + sample * 5 + 2).to(tl.uint32)
    k0 = tl.load(words_ptr + sample * 5 + 3).to(tl.uint32)
    k1 = tl.load(words_ptr + sample * 5 + 4).to(tl.uint32)
    if DRAW_TIMESTEP:
        timestep = _timestep(num_timesteps, cdf_ptr, c1, c2 | TIMESTEP, c3, k0, k1, HALVINGS)
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
    if HAS_PYRAMID:
        pixel = element - channel * num_pixels
        noise = _pyramid(
            noise,
            channel,
            pixel,
            num_pixels // width,
            width,
            discount,
            num_octaves,
            c1,
            c2,
            c3,
            k0,
            k1,
            PYRAMID,
            PYRAMID_SCALE,
        )
    if HAS_OFFSET:
        first = tl.full((), 0, tl.uint32)
        noise = noise + offset_noise * philox_normal_at(channel, first, c1, c2 | OFFSET, c3, k0, k1)
    # z_t = sqrt(a) z_0 + sqrt(1 - a) (e + perturbation * e_i)
    added = noise
    if IS_PERTURBED:
        added = noise + perturbation * philox_normals(block, c1, c2 | PERTURBATION, c3, k0, k1, BLOCK)
    noisy = signal * latents + sigma * added
    if PREDICTION == "epsilon":
        target = noise
    else:
        tl.static_assert(PREDICTION == "v_prediction", "a prediction type without a formula in the kernel")
        target = signal * noise - sigma * latents
    at = sample * num_elements + element
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
    options: NoiseOptions = PLAIN,
    timesteps_B: Tensor | None = None,
    timestep_cdf_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    purposes: Purposes = TRAINING,
) -> Noised:
    """Return each sample's noisy latents, target and timestep, drawn from its key.

    mean_BCHW, logvar_BCHW: the cached posterior, fp32 | fp16 | bf16; without a logvar the latents are the mean.
    words_B5: from `key_words`. alphas_cumprod_T: (T,) float32. prediction_type: epsilon | v_prediction.
    timesteps_B: (B,) int64 in 0 .. T - 1, or None to draw them: uniformly, or by timestep_cdf_T, (T,) int64, which
    ends with 2^32 (trainer/models/timesteps.py). dtype: of noisy_BCHW; the target is float32. Both are contiguous.
    options: what the noise is made of.
    Raises ValueError for an unknown prediction type or shapes that do not fit.
    Source: see the module's docstring; epsilon and v_prediction match diffusers' DDPMScheduler.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction type {prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")
    if mean_BCHW.dim() != 4 or words_B5.shape != (len(mean_BCHW), 5):
        raise ValueError(f"key words of {tuple(words_B5.shape)} do not fit latents of {tuple(mean_BCHW.shape)}")
    if logvar_BCHW is not None and logvar_BCHW.shape != mean_BCHW.shape:
        raise ValueError(f"logvar has shape {tuple(logvar_BCHW.shape)}, the mean {tuple(mean_BCHW.shape)}")
    if timestep_cdf_T is not None and timestep_cdf_T.shape != alphas_cumprod_T.shape:
        raise ValueError(f"a table of {len(timestep_cdf_T)} timesteps does not fit {len(alphas_cumprod_T)}")
    if not runs_kernel(mean_BCHW):
        return noising_reference(
            mean_BCHW,
            logvar_BCHW,
            words_B5,
            alphas_cumprod_T,
            prediction_type=prediction_type,
            scaling_factor=scaling_factor,
            options=options,
            timesteps_B=timesteps_B,
            timestep_cdf_T=timestep_cdf_T,
            dtype=dtype,
            purposes=purposes,
        )
    mean = mean_BCHW.contiguous()
    logvar = mean if logvar_BCHW is None else logvar_BCHW.contiguous()
    batch, channels, height, width = mean.shape
    noisy = torch.empty(mean.shape, dtype=dtype, device=mean.device)
    target = torch.empty(mean.shape, dtype=torch.float32, device=mean.device)
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
        timesteps_B if timestep_cdf_T is None else timestep_cdf_T,
        noisy,
        target,
        num_elements,
        height * width,
        width,
        len(alphas_cumprod_T),
        scaling_factor,
        options.offset,
        options.pyramid_discount,
        options.pyramid_octaves,
        options.perturbation,
        HAS_LOGVAR=logvar_BCHW is not None,
        HAS_OFFSET=options.offset > 0,
        HAS_PYRAMID=options.pyramid_discount > 0,
        IS_PERTURBED=options.perturbation > 0,
        DRAW_TIMESTEP=draw,
        HALVINGS=0 if timestep_cdf_T is None or not draw else len(alphas_cumprod_T).bit_length(),
        PREDICTION=prediction_type,
        NOISE=int(purposes.noise),
        POSTERIOR=int(purposes.posterior),
        OFFSET=int(purposes.offset),
        TIMESTEP=int(purposes.timestep),
        PYRAMID=int(purposes.pyramid),
        PYRAMID_SCALE=int(purposes.pyramid_scale),
        PERTURBATION=int(purposes.perturbation),
        BLOCK=block,
    )
    return Noised(noisy, target, timesteps_B)
