"""A base for runs in tests: the tiny base's autoencoder and text encoder, and a UNet of a third of its layers."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

from safelight.trainer.models.base import tiny_folder

# deleted when the process ends
_FOLDER = tempfile.TemporaryDirectory(prefix="safelight-base-", ignore_cleanup_errors=True)


@functools.cache
def small_base() -> str:
    """Return the base's folder, `.../small`, made on the first call. Read only.

    Most of a step of the tiny base is the overhead of its many small layers, so fewer layers make it three times as
    fast. Each kind of layer is left: residual blocks that change the width and that do not, down- and upsampling,
    self- and cross-attention. The weights are random; a test of what a model has learned needs the tiny base.
    """
    import torch
    from diffusers import UNet2DConditionModel

    folder = Path(_FOLDER.name, "small")
    shutil.copytree(tiny_folder(), folder, ignore=shutil.ignore_patterns("unet", "training_log.jsonl"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    unet.save_pretrained(folder / "unet")
    return str(folder)
