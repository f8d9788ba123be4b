"""Export of a LoRA as a file of its own, in diffusers' or kohya's layout (lora_files.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safelight.trainer.adapters.trained import trained_of
from safelight.trainer.config.schema import Config
from safelight.trainer.inference.export_place import check_free_space, replace_file
from safelight.trainer.inference.export_source import Source, cast_to
from safelight.trainer.inference.lora_files import LoRAFile
from safelight.trainer.inference.modelspec import modelspec
from safelight.trainer.models.weights import meta_unet


class LoRAExport:
    """The matrices of a LoRA alone, as one file; see Export."""

    folder = None
    default_dtype = "fp16"
    relation, tag = "adapter", "lora"

    def write_file(self, source: Source, out: Path, title: str, layout: str) -> list[str]:
        config, base = source.config, source.base
        unet = meta_unet(base)
        file = LoRAFile(trained_of(unet, config), config, base)
        origin = f"{source.checkpoint}: "
        values = file.tensors(source.checkpoint, source.weights, layout)
        tensors = {name: cast_to(name, tensor, source.dtype, origin) for name, tensor in values.items()}
        description = (
            f"LoRA for {Path(base.spec).name} ({base.family.title}) trained with Safelight, {source.step} steps"
        )
        metadata = modelspec(
            unet.config, source.schedule.prediction_type, config.data.max_resolution, title, description
        )
        metadata["modelspec.architecture"] += "/lora"
        check_free_space(out, sum(tensor.nbytes for tensor in tensors.values()), source.dtype)
        replace_file(out, tensors, {**metadata, **file.metadata(layout, source.step)})
        return []

    def write_folder(self, source: Source, out: Path, title: str, describe: Callable[[Path], object]) -> list[str]:
        raise NotImplementedError("a LoRA is one file")

    def next_step(self, out: Path, layout: str, notes: list[str]) -> str:
        if layout == "kohya":
            return "copy it to A1111's models/Lora or ComfyUI's models/loras"
        return f"in Python: pipeline.load_lora_weights({str(out)!r}); for A1111 and ComfyUI: --layout kohya"

    def trained(self, config: Config) -> str:
        return "a LoRA"

    def usage(self, config: Config, name: str, is_file: bool, dtype: str) -> str:
        return (
            f'In diffusers, with the base: `pipeline.load_lora_weights("{name}")`. '
            "A1111 and ComfyUI take LoRAs from `models/Lora` and `models/loras`."
        )
