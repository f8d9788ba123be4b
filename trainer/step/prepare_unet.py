"""Prepares a loaded UNet for training: attention, kernels, checkpointing, optimizer, moving average.

Used by the run, and by the memory planner, which traces the same UNet on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from safelight.kernels.ops.quantized_weight import quantize_layers
from safelight.kernels.unet import patch
from safelight.kernels.unet.attention import AttentionChoice, apply_attention
from safelight.kernels.unet.checkpointing import apply_checkpointing
from safelight.trainer.adapters.trained import Trained, trained_of
from safelight.trainer.config.schema import Config
from safelight.trainer.distributed.sharded import cut
from safelight.trainer.distributed.spread import sharers_of
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.optim.ema import Averages, averages_of
from safelight.trainer.optim.optimizer import UNetOptimizer


@dataclass
class PreparedUNet:
    """What was made for a UNet.

    optimizer: of what is trained. ema: None without averages of the weights.
    patched: what runs on our kernels, None if off.
    """

    trained: Trained
    optimizer: UNetOptimizer
    ema: Averages | None
    patched: patch.Patch | None


def prepare_unet(
    unet: nn.Module,
    config: Config,
    attention: AttentionChoice,
    device: torch.device,
    dtype: torch.dtype,
    when: Callable[[str], None] = lambda _: None,
    world: World = ALONE,
) -> PreparedUNet:
    """Prepare a UNet with fp32 weights, in place, for training in `dtype` on `device`.

    Weights move to the device one tensor at a time, so that a GPU never holds all fp32 weights of a 16-bit run. Meta
    tensors stay on the meta device. when: called with "quantized" when the frozen weights of an adapter are, if they
    are, and with "converted" when all weights are on the device in the form that they are trained in.
    world: the processes that train the run together.
    """
    apply_attention(unet, attention)
    is_whole = config.distributed.shard != "full" or world.size == 1
    patched = patch.apply(unet, attention) if patch.should_patch(config.train.kernels, device) and is_whole else None
    checkpointing = config.train.checkpointing
    apply_checkpointing(unet, "none" if checkpointing == "auto" else checkpointing)
    trained = trained_of(unet, config)
    trained.mark()
    first = next(unet.parameters())
    device = first.device if first.is_meta else device
    if format := config.adapter.quantized_base:
        quantize_layers(unet, format, dtype, device)
        when("quantized")
    if not is_whole:
        cut(unet, world, device, sum_in_fp32=config.train.accumulate_dtype == "fp32")
    optimizer = trained.make_optimizer(config, device, dtype, sharers_of(config, world))
    when("converted")
    optimizer.buffers.dtype = config.train.accumulate_dtype
    if patched is not None:
        # 16-bit weights have new storage; repack before the moving average takes views of it
        patch.repack(unet)
    if any(stage.accumulate > world.size for stage in config.stages()):
        optimizer.buffers.allocate()
    return PreparedUNet(trained, optimizer, averages_of(optimizer, config.train.ema_decay), patched)
