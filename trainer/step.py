"""One optimizer step, from cached rows to changed weights. No files, no printing.

Letters: B batch, C latent channels, H W latent height and width, T tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safelight.data.batches import Batch
from safelight.kernels.philox import Key, Purpose, integers, normals_torch
from safelight.trainer.config import Loss
from safelight.trainer.diffusion import NoiseSchedule, add_noise, min_snr_weights, mse_per_sample, target
from safelight.trainer.optim import UNetOptimizer


@dataclass(frozen=True)
class Noisy:
    """What the UNet sees and shall predict. noisy_BCHW, target_BCHW float32; timesteps_B int64; text_BTD float32."""

    noisy_BCHW: Tensor
    timesteps_B: Tensor
    target_BCHW: Tensor
    text_BTD: Tensor


@dataclass(frozen=True)
class StepResult:
    """losses: unweighted mean squared errors of the samples met, (N,); grad_norm before clipping; taken: see optim.

    Reading taken may wait for the device: on logging steps alone.
    """

    losses: Tensor
    grad_norm: Tensor
    taken: Tensor | bool


def make_noisy(
    batch: Batch, schedule: NoiseSchedule, scaling_factor: float, seed: int, epoch: int, offset_noise: float = 0.0
) -> Noisy:
    """Return the batch at each sample's timestep, with posterior, noise and timestep drawn by the sample's key."""
    device = schedule.alphas_cumprod_T.device
    shape = tuple(batch.mean_BCHW.shape[1:])
    who = list(zip(batch.sample_ids, batch.occurrences, strict=True))

    def keys(purpose: Purpose) -> list[Key]:
        return [Key(seed, purpose, sample_id, epoch, occurrence) for sample_id, occurrence in who]

    latents = batch.mean_BCHW.to(device, non_blocking=True)
    if batch.logvar_BCHW is not None:
        # the clamp is diffusers' DiagonalGaussianDistribution's
        std = (0.5 * batch.logvar_BCHW.to(device, non_blocking=True).clamp(-30.0, 20.0)).exp()
        latents = latents + std * normals_torch(keys(Purpose.POSTERIOR), shape, device)
    latents = latents * scaling_factor
    noise = normals_torch(keys(Purpose.NOISE), shape, device)
    if offset_noise > 0:
        noise = noise + offset_noise * normals_torch(keys(Purpose.OFFSET_NOISE), (shape[0], 1, 1), device)
    draws = [int(integers(key, schedule.num_timesteps)[0]) for key in keys(Purpose.TIMESTEP)]
    timesteps = torch.tensor(draws).to(device, non_blocking=True)
    return Noisy(
        add_noise(schedule, latents, noise, timesteps),
        timesteps,
        target(schedule, latents, noise, timesteps),
        batch.text_BTD.to(device, non_blocking=True),
    )


def sample_losses(unet: nn.Module, noisy: Noisy) -> Tensor:
    """Return the unweighted losses, (B,) float32. The UNet runs in the dtype of its weights: no autocast."""
    dtype = next(unet.parameters()).dtype
    predicted = unet(noisy.noisy_BCHW.to(dtype), noisy.timesteps_B, noisy.text_BTD.to(dtype)).sample
    return mse_per_sample(predicted, noisy.target_BCHW)


def accumulate(
    unet: nn.Module, noisy: Noisy, schedule: NoiseSchedule, loss: Loss, num_samples: int, loss_scale: Tensor
) -> Tensor:
    """Add this micro-batch's gradients and return its unweighted losses, (B,), detached.

    num_samples: how many a full optimizer step has (batch_size x accumulate). Every sample weighs 1 / num_samples, so
    accumulated micro-batches equal one larger batch, and a short batch does not pull harder than its samples.
    """
    losses = sample_losses(unet, noisy)
    weights = min_snr_weights(schedule, noisy.timesteps_B, loss.min_snr_gamma)
    ((losses * weights).sum() / num_samples * loss_scale).backward()
    return losses.detach()


def train_step(
    unet: nn.Module,
    optimizer: UNetOptimizer,
    batches: Iterable[Batch],
    schedule: NoiseSchedule,
    scaling_factor: float,
    loss: Loss,
    *,
    seed: int,
    epoch: int,
    num_samples: int,
    lr: float,
    weight_decay: float,
    max_grad_norm: float,
) -> StepResult:
    """Take one optimizer step over the micro-batches given."""
    losses = []
    pending = iter(batches)
    batch = next(pending)
    while batch is not None:
        following = next(pending, None)
        if following is None:
            optimizer.arm(lr, weight_decay, max_grad_norm)
        noisy = make_noisy(batch, schedule, scaling_factor, seed, epoch, loss.offset_noise)
        losses.append(accumulate(unet, noisy, schedule, loss, num_samples, optimizer.loss_scale.scale))
        batch = following
    norm, taken = optimizer.step(lr, weight_decay, max_grad_norm)
    return StepResult(torch.cat(losses), norm, taken)
