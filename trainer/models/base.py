"""Where the parts of a Stable Diffusion come from: the tiny base, a diffusers folder, a single file, the hub, or nothing.

Here are their configs; trainer/models/weights.py loads them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.data.buckets import Bucket, make_buckets
from safelight.errors import UserError
from safelight.trainer.config.toml import Data, Model
from safelight.trainer.families.family import Family
from safelight.trainer.families.registry import FAMILIES, family_of, trainable_titles
from safelight.trainer.models.architectures import RANDOM_MODELS
from safelight.trainer.models.hub import PARTS, fetch
from safelight.trainer.models.single_file import SingleFile

# a diffusers model's networks by the beginning of their folders' names, autoencoder and safety checker left out
MODEL_PARTS = ("unet", "text_encoder", "transformer", "prior")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def tiny_folder() -> Path:
    """Return the embedded tiny base's folder, in a checkout or an installed wheel."""
    import safelight

    return Path(safelight.__file__).resolve().parent / "tiny"


@dataclass(frozen=True)
class Base:
    """A resolved `model.base`.

    folder: of the configs, the tokenizer, and the weights that no file holds; None for `random:NAME`.
    random_name: '' for a base with weights. file: a single file; setting: the setting that named the folder.
    """

    spec: str
    folder: Path | None
    random_name: str = ""
    file: SingleFile | None = None
    setting: str = ""

    @property
    def from_scratch(self) -> bool:
        return bool(self.random_name)

    @property
    def family(self) -> Family:
        return family_of(self.config_of("unet"))

    def config_of(self, part: str) -> dict:
        """Return the diffusers or transformers config of unet, vae, text_encoder or scheduler."""
        if self.random_name:
            return dict(RANDOM_MODELS[self.random_name][part])
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config = _read_json(self.folder / part / name, self.setting)
        if part == "scheduler" and self.file is not None and self.file.prediction_type:
            config["prediction_type"] = self.file.prediction_type
        return config


def _trainable_parts() -> set[str]:
    """Return the parts of a diffusers model that hold a network which can be trained or is needed for it."""
    return {"unet", *(part for family in FAMILIES.values() if not family.untrainable for part in family.text_encoders)}


def _read_json(path: Path, setting: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{setting}: {path} is missing; a diffusers folder has {path.parent.name}/{path.name}"
        ) from None
    except ValueError as error:
        raise UserError(f"{setting}: {path} is not readable as JSON: {error}") from None


def base_of(model: Model) -> Base:
    """Return where the base of a run's [model] table is. Raises UserError, one line, if it is nowhere, or cannot be trained yet."""
    base = resolve_model(model)
    if base.family.untrainable:
        raise UserError(
            f"model.base {model.base!r} is for `safelight plan` and `safelight bench` alone: {base.family.untrainable}"
        )
    return base


def resolve_model(model: Model) -> Base:
    """As base_of, and for what can be planned alone, too: SDXL."""
    return resolve_base(model.base, model.config, has_vae=bool(model.vae))


def resolve_base(spec: str, config: str = "", has_vae: bool = False) -> Base:
    """Return where a `model.base` is; config: `model.config`; has_vae: an autoencoder is given beside it.

    Raises UserError, one line, if it is nowhere, or of a kind that is not supported.
    """
    setting, suffix = f"model.base {spec!r}", Path(spec).suffix.lower()
    if suffix == ".safetensors" and not Path(spec).is_dir():
        return _resolve_file(SingleFile(Path(spec), "model.base"), spec, config, has_vae)
    if config:
        raise UserError(f"model.config {config!r} is for a single .safetensors file; {setting} is none, leave it empty")
    if spec == "tiny":
        return Base(spec, tiny_folder(), setting=setting)
    if spec.startswith("random:"):
        name = spec.removeprefix("random:")
        if name not in RANDOM_MODELS:
            raise UserError(f"{setting} is unknown; use one of {', '.join('random:' + n for n in RANDOM_MODELS)}")
        return Base(spec, None, name, setting=setting)
    if Path(spec).is_file() or suffix in PICKLES:
        raise UserError(
            f"{setting} is no .safetensors file; other formats can run code and are never opened: convert it first"
        )
    return Base(spec, _diffusers_folder(spec, "model.base", "give a diffusers folder", PARTS), setting=setting)


def _resolve_file(file: SingleFile, spec: str, config: str, has_vae: bool) -> Base:
    """Return the base of a single file, with the folder of all that it does not hold."""
    file.check_base()
    lacking = [part for part, there in (("vae", file.has_vae), ("text_encoder", file.has_text_encoder)) if not there]
    if not config:
        if file.family is None:
            raise UserError(
                f"{file} attends to width {file.text_width}, not to 768 (1.x) or 1024 (2.x); "
                "set model.config to the diffusers folder it was made from"
            )
        if file.family.default_configs is None:
            raise UserError(
                f"{file} is {file.family.title}, whose weights do not tell whether they predict epsilon or v; "
                "set model.config to the diffusers folder or hub id of the one it comes from"
            )
        if "text_encoder" in lacking:
            raise UserError(
                f"{file} holds no text encoder; set model.config to a diffusers folder or hub id that has it"
            )
        if "vae" in lacking and not has_vae:
            raise UserError(
                f"{file} holds no autoencoder; set model.vae to one, or model.config to a folder that has one"
            )
    if config == "tiny":
        return Base(spec, tiny_folder(), file=file, setting="model.config 'tiny'")
    wanted = [part for part in lacking if not (part == "vae" and has_vae)]
    fix = f"set model.config to a diffusers folder: {file.path.name} has no configs, tokenizer and scheduler of its own"
    config = config or file.family.default_configs
    folder = _diffusers_folder(config, "model.config", fix, wanted)
    return Base(spec, folder, file=file, setting=f"model.config {config!r}")


def _diffusers_folder(spec: str, setting: str, fix: str, parts: Sequence[str]) -> Path:
    """Return a diffusers folder that is here, or the snapshot of a hub id with the weights of `parts`."""
    folder = Path(spec)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{setting} {spec!r} is no diffusers folder: it has no model_index.json")
    is_here = folder.exists()
    if not is_here:
        # configs first: gigabytes of a model that is refused are not fetched
        folder = fetch(spec, setting, fix, ())
    index = _read_json(folder / "model_index.json", f"{setting} {spec!r}")
    pipeline = index.get("_class_name", "")
    if not {name for name in index if name.startswith(MODEL_PARTS)} <= _trainable_parts():
        raise UserError(f"{setting} {spec!r} is a {pipeline}; only {trainable_titles()} are supported yet")
    return folder if is_here or not parts else fetch(spec, setting, fix, parts)


def vae_config(base: Base, override: str) -> dict:
    """Return the config of the run's autoencoder: that of the folder given, or else the base's, which fits a file too."""
    if not override or Path(override).suffix.lower() == ".safetensors":
        return {"_class_name": "AutoencoderKL", **base.config_of("vae")}
    if Path(override).is_file():
        raise UserError(
            f"model.vae {override!r} is no .safetensors file; other formats can run code and are never opened"
        )
    path = Path(override) / "config.json"
    if not path.is_file():
        raise UserError(f"model.vae {override!r} is no autoencoder folder: it has no config.json")
    config = _read_json(path, f"model.vae {override!r}")
    if config.get("_class_name") not in ("AutoencoderKL", "AutoencoderTiny"):
        raise UserError(
            f"model.vae {override!r} is a {config.get('_class_name')}; use an AutoencoderKL or AutoencoderTiny"
        )
    return config


def latent_factor(config: dict) -> int:
    """Return the pixels a latent of an autoencoder's config, along each side."""
    is_tiny = config["_class_name"] == "AutoencoderTiny"
    return 2 ** (len(config["encoder_block_out_channels" if is_tiny else "block_out_channels"]) - 1)


@functools.cache
def _vae_bytes(config: str) -> int:
    from diffusers import AutoencoderKL, AutoencoderTiny

    values = json.loads(config)
    with torch.device("meta"):
        vae = (AutoencoderTiny if values["_class_name"] == "AutoencoderTiny" else AutoencoderKL).from_config(values)
    return sum(4 * p.numel() for p in vae.parameters())


def vae_bytes(base: Base, override: str) -> int:
    """Return the bytes of the run's autoencoder in fp32. Loads no weights."""
    return _vae_bytes(json.dumps(vae_config(base, override), sort_keys=True))


def bucket_multiple(base: Base, latent_factor: int) -> int:
    """Return what sides of buckets are multiples of: an eighth of the model's native side, at most 64 px."""
    native = base.family.native_px(base.config_of("unet"), latent_factor)
    return min(64, max(2 * latent_factor, native // 8))


def training_buckets(base: Base, data: Data, latent_factor: int) -> tuple[Bucket, ...]:
    """Return the buckets of a run, sorted. Raises UserError if the resolution allows none for the model."""
    return make_buckets(data.resolution, bucket_multiple(base, latent_factor), data.max_aspect)
