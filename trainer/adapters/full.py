"""Full fine-tuning: every parameter of the UNet is trained; a checkpoint holds the whole UNet in diffusers' format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.optim.split_weights import join
from safelight.trainer.adapters.trained import Shapes
from safelight.trainer.optim.ema import PREFIX as EMA_PREFIX
from safelight.untrusted import check_regular, path_in

FOLDER = "unet"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        for path in _weight_files(folder):
            weights.update(load_file(path))
        for name, tensor in weights.items():
            _check_dtype(folder, name, tensor)
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
        state_path = path_in(folder, "state.safetensors")
        check_regular(state_path)
        with safe_open(state_path, "pt") as state:
            keys = set(state.keys())
            if weights == "ema" and not any(key.startswith(EMA_PREFIX) for key in keys):
                raise UserError(f"{folder} has no moving average, because train.ema_decay is 0; leave out --weights")
            for name in sorted(shapes):
                sources = [f"master/{name}"] if weights == "trained" else [f"{EMA_PREFIX}{name}", f"master/{name}"]
                if key := next((source for source in sources if source in keys), None):
                    tensor = state.get_tensor(key)
                    _check_dtype(folder, key, tensor)
                    tensors[name] = convert(name, tensor)
            for path in _weight_files(folder):
                with safe_open(path, "pt") as file:
                    for name in set(file.keys()) - set(tensors):
                        tensor, remainder = file.get_tensor(name), f"remainder/{name}"
                        _check_dtype(folder, name, tensor)
                        if remainder in keys:
                            rest = state.get_tensor(remainder)
                            if rest.shape != tensor.shape or rest.dtype not in (torch.int16, torch.int8):
                                raise UserError(f"{folder}: {remainder} is {_form(rest)}, which completes no weight")
                            tensor = join(tensor, rest)
                        tensors[name] = convert(name, tensor)
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dict(shapes):
            raise UserError(
                f"{folder} does not fit the UNet that model.base names; restore the base that the run was trained from"
            )
        return tensors


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's weights. Raises UserError for one that is no regular file of the folder."""
    paths = [path_in(folder, f"{FOLDER}/{path.name}") for path in sorted((folder / FOLDER).glob("*.safetensors"))]
    for path in paths:
        check_regular(path)
    return paths


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _check_dtype(folder: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in WEIGHT_DTYPES:
        raise UserError(f"{folder}: {name} is {_form(tensor)}, which is no weight of a checkpoint (fp32, bf16 or fp16)")
