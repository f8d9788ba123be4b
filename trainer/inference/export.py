"""`safelight export`: a run's model as a diffusers folder, or as one file in the original layout for A1111 and ComfyUI.

Weights of the UNet come from the checkpoint, the moving average where it has one, else the fp32 master where it has one, in
the dtype asked for; the frozen parts are the run's. Either output is written beside its place and renamed into it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.data.atomic import atomic_write_text, sync_folder
from safelight.errors import UserError
from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint.files import check_files, folder_of
from safelight.trainer.config.toml import Config, load_config, require_run
from safelight.trainer.families.family import Family
from safelight.trainer.families.original_layout import (
    to_original,
    unet_layout,
    vae_layout,
)
from safelight.trainer.inference.draw import pick_step
from safelight.trainer.inference.modelspec import CUSTOM, modelspec, sign
from safelight.trainer.models.base import PICKLES, Base, base_of
from safelight.trainer.models.device import DTYPES
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_text, load_vae, meta_unet
from safelight.units import GIB

# free space to leave beside the file: file systems slow down and fail before they are full
SPARE_BYTES = 64 << 20


@dataclass
class Exported:
    """What was written. notes: what its user should know, a line each."""

    path: Path
    step: int
    num_bytes: int
    notes: list[str] = field(default_factory=list)


@dataclass
class _Source:
    """A run's model, its parts loaded when they are asked for. prediction_type: what the run trained.

    weights: auto, the moving average where there is one; ema; trained, the last step's.
    """

    config: Config
    base: Base
    checkpoint: Path
    step: int
    prediction_type: str
    dtype: torch.dtype
    weights: str

    def unet(self) -> nn.Module:
        """Return the trained UNet in the dtype asked for. Its memory is allocated one tensor at a time."""
        unet = meta_unet(self.base)
        shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
        convert = partial(_cast, dtype=self.dtype)
        unet.load_state_dict(FullFineTune(unet).merged(self.checkpoint, shapes, self.weights, convert), assign=True)
        return unet

    def vae(self) -> nn.Module:
        return load_vae(self.base, self.config.model.vae, self.config.run.seed)

    def text(self) -> tuple[object, nn.Module]:
        return load_text(self.base, self.config.model.tokenizer, self.config.run.seed)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and not torch.isfinite(cast).all():
        raise UserError(f"{name} reaches {tensor.abs().max():.3g}, above fp16's 65504; use --dtype bf16")
    return cast


def _cast_all(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a module's tensors in dtype; ids and other integers as they are."""
    return {k: _cast(k, t, dtype) if t.is_floating_point() else t for k, t in module.state_dict().items()}


def export(
    run_dir: Path,
    out: Path,
    checkpoint: str = "last",
    dtype: str = "fp16",
    title: str = "",
    force: bool = False,
    weights: str = "auto",
) -> Exported:
    """Write a run's model to `out`: one file if that ends in .safetensors, a diffusers folder otherwise.

    checkpoint: last, best or a step. title: '' for the run's name and step. weights: auto, the moving average where the
    run keeps one; ema; trained. Raises UserError, one line.
    """
    require_run(run_dir)
    is_file = _check_place(out, force)
    config = load_config(run_dir / "config.toml")
    step = pick_step(run_dir, checkpoint, has_base=False)
    folder = folder_of(run_dir, step)
    check_files(folder)
    base = base_of(config.model)
    prediction = make_schedule(base.config_of("scheduler"), config.loss.prediction).prediction_type
    source = _Source(config, base, folder, step, prediction, DTYPES[dtype], weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    if is_file:
        notes = _export_file(source, out, title or f"{run_dir.resolve().name} step {step}")
        num_bytes = out.stat().st_size
    else:
        _export_folder(source, out)
        notes, num_bytes = [], sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if config.train.ema_decay > 0:
        notes.append("the weights of the last step" if weights == "trained" else "the moving average of the weights")
    if skip := config.model.clip_skip:
        notes.append(
            f"trained with clip_skip {skip}: draw with diffusers' clip_skip={skip}, A1111's Clip skip {skip + 1}"
        )
    return Exported(out, step, num_bytes, notes)


def _check_place(out: Path, force: bool) -> bool:
    """Return whether `out` is to be one file. Raises UserError for a place that may not be taken."""
    suffix = out.suffix.lower()
    if suffix in PICKLES:
        raise UserError(f"{out}: only .safetensors files and diffusers folders are written, no {suffix}")
    is_file = suffix == ".safetensors"
    if out.exists():
        if not force:
            raise UserError(f"{out} exists already; name another with -o, or add --force")
        if is_file != out.is_file():
            raise UserError(f"{out} is a {'file' if out.is_file() else 'folder'}; name another with -o")
        if not is_file and any(out.iterdir()) and not (out / "model_index.json").is_file():
            raise UserError(
                f"{out} is a folder, but no diffusers folder, and --force does not delete it; name another with -o"
            )
    return is_file


def _check_room(out: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes + SPARE_BYTES:
        raise UserError(
            f"{out} needs {num_bytes / GIB:.2f} GiB, {out.parent} has {free / GIB:.2f} GiB free; make room, or use --dtype fp16"
        )


# one file


def original_frozen(family: Family, vae: dict[str, Tensor], text_encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an AutoencoderKL and of the family's text encoder as a single file holds them."""
    num_tokens = next(len(t) for name, t in text_encoder.items() if name.endswith("position_embedding.weight"))
    return {
        **to_original(vae, vae_layout(vae)),
        **to_original(text_encoder, family.text_encoder_layout(text_encoder)),
        **family.text_encoder_extras(num_tokens),
    }


def _export_file(source: _Source, out: Path, title: str) -> list[str]:
    notes = []
    unet = source.unet()
    weights = unet.state_dict()
    tensors = to_original(weights, unet_layout(weights, unet.config.layers_per_block))
    vae = source.vae()
    if hasattr(vae, "quant_conv"):
        tensors |= original_frozen(
            source.base.family, _cast_all(vae, source.dtype), _cast_all(source.text()[1], source.dtype)
        )
    else:
        notes.append(
            f"the run's autoencoder is a {type(vae).__name__}, which has no original layout: {out.name} holds the UNet alone"
        )
    description = f"{Path(source.base.spec).name} fine-tuned with Safelight, {source.step} steps"
    metadata = modelspec(unet.config, source.prediction_type, source.config.data.resolution, title, description)
    if metadata["modelspec.architecture"] == CUSTOM:
        notes.append(
            "this UNet has a size of its own, which A1111 and ComfyUI do not know; diffusers reads the file with config=FOLDER"
        )
    elif source.base.family.assumed_prediction not in ("", source.prediction_type):
        notes.append(
            "SD 1.x files are taken for epsilon: for this v model A1111 needs a .yaml beside it, ComfyUI the node ModelSamplingDiscrete"
        )
    if source.config.loss.zero_terminal_snr:
        notes.append("trained with zero terminal SNR, which a file cannot say: set it where you draw")
    _check_room(out, sum(tensor.nbytes for tensor in tensors.values()))
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        # safetensors keeps its files from everybody else
        partial.chmod(mode)
        sign(partial)
        os.replace(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(out.parent)
    return notes


# a folder


def _scheduler(source: _Source):
    """Return the base's scheduler with the prediction that was trained."""
    import diffusers

    # Stable Diffusion's own values of what a config leaves out, which are not diffusers' defaults
    defaults = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    config = {**defaults, **source.base.config_of("scheduler"), "prediction_type": source.prediction_type}
    name = config.get("_class_name", "DDIMScheduler")
    if source.config.loss.zero_terminal_snr:
        # Lin et al. 2023: such a model must be drawn from its last timestep
        name, config = "DDIMScheduler", {**config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return getattr(diffusers, name).from_config(config)


def _load_in_fp32(config_path: Path) -> None:
    """Make fp32 what the text encoder is loaded in by default, as it is for diffusers' parts whatever they are stored in.

    transformers 5 takes the stored dtype instead, and a pipeline opened without a dtype would mix the two and fail.
    """
    config = json.loads(config_path.read_text(encoding="utf-8"))
    name = "dtype" if "dtype" in config else "torch_dtype"
    atomic_write_text(config_path, json.dumps({**config, name: "float32"}, indent=2) + "\n")


def _export_folder(source: _Source, out: Path) -> None:
    unet = source.unet()
    vae, (tokenizer, text_encoder) = source.vae(), source.text()
    for module in (vae, text_encoder):
        module.load_state_dict(_cast_all(module, source.dtype), assign=True)
    modules = (unet, vae, text_encoder)
    _check_room(out, sum(t.nbytes for module in modules for t in module.state_dict().values()))
    pipeline = source.base.family.pipeline_of(unet, vae, _scheduler(source), tokenizer, text_encoder)
    partial, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial, safe_serialization=True)
        _load_in_fp32(partial / "text_encoder" / "config.json")
        mode = (partial / "model_index.json").stat().st_mode
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_dir():
                sync_folder(path)
            else:
                path.chmod(mode)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(partial)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
