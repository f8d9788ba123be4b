"""The files of a LoRA for other programs: diffusers' and peft's, or kohya's, which A1111, Forge and ComfyUI read.

    diffusers   unet.LAYER.lora_A.weight, .lora_B.weight, .lora_magnitude_vector; peft's config in the metadata
    kohya       lora_unet_LAYER.lora_down.weight, .lora_up.weight, .alpha, .dora_scale; ss_* in the metadata

kohya's names of layers are diffusers' for SD 1.x and 2.x and those of the original files for SDXL, with `_` for `.`.
Its readers multiply by alpha / rank: a rank-stabilized LoRA, whose factor is alpha / sqrt(rank), has its alpha
multiplied by sqrt(rank) there. DoRA's magnitude is `dora_scale`, (out, 1) or (out, 1, 1, 1), as LyCORIS writes it.
Source: kohya-ss/sd-scripts, networks/lora.py and library/sdxl_model_util.py; KohakuBlueleaf/LyCORIS; ComfyUI,
comfy/lora.py and comfy/weight_adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from safelight.trainer.adapters.lora import LoRA, alpha_of, file_name, scaling_of
from safelight.trainer.config.schema import Adapter, Config
from safelight.trainer.families.family import Family
from safelight.trainer.families.original_layout import UNET_PREFIX, Layout, unet_layout
from safelight.trainer.models.base import Base

FORMATS = ("diffusers", "kohya")
KOHYA_PREFIX = "lora_unet_"


class LoRAFile:
    """A checkpoint's LoRA as the tensors and metadata of a file for other programs."""

    def __init__(self, trained: LoRA, config: Config, base: Base):
        self._trained, self._config, self._base = trained, config, base

    def tensors(self, folder: Path, weights: str, layout: str) -> dict[str, Tensor]:
        """Return the file's tensors in fp32. weights: as in `Trained.merged`. layout: one of FORMATS."""
        values = self._trained.values(folder, weights)
        if layout == "kohya":
            unet = self._trained.unet
            names = [name for name in unet.state_dict() if ".adapter." not in name]
            layout_of_unet = unet_layout(names, unet.config.layers_per_block)
            return kohya_tensors(values, self._config.adapter, self._base.family, layout_of_unet)
        return {file_name(name): value for name, value in values.items()}

    def metadata(self, layout: str, step: int) -> dict[str, str]:
        """Return what the file says of itself besides ModelSpec's fields."""
        if layout == "diffusers":
            return self._trained.file_metadata()
        config, adapter = self._config, self._config.adapter
        arguments = {"dora_wd": "True"} if adapter.dora else {}
        if any(layer.weight.dim() == 4 for layer in self._trained.layers.values()):
            arguments |= {"conv_dim": str(adapter.rank), "conv_alpha": f"{kohya_alpha(adapter):g}"}
        return {
            "ss_network_module": "lycoris.kohya" if adapter.dora else "networks.lora",
            "ss_network_dim": str(adapter.rank),
            "ss_network_alpha": f"{kohya_alpha(adapter):g}",
            "ss_network_dropout": f"{adapter.dropout:g}",
            "ss_network_args": json.dumps(arguments),
            "ss_base_model_version": self._base.family.kohya_version,
            "ss_sd_model_name": Path(self._base.spec).name,
            "ss_v2": str(self._base.family.kohya_version.startswith("sd_v2")),
            "ss_resolution": f"({config.data.max_resolution}, {config.data.max_resolution})",
            "ss_learning_rate": f"{config.optimizer.lr:g}",
            "ss_unet_lr": f"{config.optimizer.lr:g}",
            "ss_optimizer": config.optimizer.name,
            "ss_seed": str(config.run.seed),
            "ss_steps": str(step),
            "ss_batch_size_per_device": str(config.train.batch_size),
            "ss_gradient_accumulation_steps": str(config.train.accumulate),
            "ss_output_name": Path(config.run.dir).name,
            "ss_training_comment": "trained with Safelight",
        }


def kohya_alpha(adapter: Adapter) -> float:
    """Return the alpha that kohya's readers, which divide by the rank, need for the run's factor."""
    return scaling_of(adapter) * adapter.rank if adapter.rslora else alpha_of(adapter)


def kohya_name(layer: str, family: Family, layout: Layout) -> str:
    """Return kohya's name of a UNet's layer. layout: of all the UNet's tensors."""
    if family.kohya_uses_original_names:
        layer = layout[f"{layer}.weight"].name.removeprefix(UNET_PREFIX).removesuffix(".weight")
    return KOHYA_PREFIX + layer.replace(".", "_")


def kohya_tensors(values: Mapping[str, Tensor], adapter: Adapter, family: Family, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of kohya's file.

    values: adapters by their parameters' names in the UNet. layout: of all the UNet's tensors.
    """
    tensors: dict[str, Tensor] = {}
    for layer in dict.fromkeys(name.partition(".adapter.")[0] for name in values):
        own = {name: values.get(f"{layer}.adapter.{name}") for name in ("lora_A", "lora_B", "lora_magnitude_vector")}
        name = kohya_name(layer, family, layout)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = own["lora_A"], own["lora_B"]
        tensors[f"{name}.alpha"] = torch.tensor(kohya_alpha(adapter))
        if (magnitude := own["lora_magnitude_vector"]) is not None:
            tensors[f"{name}.dora_scale"] = magnitude.reshape(-1, *[1] * (own["lora_A"].dim() - 1))
    return tensors
