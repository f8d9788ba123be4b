"""Export of the whole model: one file for A1111 and ComfyUI, or a diffusers folder. A LoRA is merged into it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError, first_line
from safelight.trainer.config.schema import Config
from safelight.trainer.families.family import Family, tokenizer_folder
from safelight.trainer.families.original_layout import to_original, unet_layout, vae_layout
from safelight.trainer.families.registry import FAMILIES
from safelight.trainer.inference.export_place import FolderKind, check_free_space, replace_file, replace_folder
from safelight.trainer.inference.export_source import Source, cast_all
from safelight.trainer.inference.model_card import CARD_NAME, SAMPLES_NAME
from safelight.trainer.inference.modelspec import CUSTOM, modelspec
from safelight.trainer.models.single_file import ZERO_SNR_MARKER, schedule_markers

_TEXT_ENCODERS = {part for family in FAMILIES.values() for part in family.text_encoders}
_TOKENIZERS = {tokenizer_folder(part) for part in _TEXT_ENCODERS}
_NAMES = {"model_index.json", "unet", "vae", "scheduler", *_TEXT_ENCODERS, *_TOKENIZERS, CARD_NAME, SAMPLES_NAME}


class ModelExport:
    """The UNet, the autoencoder and the text encoders of a run; see Export."""

    folder = FolderKind("diffusers folder", "model_index.json", frozenset(_NAMES))
    default_dtype = "fp16"
    relation, tag = "finetune", ""

    def write_file(self, source: Source, out: Path, title: str, layout: str) -> list[str]:
        notes: list[str] = []
        unet = source.unet()
        weights = unet.state_dict()
        tensors = to_original(weights, unet_layout(weights, unet.config.layers_per_block))
        vae = source.vae()
        if hasattr(vae, "quant_conv"):
            family = source.base.family
            states = [cast_all(text_encoder, source.dtype) for _, text_encoder in source.texts()]
            text_encoders = dict(zip(family.text_encoders, states, strict=True))
            tensors |= original_frozen(family, cast_all(vae, source.dtype), text_encoders)
        else:
            notes.append(
                f"the run's autoencoder is a {type(vae).__name__}, which single files cannot contain: {out.name} "
                "contains only the UNet"
            )
        base = source.base
        description = f"{Path(base.spec).name} ({base.family.title}) fine-tuned with Safelight, {source.step} steps"
        schedule = source.schedule
        # the specification has no field for it
        hint = "zero terminal SNR: rescale the noise schedule" if schedule.zero_terminal_snr else ""
        metadata = modelspec(
            unet.config, schedule.prediction_type, source.config.data.max_resolution, title, description, hint
        )
        tensors |= {name: torch.empty(0, dtype=source.dtype) for name in schedule_markers(schedule)}
        notes += _remarks(source, is_custom=metadata["modelspec.architecture"] == CUSTOM)
        check_free_space(out, sum(tensor.nbytes for tensor in tensors.values()), source.dtype)
        replace_file(out, tensors, metadata)
        return notes

    def write_folder(self, source: Source, out: Path, title: str, describe: Callable[[Path], object]) -> list[str]:
        unet = source.unet()
        vae, texts = source.vae(), source.texts()
        frozen = [vae, *(text_encoder for _, text_encoder in texts)]
        for module in frozen:
            module.load_state_dict(cast_all(module, source.dtype), assign=True)
        modules = (unet, *frozen)
        check_free_space(out, sum(t.nbytes for module in modules for t in module.state_dict().values()), source.dtype)
        base = source.base
        pipeline = base.family.pipeline_of(
            unet, vae, _scheduler(source), texts, zeroes_empty_text=base.zeroes_empty_text
        )

        def write(partial: Path) -> None:
            pipeline.save_pretrained(partial, safe_serialization=True)
            for folder in base.family.text_encoders:
                _load_in_fp32(partial / folder / "config.json")
            describe(partial)

        replace_folder(out, write)
        return []

    def next_step(self, out: Path, layout: str, notes: list[str]) -> str:
        if out.is_dir():
            return f"in Python: DiffusionPipeline.from_pretrained({str(out)!r})"
        return "" if notes else "copy it to A1111's models/Stable-diffusion or ComfyUI's models/checkpoints"

    def trained(self, config: Config) -> str:
        if config.adapter.spec.needs_base:
            return "a LoRA, merged into the UNet"
        return "the UNet and the text encoder" if config.text_encoder.train else "the UNet"

    def usage(self, config: Config, name: str, is_file: bool, dtype: str) -> str:
        if is_file:
            return f"Copy `{name}` to A1111's `models/Stable-diffusion` or ComfyUI's `models/checkpoints`."
        arguments = [f"num_inference_steps={config.sample.steps}", f"guidance_scale={config.sample.cfgs[0]:g}"]
        arguments += [f"clip_skip={config.model.clip_skip}"] if config.model.clip_skip else []
        torch_dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype]
        return (
            "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("PATH_OR_ID", torch_dtype=torch.{torch_dtype}).to("cuda")\n'
            f'image = pipeline("a photograph of a barn", {", ".join(arguments)}).images[0]\n```'
        )


def _remarks(source: Source, is_custom: bool) -> Iterator[str]:
    """Yield what its user has to know or set in other programs. is_custom: whether the UNet has an unusual size."""
    schedule = source.schedule
    if is_custom:
        yield "this UNet has a size that A1111 and ComfyUI do not support; diffusers reads the file with config=FOLDER"
    elif source.base.family.assumed_prediction not in ("", schedule.prediction_type):
        yield (
            "A1111 and ComfyUI assume that SD 1.x files predict epsilon, but this one predicts v: A1111 needs a .yaml "
            "next to it, ComfyUI the node ModelSamplingDiscrete"
        )
    if schedule.zero_terminal_snr:
        yield (
            f"trained with zero terminal SNR, which the file says by a tensor named {ZERO_SNR_MARKER}: A1111, Forge "
            "and `safelight train` heed it; in ComfyUI turn on zsnr in the node ModelSamplingDiscrete, in diffusers "
            "set rescale_betas_zero_snr"
        )


def original_frozen(
    family: Family, vae: dict[str, Tensor], text_encoders: Mapping[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors of an AutoencoderKL and the text encoders under the names of a single file.

    text_encoders: by folder, as in family.text_encoders.
    """
    original = to_original(vae, vae_layout(vae))
    for part, state in text_encoders.items():
        num_tokens = next(len(t) for name, t in state.items() if name.endswith("position_embedding.weight"))
        original |= to_original(state, family.text_encoder_layout(part, state))
        original |= family.text_encoder_extras(part, num_tokens)
    return original


def _scheduler(source: Source):
    """Return the base's scheduler with the prediction type and the terminal SNR that were trained.

    It is a DDIMScheduler if the base's cannot have zero terminal SNR. Raises UserError if its config is not valid.
    """
    import diffusers

    # Stable Diffusion's values for what a config leaves out; diffusers' defaults differ
    defaults = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    own = source.base.config_of("scheduler")
    config = {**defaults, **own, "prediction_type": source.schedule.prediction_type}
    kind = getattr(diffusers, config.get("_class_name", "DDIMScheduler"), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UserError(f"{source.base.spec}: its scheduler is {own['_class_name']!r}, which diffusers does not have")
    if source.schedule.zero_terminal_snr:
        # Lin et al. 2023: sampling must start at the last timestep
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
            kind = diffusers.DDIMScheduler
    try:
        return kind.from_config(config)
    # values that only this scheduler reads
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{source.base.spec}: its scheduler's config is not valid ({reason}); correct it") from error


def _load_in_fp32(config_path: Path) -> None:
    """Make fp32 the dtype that the text encoder is loaded in by default, which diffusers uses for all other parts.

    transformers 5 defaults to the stored dtype, so a pipeline opened without a dtype would mix the two and fail.
    """
    config = json.loads(config_path.read_text(encoding="utf-8"))
    name = "dtype" if "dtype" in config else "torch_dtype"
    atomic_write_text(config_path, json.dumps({**config, name: "float32"}, indent=2) + "\n")
