"""Makes runs with one checkpoint, for tests of the export."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from safelight.trainer.checkpoint.files import Position, folder_of, save_checkpoint
from safelight.trainer.checkpoint.identity import identify
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.models.base import base_of
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.optimizer import make_optimizer
from tests.trainer.checkpoints import state_tensors, writes

STEP = 7


def make_run(
    folder: Path,
    precision: torch.dtype = torch.float32,
    step: int = STEP,
    best: int = STEP,
    largest: float = 0,
    **tables,
) -> Path:
    """Write a run folder with one checkpoint, whose UNet is the base's plus a little noise, and return the folder."""
    tables = {"model": {"base": "tiny"}, "data": {"resolution": 64}, **tables}
    config = parse_config({**tables, "run": {"dir": str(folder)}}, "make_run")
    unet = load_unet(base_of(config.model), config.run.seed)
    optimizer = make_optimizer(unet, config.optimizer, precision)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for index, name in enumerate(optimizer.parameters):
            value = optimizer.value(name)
            optimizer.kernel.assign(index, value + 1e-2 * torch.randn(value.shape, generator=generator))
        if largest:
            optimizer.parameters["conv_in.bias"][0] = largest
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    # without moments, which an export does not read
    state = {
        name: t
        for name, t in state_tensors(optimizer).items()
        if name.startswith(("master/", "remainder/", "loss_scale/"))
    }
    save_checkpoint(folder, writes(unet), state, Position(step=step, best_step=best), identify(config, "any"))
    return folder


def checkpoint_unet(run: Path, step: int = STEP) -> dict[str, torch.Tensor]:
    return load_file(folder_of(run, step) / "unet" / "diffusion_pytorch_model.safetensors")
