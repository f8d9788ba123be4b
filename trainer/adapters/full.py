"""Full fine-tuning: every parameter of the UNet is trained; a checkpoint holds the whole UNet in diffusers' format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.optim.split_weights import join
from safelight.trainer.adapters.trained import Shapes
from safelight.trainer.config.schema import Config
from safelight.trainer.models.tensor_files import TensorFile, save_file
from safelight.trainer.optim.ema import PREFIX as EMA_PREFIX
from safelight.trainer.optim.ema import check_form
from safelight.trainer.optim.schedule_free import BETA1, Z_PREFIX, average_of
from safelight.untrusted import UnsafeFile, path_in

FOLDER = "unet"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FullFineTune:
    """A UNet that is trained as a whole; see Trained. Its files: unet/config.json and one file of weights beside it."""

    def __init__(self, unet: nn.Module):
        self.unet = unet

    @classmethod
    def of(cls, unet: nn.Module, config: Config) -> FullFineTune:
        return cls(unet)

    def mark(self) -> None:
        self.unet.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.unet.state_dict())

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.unet.save_config(folder / FOLDER)
        save_file(dict(tensors), folder / FOLDER / WEIGHTS_NAME, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        files, weights = _weight_files(folder), self.unet.state_dict()
        found = {name: file.entries[name].shape for name, file in files.items()}
        if misfit := _misfit(found, {name: tuple(weight.shape) for name, weight in weights.items()}):
            raise UserError(
                f"checkpoint {folder} does not fit the UNet of this run's base ({misfit}); "
                "set model.base to the model it was trained from"
            )
        with torch.no_grad():
            for name, weight in weights.items():
                tensor = files[name].read(name)
                _check_dtype(folder, name, tensor)
                weight.copy_(tensor)

    def merged(
        self, folder: Path, shapes: Shapes, weights: str, convert: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        state = _open_tensors(folder, "state.safetensors")
        if weights == "ema" and not _is_averaged(state):
            raise UserError(f"{folder} has no moving average, because train.ema_decay is 0; leave out --weights")
        beta1 = None if weights == "trained" else _beta1_of(folder, state)
        for name in sorted(shapes):
            sources = [f"master/{name}"] if weights == "trained" else [f"{EMA_PREFIX}{name}", f"master/{name}"]
            if key := next((source for source in sources if source in state.entries), None):
                tensor = state.read(key)
                _check_dtype(folder, key, tensor)
                tensors[name] = convert(name, _averaged_with_z(folder, state, name, tensor, beta1))
        for name, file in _weight_files(folder).items():
            if name in tensors:
                continue
            tensor, remainder = file.read(name), f"remainder/{name}"
            _check_dtype(folder, name, tensor)
            if remainder in state.entries:
                rest = state.read(remainder)
                is_rest = rest.shape == tensor.shape and rest.dtype in (torch.int16, torch.int8)
                if not is_rest or tensor.dtype == torch.float32:
                    raise UserError(f"{folder}: {remainder} is {_form(rest)}, which completes no weight")
                tensor = join(tensor, rest)
            tensors[name] = convert(name, _averaged_with_z(folder, state, name, tensor, beta1))
        if misfit := _misfit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes):
            raise UserError(
                f"{folder}: {misfit}, so it does not fit the UNet that model.base names; restore the base that the run "
                "was trained from"
            )
        return tensors


def has_averages(folder: Path) -> bool:
    """Return whether a checkpoint has averages of its weights."""
    return _is_averaged(_open_tensors(folder, "state.safetensors"))


def _is_averaged(state: TensorFile) -> bool:
    return any(key.startswith((EMA_PREFIX, Z_PREFIX)) for key in state.entries)


def _beta1_of(folder: Path, state: TensorFile) -> float | None:
    """Return what a schedule-free optimizer's averages are computed with, None for another optimizer's state."""
    if BETA1 not in state.entries:
        return None
    beta1 = state.read(BETA1)
    if beta1.shape != () or not 0 < float(beta1) < 1:
        raise UserError(f"{folder}: {BETA1} is {_form(beta1)}, no number between 0 and 1; use another checkpoint")
    return float(beta1)


def _averaged_with_z(folder: Path, state: TensorFile, name: str, tensor: Tensor, beta1: float | None) -> Tensor:
    """Return the average of a weight that was trained by a schedule-free optimizer; other weights as they are."""
    if beta1 is None or f"{Z_PREFIX}{name}" not in state.entries:
        return tensor
    z = state.read(f"{Z_PREFIX}{name}")
    try:
        check_form(name, z, tensor.shape)
    except UserError as error:
        raise UserError(f"{folder}: {error}; use another checkpoint") from None
    return average_of(tensor, z, beta1)


@torch.no_grad()
def load_averages(folder: Path, unet: nn.Module) -> None:
    """Overwrite a UNet's weights by a checkpoint's averages, if the checkpoint has any.

    Raises UserError for averages that are not of these weights.
    """
    parameters, state = dict(unet.named_parameters()), _open_tensors(folder, "state.safetensors")
    beta1, files = _beta1_of(folder, state), None
    for key in state.entries:
        prefix = next((prefix for prefix in (EMA_PREFIX, Z_PREFIX) if key.startswith(prefix)), None)
        if prefix is None:
            continue
        name = key.removeprefix(prefix)
        if name not in parameters:
            raise UserError(f"{folder} has a moving average of {name}, which this UNet does not have")
        if prefix == Z_PREFIX:
            # not the UNet's own weight, which may have been rounded to another dtype
            files = files or _weight_files(folder)
            held = {f"master/{name}": state} if f"master/{name}" in state.entries else {name: files.get(name)}
            source, file = next(iter(held.items()))
            if file is None:
                raise UserError(f"{folder} has no weight of {name}, but an average of it; use another checkpoint")
            y = file.read(source)
            parameters[name].copy_(_averaged_with_z(folder, state, name, y, beta1))
            continue
        average = state.read(key)
        try:
            check_form(name, average, parameters[name].shape)
        except UserError as error:
            raise UserError(f"{folder}: {error}; use another checkpoint") from None
        parameters[name].copy_(average)


def _open_tensors(folder: Path, name: str) -> TensorFile:
    """Return the .safetensors file `name` of a checkpoint's folder. Raises UserError, naming it, if it is damaged."""
    path = path_in(folder, name)
    try:
        return TensorFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; use another checkpoint") from None
    except (UnsafeFile, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); use another checkpoint") from None


def _weight_files(folder: Path) -> dict[str, TensorFile]:
    """Return the file of each of a checkpoint's weights, by the weight's name. Raises UserError for a damaged one."""
    files: dict[str, TensorFile] = {}
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        file = _open_tensors(folder, f"{FOLDER}/{path.name}")
        if twice := sorted(file.entries.keys() & files.keys()):
            raise UserError(
                f"{path} has {twice[0][:80]}, which is also in {files[twice[0]].path.name}; use another checkpoint"
            )
        files |= dict.fromkeys(file.entries, file)
    return files


def _misfit(found: Shapes, shapes: Shapes) -> str:
    """Return why the tensors found in a checkpoint are not those of a UNet, '' if they are. shapes: the UNet's."""
    if missing := sorted(shapes.keys() - found.keys()):
        return f"it lacks {missing[0]}"
    if others := sorted(found.keys() - shapes.keys()):
        return f"it also has {others[0][:80]}"
    wrong = (f"{name} is {found[name]}, not {shape}" for name, shape in shapes.items() if found[name] != shape)
    return next(wrong, "")


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _check_dtype(folder: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in WEIGHT_DTYPES:
        raise UserError(f"{folder}: {name} is {_form(tensor)}, which is no weight of a checkpoint (fp32, bf16 or fp16)")
