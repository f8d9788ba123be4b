"""LoRA: low-rank matrices beside frozen layers of the UNet are trained; a checkpoint holds them in diffusers' format.

A checkpoint's file, adapter/pytorch_lora_weights.safetensors, is one that `load_lora_weights` of diffusers reads, with
peft's names (`unet.LAYER.lora_A.weight`) and peft's config in its metadata. Masters, remainders and averages are in
state.safetensors under the parameters' names in the UNet (`LAYER.adapter.lora_A`), as for every run.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.kernels.unet.low_rank import DropoutKey, LowRank, adapter_of, attach
from safelight.trainer.adapters.full import check_dtype, exact_values, form_of, open_tensors
from safelight.trainer.adapters.trained import InUNet, Shapes
from safelight.trainer.config.schema import Adapter, Config
from safelight.trainer.models.tensor_files import save_file
from safelight.trainer.models.weights import seeded_initialization
from safelight.trainer.registry.adapters import ADAPTERS, TARGETS

WEIGHTS_FILE = ADAPTERS["lora"].weights_file
# diffusers' key of peft's config in a file's metadata
METADATA_KEY = "lora_adapter_metadata"
UNET_PREFIX = "unet."
# names of an adapter's parameters in a file, by their names in the module
FILE_NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
_ATTENTION = re.compile(r".*\.attn\d+\.(to_q|to_k|to_v|to_out\.0)")
_FEED_FORWARD = re.compile(r".*\.ff\.net\.(0\.proj|2)")


class LoRA(InUNet):
    """A UNet whose frozen layers have trained adapters; see Trained. layers: by name, those with an adapter."""

    def __init__(self, unet: nn.Module, settings: Adapter, seed: int):
        self.unet, self.settings = unet, settings
        self.dropout_key = DropoutKey() if settings.dropout else None
        self.layers = targeted(unet, settings.target)
        dtype = next(p.dtype for p in unet.parameters() if p.is_floating_point())
        with seeded_initialization(seed, "lora"):
            for number, layer in enumerate(self.layers.values()):
                adapter = LowRank(
                    layer,
                    settings.rank,
                    scaling_of(settings),
                    dtype=dtype,
                    dropout=settings.dropout,
                    dora=settings.dora,
                    number=number,
                    key=self.dropout_key,
                )
                attach(layer, adapter)
        self.lr_factors = dict.fromkeys(self._parameters(), 1.0)

    @classmethod
    def of(cls, unet: nn.Module, config: Config) -> LoRA:
        return cls(unet, config.adapter, config.run.seed)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapters' parameters by their names in the UNet."""
        return {
            f"{layer_name}.adapter.{name}": parameter
            for layer_name, layer in self.layers.items()
            for name, parameter in adapter_of(layer).named_parameters()
        }

    def mark(self) -> None:
        self.unet.requires_grad_(False)
        for parameter in self._parameters().values():
            parameter.requires_grad_(True)

    def set_factor(self, factor: float) -> None:
        """Multiply what the adapters add by a factor, as diffusers' and A1111's weight of a LoRA does."""
        for layer in self.layers.values():
            adapter_of(layer).factor = factor

    def describe(self) -> str:
        settings = self.settings
        num = sum(parameter.numel() for parameter in self._parameters().values())
        num_unet = sum(parameter.numel() for parameter in self.unet.parameters()) - num
        kind = ("rank-stabilized " if settings.rslora else "") + ("DoRA" if settings.dora else "LoRA")
        return (
            f"training a {kind} of rank {settings.rank}, alpha {alpha_of(settings):g}, on {len(self.layers)} layers "
            f"({', '.join(settings.target)}): {num:,} parameters beside {num_unet:,} frozen ones"
            + (f", whose layers are held in {settings.base}" if settings.quantized_base else "")
        )

    def tensors(self) -> dict[str, Tensor]:
        return {file_name(name): parameter.detach() for name, parameter in self._parameters().items()}

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        path = folder / WEIGHTS_FILE
        path.parent.mkdir()
        save_file(dict(tensors), path, metadata=self.file_metadata())

    def file_metadata(self) -> dict[str, str]:
        """Return the metadata of diffusers' file: peft's LoraConfig, its keys prefixed by the part of the model."""
        return {"format": "pt", METADATA_KEY: json.dumps(peft_config(self.settings, list(self.layers)), sort_keys=True)}

    def load(self, folder: Path) -> None:
        file = open_tensors(folder, WEIGHTS_FILE)
        found = {name: entry.shape for name, entry in file.entries.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        if found != expected:
            name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise UserError(
                f"checkpoint {folder} does not fit this run's LoRA: {name[:100]} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'nothing')}; set model.base and [adapter] to those it was trained with"
            )
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                tensor = file.read(file_name(name))
                check_dtype(folder, name, tensor)
                parameter.copy_(tensor)

    def values(self, folder: Path, weights: str) -> dict[str, Tensor]:
        """Return a checkpoint's adapters in fp32, by their names in the UNet. weights: as in `Trained.merged`."""
        file = open_tensors(folder, WEIGHTS_FILE)
        stored = {name: (file, file_name(name)) for name in self._parameters()}
        if missing := sorted(key for _, key in stored.values() if key not in file.entries):
            raise UserError(f"{folder} lacks {missing[0]}; use another checkpoint")
        found = {name: tensor.float() for name, tensor in exact_values(folder, stored, weights)}
        for name, parameter in self._parameters().items():
            if found[name].shape != parameter.shape:
                raise UserError(f"{folder}: {name} is {form_of(found[name])}, not {tuple(parameter.shape)}")
        return found

    @torch.no_grad()
    def merged(
        self, folder: Path, shapes: Shapes, weights: str, convert: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        for name, value in self.values(folder, weights).items():
            self.unet.get_parameter(name).data = value
        adapters = {f"{name}.weight": adapter_of(layer) for name, layer in self.layers.items()}
        tensors, base = {}, self.unet.state_dict()
        for name in shapes:
            tensor = base[name]
            if adapter := adapters.get(name):
                tensor = adapter.merged(tensor.float())
            tensors[name] = convert(name, tensor)
        return tensors


def alpha_of(settings: Adapter) -> float:
    """Return adapter.alpha, or the rank if it is 0."""
    return settings.alpha or float(settings.rank)


def scaling_of(settings: Adapter) -> float:
    """Return what the product of both matrices is multiplied by, as peft does."""
    return alpha_of(settings) / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def file_name(parameter: str) -> str:
    """Return the name in a file of a parameter of the UNet's adapters."""
    layer, _, name = parameter.rpartition(".adapter.")
    return f"{UNET_PREFIX}{layer}.{FILE_NAMES[name]}"


def targeted(unet: nn.Module, target: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers, by name, that adapter.target names. Raises UserError for an entry that names none."""
    candidates = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    chosen: set[str] = set()
    for entry in target:
        names = {name for name, layer in candidates.items() if _fits(entry, name, layer)}
        if not names:
            example = next((name for name in candidates if _ATTENTION.fullmatch(name)), next(iter(candidates)))
            nearest = difflib.get_close_matches(entry, TARGETS, n=1)
            hint = f"the nearest name is {nearest[0]}; " if nearest else ""
            raise UserError(
                f"adapter.target {entry!r} names no linear layer and no convolution of this UNet; {hint}use "
                f"{', '.join(TARGETS)}, or a pattern such as *.attn2.to_* that fits names such as {example}"
            )
        chosen |= names
    return {name: layer for name, layer in candidates.items() if name in chosen}


def _fits(entry: str, name: str, layer: nn.Module) -> bool:
    if entry == "attention":
        return _ATTENTION.fullmatch(name) is not None
    if entry == "feed-forward":
        return _FEED_FORWARD.fullmatch(name) is not None
    if entry in ("linear", "convolution"):
        return isinstance(layer, nn.Linear if entry == "linear" else nn.Conv2d)
    return fnmatch.fnmatchcase(name, entry)


def peft_config(settings: Adapter, layers: Sequence[str]) -> dict:
    """Return peft's LoraConfig as diffusers keeps it in a file, for adapters on these layers."""
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha_of(settings),
        lora_dropout=settings.dropout,
        target_modules=list(layers),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
    )
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {f"{UNET_PREFIX}{key}": value for key, value in values.items()}
