"""One optimizer step, from cached rows to changed weights. No files, no printing.

Letters: B batch, C latent channels, H W latent height and width, T tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safelight.data.batches import Batch
from safelight.kernels.ops.diffusion_loss import LossOptions, diffusion_loss
from safelight.kernels.ops.noising import key_words, noising
from safelight.kernels.philox import Key, Purpose
from safelight.trainer.config.toml import Loss
from safelight.trainer.models.noise_schedule import NoiseSchedule, mse_per_sample
from safelight.trainer.optim.optimizer import UNetOptimizer
from safelight.trainer.step.profiler_ranges import named


@dataclass(frozen=True)
class Inputs:
    """All that a step knows of its batch, on the device. As of Batch; words_B5: int64, of noising.key_words."""

    mean_BCHW: Tensor
    logvar_BCHW: Tensor | None
    text_BTD: Tensor
    words_B5: Tensor


@dataclass(frozen=True)
class Noisy:
    """What the UNet sees and shall predict. noisy_BCHW in its dtype; target_BCHW, text_BTD float32; timesteps_B int64."""

    noisy_BCHW: Tensor
    timesteps_B: Tensor
    target_BCHW: Tensor
    text_BTD: Tensor


class MicroResult(NamedTuple):
    """losses_B: unweighted, detached; grad_norm and taken: as of StepResult, after a step's last micro-batch, else None."""

    losses_B: Tensor
    grad_norm: Tensor | None
    taken: Tensor | bool | None


@dataclass(frozen=True)
class StepResult:
    """losses: unweighted errors of the samples met, by loss.kind, (N,); grad_norm before clipping; taken: see optim.

    Reading taken may wait for the device: on logging steps alone.
    """

    losses: Tensor
    grad_norm: Tensor
    taken: Tensor | bool


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for what the device was asked before."""
    if device.type == "cuda" and x.device.type == "cpu":
        # from pageable memory more than 64 KiB are copied only when the steps before are done
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def upload(batch: Batch, device: torch.device, seed: int, epoch: int) -> Inputs:
    """Return a batch on a device, with the keys of its draws."""
    who = zip(batch.sample_ids, batch.occurrences, strict=True)
    keys = [Key(seed, Purpose.NOISE, sample_id, epoch, occurrence) for sample_id, occurrence in who]
    logvar = None if batch.logvar_BCHW is None else to_device(batch.logvar_BCHW, device)
    mean, text = to_device(batch.mean_BCHW, device), to_device(batch.text_BTD, device)
    return Inputs(mean, logvar, text, key_words(keys, device))


def add_noise(
    inputs: Inputs,
    schedule: NoiseSchedule,
    scaling_factor: float,
    offset_noise: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Noisy:
    """Return the batch at each sample's timestep, with posterior, noise and timestep drawn by the sample's key.

    dtype: the UNet's.
    """
    noised = noising(
        inputs.mean_BCHW,
        inputs.logvar_BCHW,
        inputs.words_B5,
        schedule.alphas_cumprod_T,
        prediction_type=schedule.prediction_type,
        scaling_factor=scaling_factor,
        offset_noise=offset_noise,
        dtype=dtype,
    )
    return Noisy(noised.noisy_BCHW, noised.timesteps_B, noised.target_BCHW, inputs.text_BTD)


def predict(unet: nn.Module, noisy: Noisy) -> Tensor:
    """Return the UNet's prediction, (B, C, H, W). It runs in the dtype of its weights: no autocast."""
    dtype = next(unet.parameters()).dtype
    return unet(noisy.noisy_BCHW.to(dtype), noisy.timesteps_B, noisy.text_BTD.to(dtype)).sample


def sample_losses(unet: nn.Module, noisy: Noisy) -> Tensor:
    """Return the unweighted losses, (B,) float32."""
    return mse_per_sample(predict(unet, noisy), noisy.target_BCHW)


def accumulate(
    unet: nn.Module, noisy: Noisy, schedule: NoiseSchedule, loss: Loss, num_samples: int, loss_scale: Tensor
) -> Tensor:
    """Add this micro-batch's gradients and return its unweighted losses, (B,), detached.

    num_samples: how many a full optimizer step has (batch_size x accumulate). Every sample weighs 1 / num_samples, so
    accumulated micro-batches equal one larger batch, and a short batch does not pull harder than its samples.
    """
    options = LossOptions(prediction_type=schedule.prediction_type, **loss.kernel_options())
    with named("forward"):
        predicted = predict(unet, noisy)
    with named("loss"):
        found = diffusion_loss(
            predicted, noisy.target_BCHW, noisy.timesteps_B, schedule.alphas_cumprod_T, options, num_samples=num_samples
        )
        scaled = found.total * loss_scale
    with named("backward"):
        scaled.backward()
    return found.losses_B


def micro_step(
    unet: nn.Module,
    optimizer: UNetOptimizer,
    inputs: Inputs,
    schedule: NoiseSchedule,
    scaling_factor: float,
    loss: Loss,
    num_samples: int,
    is_first: bool = True,
    is_last: bool = True,
) -> MicroResult:
    """Take one of a step's micro-batches from its inputs to gradients, and the last one to changed weights.

    It asks nothing of the device and takes nothing from the host but its arguments, the same at every step: it can be
    recorded and replayed (graphs.py). The numbers of the step are set before, by optimizer.set_hyper.
    """
    if is_last:
        optimizer.arm()
    with named("noise"):
        noisy = add_noise(inputs, schedule, scaling_factor, loss.offset_noise, next(unet.parameters()).dtype)
    with optimizer.buffers.micro_step(is_first, is_last):
        losses = accumulate(unet, noisy, schedule, loss, num_samples, optimizer.loss_scale.scale)
    if not is_last:
        return MicroResult(losses, None, None)
    with named("optimizer"):
        return MicroResult(losses, *optimizer.step())


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
    graphs: Callable[[Inputs, bool, bool], MicroResult] | None = None,
) -> StepResult:
    """Take one optimizer step over the micro-batches given.

    graphs: recorded micro-steps (graphs.StepGraphs) that are replayed in place of running them; then the result's norm and
    taken are overwritten by the next step.
    """
    optimizer.set_hyper(lr, weight_decay, max_grad_norm)
    losses, is_first = [], True
    pending = iter(batches)
    with named("load"):
        batch = next(pending)
    while batch is not None:
        with named("load"):
            following = next(pending, None)
            inputs = upload(batch, schedule.alphas_cumprod_T.device, seed, epoch)
        is_last = following is None
        if graphs is not None:
            result = graphs(inputs, is_first, is_last)
            # the next micro-batch of this shape writes there
            losses.append(result.losses_B.clone())
        else:
            result = micro_step(unet, optimizer, inputs, schedule, scaling_factor, loss, num_samples, is_first, is_last)
            losses.append(result.losses_B)
        batch, is_first = following, False
    return StepResult(torch.cat(losses), result.grad_norm, result.taken)
