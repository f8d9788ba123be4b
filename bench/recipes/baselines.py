"""Published training recipes to compare with: diffusers' example script and its faster variants.

Written by us without handicapping them. Each is the same plain loop: latents drawn from the cached posterior,
torch.randn noise, DDPMScheduler, F.mse_loss in fp32, clip_grad_norm_ and bitsandbytes' AdamW8bit, with fused attention
and the same checkpointing and precision as ours. Recipes of other trainers are in bench/recipes/other_trainers.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.bench.recipes.workload import (
    LR,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Workload,
    initial_unet,
    use_diffusers_attention,
)
from safelight.data.batches import Batch
from safelight.kernels.unet.checkpointing import apply_checkpointing
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.base import resolve_base


@dataclass(frozen=True)
class Recipe:
    """What distinguishes a recipe. description: the published practice it reproduces, shown to users.

    weights_16bit: the weights themselves are 16-bit, without autocast. optimizer: name, or '' for the workload's.
    """

    description: str
    weights_16bit: bool = False
    channels_last: bool = False
    compile: bool = False
    optimizer: str = ""


RECIPES = {
    "diffusers": Recipe(
        "diffusers' examples/text_to_image/train_text_to_image.py with --mixed_precision, --use_8bit_adam, "
        "--gradient_checkpointing and memory-efficient attention: fp32 weights under autocast; latents and embeddings "
        "are cached, as in its SDXL script"
    ),
    "diffusers-compiled": Recipe(
        "the diffusers recipe with the speed-ups of its documentation: channels-last weights and latents, "
        "torch.compile of the UNet",
        channels_last=True,
        compile=True,
    ),
    "diffusers-16bit": Recipe(
        "the low-memory mode of kohya's full_fp16 / full_bf16: weights, gradients and update in 16 bits, without fp32 "
        "master weights",
        weights_16bit=True,
    ),
}


def make_optimizer(name: str, parameters) -> torch.optim.Optimizer:
    """Return transformers' Adafactor ("adafactor"), torch's AdamW ("adamw"), or else bitsandbytes' AdamW8bit.

    Adafactor has a fixed learning rate, as sd-scripts recommends: no relative step, no parameter scaling.
    """
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=LR, weight_decay=WEIGHT_DECAY, scale_parameter=False, relative_step=False)
    options = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": WEIGHT_DECAY}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


class Baseline:
    """The training step of a recipe. notes: which implementations it actually uses."""

    def __init__(self, recipe: Recipe, work: Workload):
        from diffusers import DDPMScheduler

        self.device = torch.device(work.device)
        base = resolve_base(work.base)
        unet = initial_unet(work.base, self.device, work.dtype if recipe.weights_16bit else torch.float32)
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        unet = unet.to(memory_format=self.memory_format)
        if work.checkpointing == "full":
            # diffusers' own, as the scripts do
            unet.enable_gradient_checkpointing()
        else:
            apply_checkpointing(unet, work.checkpointing)
        self.notes = use_diffusers_attention(unet)
        self.parameters = list(unet.parameters())
        self.optimizer = self.make_optimizer(recipe.optimizer or work.optimizer)
        self.scheduler = DDPMScheduler.from_config(base.config_of("scheduler"))
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device)
        self.unet = torch.compile(unet) if recipe.compile else unet
        self.dtype = work.dtype
        self.uses_autocast = not recipe.weights_16bit and work.dtype != torch.float32
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=work.dtype == torch.float16)
        if recipe.weights_16bit and self.scaler.is_enabled():
            _allow_fp16_gradients(self.scaler)

    def make_optimizer(self, name: str) -> torch.optim.Optimizer | None:
        """Return the optimizer of the parameters."""
        return make_optimizer(name, self.parameters)

    def loss(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: TextConditioning) -> Tensor:
        """Return the mean squared error over the batch. latents, noise (B, C, H, W) fp32; conditioning fp32."""
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
        weights = torch.float32 if self.uses_autocast else self.dtype
        noisy = noisy.to(weights).contiguous(memory_format=self.memory_format)
        context = torch.autocast(self.device.type, self.dtype) if self.uses_autocast else contextlib.nullcontext()
        with context:
            predicted = self.unet(noisy, timesteps, return_dict=False, **conditioning.unet_arguments(weights))[0]
        return F.mse_loss(predicted.float(), target.float())

    def update(self, loss: Tensor) -> None:
        """Run backward and the optimizer step as accelerate does: unscale, clip, step, free the gradients."""
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: Batch) -> Tensor:
        """Train on a batch and return the loss on the device. diffusers' `.item()` in every step is left out."""
        return self.step_on(batch.map(lambda row: row.to(self.device, non_blocking=True)))

    def step_on(self, batch: Batch) -> Tensor:
        """Train on a batch that is already on the device and return the loss."""
        latents = mean = batch.mean_BCHW
        if batch.logvar_BCHW is not None:
            latents = mean + (0.5 * batch.logvar_BCHW.clamp(-30.0, 20.0)).exp() * torch.randn_like(mean)
        return self.step_from(latents, batch.conditioning)

    def step_from(self, latents: Tensor, conditioning: TextConditioning) -> Tensor:
        """Draw noise and timesteps, train on them and return the loss."""
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), device=self.device)
        loss = self.loss(latents, noise, timesteps, conditioning)
        self.update(loss)
        return loss.detach()


def _allow_fp16_gradients(scaler: torch.amp.GradScaler) -> None:
    """Let a GradScaler unscale fp16 gradients, which torch refuses; full-fp16 trainers such as kohya's do the same."""
    unscale = scaler._unscale_grads_

    def unscale_any(optimizer, inv_scale, found_inf, allow_fp16):
        return unscale(optimizer, inv_scale, found_inf, True)

    scaler._unscale_grads_ = unscale_any
