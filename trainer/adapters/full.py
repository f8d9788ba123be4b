"""Full fine-tuning: the UNet's own parameters are trained, all or those of train.layers.

A checkpoint holds the whole UNet in diffusers' format, whatever is trained of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.optim.split_weights import join
from safelight.trainer.adapters.trained import InUNet, Shapes
from safelight.trainer.config.schema import Config
from safelight.trainer.distributed.sharded import local, piece_of
from safelight.trainer.models.tensor_files import TensorFile, save_file
from safelight.trainer.optim.ema import PREFIX as EMA_PREFIX
from safelight.trainer.optim.ema import check_form
from safelight.trainer.optim.schedule_free import BETA1, Z_PREFIX, average_of
from safelight.trainer.registry.layers import lr_factors
from safelight.untrusted import UnsafeFile, path_in

FOLDER = "unet"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FullFineTune(InUNet):
    """A UNet whose own weights are trained; see Trained. Its files: unet/config.json and one file of weights beside it.

    layers: as train.layers. Raises UserError for one that fits no parameter.
    """

    dropout_key = None

    def __init__(self, unet: nn.Module, layers: Sequence[str] = ()):
        self.unet, self.layers = unet, layers
        self.lr_factors = lr_factors([name for name, _ in unet.named_parameters()], layers)

    @classmethod
    def of(cls, unet: nn.Module, config: Config) -> FullFineTune:
        return cls(unet, config.train.layers)

    def mark(self) -> None:
        for name, p in self.unet.named_parameters():
            p.requires_grad_(name in self.lr_factors)

    def describe(self) -> str:
        sizes = {name: p.numel() for name, p in self.unet.named_parameters()}
        num_trained, num = sum(sizes[name] for name in self.lr_factors), sum(sizes.values())
        factors = sorted(set(self.lr_factors.values()))
        if num_trained == num and factors == [1.0]:
            return ""
        shown = " to ".join(f"{factor:g}" for factor in dict.fromkeys((factors[0], factors[-1])))
        rates = "" if factors == [1.0] else f", at {shown} times the learning rate"
        return f"{num_trained:,} of the UNet's {num:,} parameters are trained ({', '.join(self.layers)}){rates}"

    def set_factor(self, factor: float) -> None:
        raise NotImplementedError("a UNet's own weights cannot be scaled")

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
                check_dtype(folder, name, tensor)
                local(weight).copy_(piece_of(tensor, weight))

    def merged(
        self, folder: Path, shapes: Shapes, weights: str, convert: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        stored = {name: (file, name) for name, file in _weight_files(folder).items()}
        # of a checkpoint with masters, the names come from the base
        values = exact_values(folder, {**dict.fromkeys(sorted(shapes)), **stored}, weights)
        tensors = {name: convert(name, tensor) for name, tensor in values}
        if misfit := _misfit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes):
            raise UserError(
                f"{folder}: {misfit}, so it does not fit the UNet that model.base names; restore the base that the run "
                "was trained from"
            )
        return tensors


def exact_values(
    folder: Path, stored: Mapping[str, tuple[TensorFile, str] | None], weights: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter's name, value) of a checkpoint's weights, as exactly as it holds them, read one at a time.

    stored: where each weight is: the file and its name in it, None for one that only state.safetensors may have.
    weights: as in `Trained.merged`. Raises UserError for a damaged checkpoint, or if there is no average to take.
    """
    state = open_tensors(folder, "state.safetensors")
    if weights == "ema" and not _is_averaged(state):
        raise UserError(f"{folder} has no moving average, because train.ema_decay is 0; leave out --weights")
    beta1 = None if weights == "trained" else _beta1_of(folder, state)
    for name, place in stored.items():
        sources = [f"master/{name}"] if weights == "trained" else [f"{EMA_PREFIX}{name}", f"master/{name}"]
        if key := next((source for source in sources if source in state.entries), None):
            tensor = state.read(key)
            check_dtype(folder, key, tensor)
            yield name, _averaged_with_z(folder, state, name, tensor, beta1)
            continue
        if place is None:
            continue
        file, key = place
        tensor, remainder = file.read(key), f"remainder/{name}"
        check_dtype(folder, name, tensor)
        if remainder in state.entries:
            rest = state.read(remainder)
            is_rest = rest.shape == tensor.shape and rest.dtype in (torch.int16, torch.int8)
            if not is_rest or tensor.dtype == torch.float32:
                raise UserError(f"{folder}: {remainder} is {form_of(rest)}, which completes no weight")
            tensor = join(tensor, rest)
        yield name, _averaged_with_z(folder, state, name, tensor, beta1)


def has_averages(folder: Path) -> bool:
    """Return whether a checkpoint has averages of its weights."""
    return _is_averaged(open_tensors(folder, "state.safetensors"))


def _is_averaged(state: TensorFile) -> bool:
    return any(key.startswith((EMA_PREFIX, Z_PREFIX)) for key in state.entries)


def _beta1_of(folder: Path, state: TensorFile) -> float | None:
    """Return what a schedule-free optimizer's averages are computed with, None for another optimizer's state."""
    if BETA1 not in state.entries:
        return None
    beta1 = state.read(BETA1)
    if beta1.shape != () or not 0 < float(beta1) < 1:
        raise UserError(f"{folder}: {BETA1} is {form_of(beta1)}, no number between 0 and 1; use another checkpoint")
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
    parameters, state = dict(unet.named_parameters()), open_tensors(folder, "state.safetensors")
    beta1, files = _beta1_of(folder, state), None
    for key in state.entries:
        prefix = next((prefix for prefix in (EMA_PREFIX, Z_PREFIX) if key.startswith(prefix)), None)
        if prefix is None:
            continue
        name = key.removeprefix(prefix)
        if name not in parameters:
            raise UserError(f"{folder} has a moving average of {name}, which this UNet does not have")
        if prefix == Z_PREFIX:
            # the UNet's own weight may have been rounded to another dtype; an adapter's has not
            files = _weight_files(folder) if files is None else files
            y = parameters[name]
            if f"master/{name}" in state.entries:
                y = state.read(f"master/{name}")
            elif name in files:
                y = files[name].read(name)
            parameters[name].copy_(_averaged_with_z(folder, state, name, y, beta1))
            continue
        average = state.read(key)
        try:
            check_form(name, average, parameters[name].shape)
        except UserError as error:
            raise UserError(f"{folder}: {error}; use another checkpoint") from None
        parameters[name].copy_(average)


def open_tensors(folder: Path, name: str) -> TensorFile:
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
        file = open_tensors(folder, f"{FOLDER}/{path.name}")
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


def form_of(tensor: Tensor) -> str:
    """Return a tensor's shape and dtype, for messages."""
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def check_dtype(folder: Path, name: str, tensor: Tensor) -> None:
    """Raise UserError unless a tensor has a dtype that a checkpoint's weights have."""
    if tensor.dtype not in WEIGHT_DTYPES:
        raise UserError(
            f"{folder}: {name} is {form_of(tensor)}, which is no weight of a checkpoint (fp32, bf16 or fp16)"
        )
