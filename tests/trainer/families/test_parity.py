"""Twenty steps of each family against a plain loop of diffusers' modules, with and without our kernels."""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.kernels.philox import Key, Purpose, integers, normals
from safelight.kernels.unet import patch
from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.families.family import Family
from safelight.trainer.families.registry import FAMILIES
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.step import StepContext, StepSettings, train_step

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
SEED, EPOCH, SCALE, LR, NUM_STEPS, BATCH, TOKENS = 5, 3, 0.7, 1e-4, 20, 4, 6
COMMON = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
}
# each family's kinds of blocks at a fraction of their width
UNETS: dict[str, dict] = {
    "sd1": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    },
    "sd2": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}


def make_unet(family: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**COMMON, **UNETS[family]).train()


def make_batch(family: Family, unet_config: Mapping, number: int) -> Batch:
    """Return a batch of made-up rows; sample i of batch n has id 1000 n + i."""
    generator = torch.Generator().manual_seed(number)
    shape = family.text_row_shape(TOKENS, COMMON["cross_attention_dim"], family.pooled_width(unet_config))
    sizes = torch.randint(32, 1024, (BATCH, 6), generator=generator).float()
    mean, logvar = torch.randn(2, BATCH, 4, 8, 8, generator=generator)
    rows = torch.randn(BATCH, *shape, generator=generator)
    return Batch(
        mean,
        logvar - 4,
        family.conditioning(unet_config, rows, sizes),
        tuple(1000 * number + i for i in range(BATCH)),
        (0,) * BATCH,
        Bucket(32, 32),
    )


def plain_loss(unet: UNet2DConditionModel, scheduler: DDPMScheduler, batch: Batch) -> Tensor:
    """Return the loss as a training script of diffusers computes it, from the noise and timesteps of our step."""

    def draw(purpose: Purpose) -> Tensor:
        keys = [Key(SEED, purpose, sample_id, EPOCH, 0) for sample_id in batch.sample_ids]
        return torch.from_numpy(np.stack([normals(key, (4, 8, 8)) for key in keys]))

    keys = [Key(SEED, Purpose.TIMESTEP, sample_id, EPOCH, 0) for sample_id in batch.sample_ids]
    timesteps = torch.tensor([int(integers(key, 1000)[0]) for key in keys])
    latents = (batch.mean_BCHW + torch.exp(0.5 * batch.logvar_BCHW) * draw(Purpose.POSTERIOR)) * SCALE
    noise, conditioning, added = draw(Purpose.NOISE), batch.conditioning, {}
    if unet.config.addition_embed_type == "text_time":
        added = {"added_cond_kwargs": {"text_embeds": conditioning.pooled_BP, "time_ids": conditioning.sizes_B6}}
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicts_noise = scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(unet(noisy, timesteps, conditioning.text_BTD, **added).sample, target)


def check_twenty_steps(
    family: str, prediction: str, zero_snr: bool, prepare: Callable = lambda unet: None, tolerance: float = 1e-4
) -> None:
    """Compare losses, gradient norms and weights.

    prepare: changes our UNet before the optimizer is made. tolerance: of a weight, as a share of the way it travelled.
    """
    start = make_unet(family)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    prepare(ours)
    config = {**SCHEDULER, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    scheduler, schedule = DDPMScheduler(**config), make_schedule(config)
    optimizer = make_optimizer(ours, Optimizer(name="adamw", lr=LR))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    context = StepContext(ours, optimizer, schedule, SCALE, Loss())
    for number in range(NUM_STEPS):
        batch = make_batch(FAMILIES[family], start.config, number)
        result = train_step(context, [batch], StepSettings(BATCH, LR, 0.01, 1.0), seed=SEED, epoch=EPOCH)
        loss = plain_loss(theirs, scheduler, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        assert result.losses.mean().item() == pytest.approx(loss.item(), rel=2e-6)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=2e-5)
    moved, expected, begun = 0.0, theirs.state_dict(), start.state_dict()
    for name, weight in ours.state_dict().items():
        # Adam's update is at most about lr a step
        assert (weight - expected[name]).abs().max() < NUM_STEPS * LR * 1e-2, name
        assert (weight - expected[name]).norm() <= tolerance * (expected[name] - begun[name]).norm() + 1e-9, name
        moved = max(moved, (expected[name] - begun[name]).abs().max().item())
    assert moved > NUM_STEPS * LR / 2


CASES = [
    ("sd1", "epsilon", False),
    ("sd1", "v_prediction", False),
    ("sd2", "v_prediction", False),
    ("sd2", "v_prediction", True),
    ("sdxl", "epsilon", False),
    ("sdxl", "v_prediction", True),
]


@pytest.mark.parametrize(("family", "prediction", "zero_snr"), CASES)
@pytest.mark.long
def test_twenty_steps_equal_a_plain_diffusers_loop(family, prediction, zero_snr):
    """Same weights, batches, noise and timesteps: diffusers' scheduler, F.mse_loss, torch's clipping and AdamW."""
    check_twenty_steps(family, prediction, zero_snr)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNETS)
def test_twenty_steps_on_our_kernels_equal_a_plain_diffusers_loop(family):
    # sums in another order, which Adam enlarges where gradients are small
    check_twenty_steps(family, "epsilon", False, patch.apply, tolerance=1e-3)
