"""From a loaded UNet to one that is ready to be trained: attention, kernels, checkpointing, optimizer, moving average.

One place for the run and for the trace of it on meta tensors that the plan is made from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from safelight.kernels.unet import patch
from safelight.kernels.unet.attention import AttentionChoice, apply_attention
from safelight.kernels.unet.checkpointing import apply_checkpointing
from safelight.trainer.config.schema import Config
from safelight.trainer.optim.ema import WeightAverages
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer


@dataclass
class Equipped:
    """What a UNet was given. patched: what runs on kernels, None without; ema: None where the run keeps no average."""

    optimizer: UNetOptimizer
    ema: WeightAverages | None
    patched: patch.Patch | None


def equip(
    unet: nn.Module, config: Config, attention: AttentionChoice, device: torch.device, dtype: torch.dtype
) -> Equipped:
    """Make a UNet of fp32 weights ready to be trained in a dtype, in place.

    device: where it trains, and comes to tensor by tensor: a GPU never holds the fp32 weights of a 16-bit run. A UNet of
    meta tensors stays one.
    """
    apply_attention(unet, attention)
    patched = patch.apply(unet, attention) if patch.should_patch(config.train.kernels, device) else None
    how = config.train.checkpointing
    apply_checkpointing(unet, "none" if how == "auto" else how)
    first = next(unet.parameters())
    optimizer = make_optimizer(
        unet, config.optimizer, dtype, config.run.seed, first.device if first.is_meta else device
    )
    optimizer.buffers.dtype = config.train.accumulate_dtype
    if patched is not None:
        # 16-bit weights have new memory; the moving average keeps views of it
        patch.repack(unet)
    if any(stage.accumulate > 1 for stage in config.stages()):
        optimizer.buffers.allocate()
    ema = WeightAverages(optimizer, config.train.ema_decay) if config.train.ema_decay > 0 else None
    return Equipped(optimizer, ema, patched)
