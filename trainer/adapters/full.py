"""Full fine-tuning: every parameter of the UNet is trained; a checkpoint holds the whole UNet in diffusers' format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.optim.split_weights import join
from safelight.trainer.adapters.trained import Shapes
from safelight.trainer.optim.ema import PREFIX as EMA_PREFIX

FOLDER = "unet"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class FullFineTune:
    """A UNet that is trained as a whole; see Trained. Its files: unet/config.json and one file of weights beside it."""

    def __init__(self, unet: nn.Module):
        self.unet = unet

    def mark(self) -> None:
        self.unet.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.unet.state_dict())

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.unet.save_config(folder / FOLDER)
        save_file(dict(tensors), folder / FOLDER / WEIGHTS_NAME, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        weights: dict[str, Tensor] = {}
        for path in sorted((folder / FOLDER).glob("*.safetensors")):
            weights.update(load_file(path))
        try:
            self.unet.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise UserError(
                f"checkpoint {folder} does not fit the UNet of this run's base ({first[0].strip()[:160]}); "
                "set model.base to the model it was trained from"
            ) from None

    def merged(
        self, folder: Path, shapes: Shapes, weights: str, convert: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with safe_open(folder / "state.safetensors", "pt") as state:
            keys = set(state.keys())
            if weights == "ema" and not any(key.startswith(EMA_PREFIX) for key in keys):
                raise UserError(f"{folder} has no moving average, because train.ema_decay is 0; leave out --weights")
            for name in sorted(shapes):
                sources = [f"master/{name}"] if weights == "trained" else [f"{EMA_PREFIX}{name}", f"master/{name}"]
                if key := next((source for source in sources if source in keys), None):
                    tensors[name] = convert(name, state.get_tensor(key))
            for path in sorted((folder / FOLDER).glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    for name in set(file.keys()) - set(tensors):
                        tensor, remainder = file.get_tensor(name), f"remainder/{name}"
                        if remainder in keys:
                            tensor = join(tensor, state.get_tensor(remainder))
                        tensors[name] = convert(name, tensor)
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dict(shapes):
            raise UserError(
                f"{folder} does not fit the UNet that model.base names; restore the base that the run was trained from"
            )
        return tensors
