"""One optimizer step, from cached rows to changed weights. No files, no printing.

A step consists of one or more micro-steps. Each draws noise and timesteps, runs the UNet forward and backward, and
accumulates gradients; after the last one the optimizer updates the weights.
Letters: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safelight.data.batches import Batch
from safelight.data.tensor_record import TensorRecord
from safelight.kernels.ops.diffusion_loss import LossOptions, diffusion_loss
from safelight.kernels.ops.noising import PLAIN, Noised, NoiseOptions, key_words, noising
from safelight.kernels.philox import Key, Purpose
from safelight.kernels.unet.low_rank import DropoutKey
from safelight.trainer.config.schema import Loss
from safelight.trainer.families.conditioning import TextConditioning, TokenConditioning
from safelight.trainer.models.noise_schedule import NoiseSchedule, mse_per_sample
from safelight.trainer.models.timesteps import timestep_cdf
from safelight.trainer.optim.optimizer import UNetOptimizer
from safelight.trainer.step.profiler_ranges import profiler_range
from safelight.trainer.step.text_training import TextTraining


@dataclass(frozen=True)
class StepContext:
    """What all steps of a run share. scaling_factor: what unscaled latents are multiplied by to get unit variance.

    texts: the text encoders while captions are read inside the step, None if captions are rows of embeddings.
    dropout_key: what an adapter's dropout draws its masks by, None without dropout. timestep_cdf_T: the table that
    timesteps are drawn by, on the device, because a captured step cannot copy it there; None without one.
    """

    unet: nn.Module
    optimizer: UNetOptimizer
    schedule: NoiseSchedule
    scaling_factor: float
    loss: Loss
    texts: TextTraining | None = None
    dropout_key: DropoutKey | None = None
    timestep_cdf_T: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        table = timestep_cdf(self.loss, self.schedule.num_timesteps)
        # the dataclass is frozen
        object.__setattr__(self, "timestep_cdf_T", None if table is None else table.to(self.device))

    @property
    def device(self) -> torch.device:
        return self.schedule.alphas_cumprod_T.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet's weights, which it also computes in: there is no autocast."""
        return next(self.unet.parameters()).dtype

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Let steps inside the block run all their work but change nothing: see UNetOptimizer.dry_run."""
        texts = self.text_optimizer
        with self.optimizer.dry_run(), nullcontext() if texts is None else texts.dry_run():
            yield

    @property
    def text_optimizer(self) -> UNetOptimizer | None:
        """The optimizer of the text encoders, None if their weights are not trained."""
        return None if self.texts is None else self.texts.optimizer


@dataclass(frozen=True)
class StepSettings:
    """The hyperparameters of one optimizer step. max_grad_norm: 0 disables clipping.

    text_lr: of the text encoders, None if they are not trained.

    num_samples: samples in a full step (batch_size x accumulate). Every sample weighs 1 / num_samples, so accumulated
    micro-batches equal one larger batch, and the samples of a short last batch weigh no more than others.
    """

    num_samples: int
    lr: float
    weight_decay: float
    max_grad_norm: float
    text_lr: float | None = None


@dataclass(frozen=True)
class Inputs(TensorRecord):
    """A batch on the device, with the keys of its random draws. words_B5: int64, see noising.key_words.

    mask_B1HW, scales_B: as in Batch.
    """

    mean_BCHW: Tensor
    logvar_BCHW: Tensor | None
    conditioning: TextConditioning | TokenConditioning
    words_B5: Tensor
    mask_B1HW: Tensor | None = None
    scales_B: Tensor | None = None


class MicroResult(NamedTuple):
    """losses_B: unweighted, detached. grad_norm, is_applied: as in StepResult after the last micro-step, else None."""

    losses_B: Tensor
    grad_norm: Tensor | None
    is_applied: Tensor | bool | None


@dataclass(frozen=True)
class StepResult:
    """losses: the samples' unweighted errors by loss.kind inside their masks, (N,). grad_norm: before clipping.

    is_applied: whether the optimizer updated the weights; it skips a step whose gradients are not finite. Reading it
    may synchronize with the device, so read it on logging steps only.
    """

    losses: Tensor
    grad_norm: Tensor
    is_applied: Tensor | bool


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, copied without synchronizing."""
    if device.type == "cuda" and x.device.type == "cpu":
        # a copy of more than 64 KiB from pageable memory would wait for all earlier work of the stream
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def upload(batch: Batch, device: torch.device, seed: int, epoch: int) -> Inputs:
    """Return a batch on a device, with the keys of its random draws."""
    samples = zip(batch.sample_ids, batch.occurrences, strict=True)
    keys = [Key(seed, Purpose.NOISE, sample_id, epoch, occurrence) for sample_id, occurrence in samples]
    on_device = batch.map(lambda x: to_device(x, device))
    return Inputs(
        on_device.mean_BCHW,
        on_device.logvar_BCHW,
        on_device.conditioning,
        key_words(keys, device),
        on_device.mask_B1HW,
        on_device.scales_B,
    )


def add_noise(
    inputs: Inputs,
    schedule: NoiseSchedule,
    scaling_factor: float,
    options: NoiseOptions = PLAIN,
    dtype: torch.dtype = torch.float32,
    timestep_cdf_T: Tensor | None = None,
) -> Noised:
    """Return noisy latents in `dtype` and their targets.

    Each sample's key determines its draw from the posterior, its noise and its timestep. timestep_cdf_T: as in
    StepContext.
    """
    return noising(
        inputs.mean_BCHW,
        inputs.logvar_BCHW,
        inputs.words_B5,
        schedule.alphas_cumprod_T,
        prediction_type=schedule.prediction_type,
        scaling_factor=scaling_factor,
        options=options,
        timestep_cdf_T=timestep_cdf_T,
        dtype=dtype,
    )


def predict(unet: nn.Module, noised: Noised, conditioning: TextConditioning) -> Tensor:
    """Return the UNet's prediction, (B, C, H, W), in the dtype of its weights."""
    dtype = next(unet.parameters()).dtype
    return unet(noised.noisy_BCHW.to(dtype), noised.timesteps_B, **conditioning.unet_arguments(dtype)).sample


def sample_losses(
    unet: nn.Module, noised: Noised, conditioning: TextConditioning, mask_B1HW: Tensor | None = None
) -> Tensor:
    """Return each sample's unweighted mean squared error, (B,) float32. mask_B1HW: as in Batch."""
    return mse_per_sample(predict(unet, noised, conditioning), noised.target_BCHW, mask_B1HW)


def accumulate(
    unet: nn.Module,
    noised: Noised,
    conditioning: TextConditioning,
    schedule: NoiseSchedule,
    loss: Loss,
    num_samples: int,
    loss_scale: Tensor,
    mask_B1HW: Tensor | None = None,
    scales_B: Tensor | None = None,
) -> Tensor:
    """Add this micro-batch's gradients and return its unweighted losses, (B,), detached.

    num_samples: as in StepSettings. loss_scale: a scalar on the device that the loss is multiplied by before backward.
    mask_B1HW, scales_B: as in Batch.
    """
    options = LossOptions(prediction_type=schedule.prediction_type, **loss.kernel_options())
    with profiler_range("forward"):
        predicted = predict(unet, noised, conditioning)
    with profiler_range("loss"):
        result = diffusion_loss(
            predicted,
            noised.target_BCHW,
            noised.timesteps_B,
            schedule.alphas_cumprod_T,
            options,
            num_samples=num_samples,
            mask_B1HW=mask_B1HW,
            scales_B=scales_B,
        )
        scaled = result.total * loss_scale
    with profiler_range("backward"):
        scaled.backward()
    return result.losses_B


def micro_step(
    context: StepContext, inputs: Inputs, num_samples: int, is_first: bool = True, is_last: bool = True
) -> MicroResult:
    """Run one of a step's micro-steps: forward and backward, and the optimizer's step after the last one.

    It can be captured as a CUDA graph (cuda_graphs.py), because it never synchronizes with the device and reads nothing
    from the host but its arguments: optimizer.set_hyper has written learning rate, weight decay and clipping to the
    device before.
    """
    optimizer = context.optimizer
    if is_last:
        optimizer.prepare_backward()
        if context.text_optimizer is not None:
            context.text_optimizer.prepare_backward()
    with profiler_range("noise"):
        options = NoiseOptions(**context.loss.noise_options())
        noised = add_noise(
            inputs, context.schedule, context.scaling_factor, options, context.dtype, context.timestep_cdf_T
        )
    texts, text_optimizer = context.texts, context.text_optimizer
    text_buffers = nullcontext() if text_optimizer is None else text_optimizer.buffers.micro_step(is_first, is_last)
    with optimizer.buffers.micro_step(is_first, is_last), text_buffers:
        scale = optimizer.loss_scale.scale
        if texts is None:
            conditioning = inputs.conditioning
        else:
            with profiler_range("text"):
                conditioning = texts.conditioning(inputs.conditioning)
        losses = accumulate(
            context.unet,
            noised,
            conditioning,
            context.schedule,
            context.loss,
            num_samples,
            scale,
            inputs.mask_B1HW,
            inputs.scales_B,
        )
    if not is_last:
        return MicroResult(losses, None, None)
    with profiler_range("optimizer"):
        if text_optimizer is not None:
            # first: the UNet's own step changes the loss scale
            text_optimizer.step()
        return MicroResult(losses, *optimizer.step())


def train_step(
    context: StepContext,
    batches: Iterable[Batch],
    settings: StepSettings,
    *,
    seed: int,
    epoch: int,
    graphs: Callable[[Inputs, bool, bool], MicroResult] | None = None,
) -> StepResult:
    """Take one optimizer step over the given micro-batches.

    seed, epoch: part of the key of every random draw. graphs: captured micro-steps (cuda_graphs.StepGraphs) to replay
    instead of running them; the next step then overwrites the result's grad_norm and is_applied.
    """
    context.optimizer.set_hyper(settings.lr, settings.weight_decay, settings.max_grad_norm)
    if context.text_optimizer is not None:
        context.text_optimizer.set_hyper(settings.text_lr, settings.weight_decay, settings.max_grad_norm)
    losses, is_first = [], True
    pending = iter(batches)
    with profiler_range("load"):
        batch = next(pending)
    while batch is not None:
        with profiler_range("load"):
            following = next(pending, None)
            inputs = upload(batch, context.device, seed, epoch)
            if context.dropout_key is not None:
                drawn_for = [seed, epoch, list(batch.sample_ids), list(batch.occurrences)]
                context.dropout_key.value = json.dumps(drawn_for).encode()
        is_last = following is None
        if graphs is not None:
            result = graphs(inputs, is_first, is_last)
            # the next micro-batch of this shape overwrites the graph's result
            losses.append(result.losses_B.clone())
        else:
            result = micro_step(context, inputs, settings.num_samples, is_first, is_last)
            losses.append(result.losses_B)
        batch, is_first = following, False
    return StepResult(torch.cat(losses), result.grad_norm, result.is_applied)
