"""Minimal things to save as a checkpoint: a small UNet, a layer that is saved like one, an identity and a position."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from safelight.trainer.checkpoint.files import Position, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.optim.optimizer import UNetOptimizer

IDENTITY = Identity({"run.seed": 1}, [{"epochs": 2, "lr": 1e-4}], "rows")
POSITION = Position(step=7, epoch=1, step_in_epoch=2, stage=0, best_step=3, best_loss=0.125)


def make_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    ).train()


def save(run_dir: Path, step: int, unet=None, state=None) -> Path:
    state = {"a/b": torch.arange(4.0)} if state is None else state
    return save_checkpoint(run_dir, writes(unet or Little()), state, replace(POSITION, step=step), IDENTITY)


def writes(unet) -> Callable[[Path], None]:
    """Return what writes a UNet's own files into a checkpoint's folder."""
    return lambda folder: unet.save_pretrained(folder / "unet", safe_serialization=True)


def state_tensors(optimizer: UNetOptimizer) -> dict[str, torch.Tensor]:
    """Return contiguous copies of an optimizer's live state on the CPU, as a checkpoint holds them."""
    return {key: x.to("cpu", copy=True).contiguous() for key, x in optimizer.live_state().items()}


class Little(torch.nn.Linear):
    """A linear layer with the `save_pretrained` of a UNet."""

    def __init__(self):
        super().__init__(2, 2)

    def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
        assert safe_serialization
        folder.mkdir()
        save_file(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")
