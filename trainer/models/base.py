"""Where the parts of a model come from: a built-in base, a diffusers folder, a single file, the hub, or random weights.

This module resolves `model.base` and reads configs; trainer/models/weights.py loads the weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import UserError
from safelight.trainer.config.schema import Model
from safelight.trainer.families.family import Family
from safelight.trainer.families.registry import (
    family_of,
    is_supported_pipeline,
    supported_titles,
    text_widths,
    why_unsupported,
)
from safelight.trainer.models.architectures import KNOWN_SHAPES, RANDOM_MODELS
from safelight.trainer.models.build import build
from safelight.trainer.models.hub import fetch
from safelight.trainer.models.model_configs import MAX_CONFIG_BYTES, checked
from safelight.trainer.models.model_folder import model_file
from safelight.trainer.models.noise_schedule import NoiseSchedule, make_schedule
from safelight.trainer.models.single_file import SingleFile
from safelight.untrusted import read_json_object

# the parts that have weights
WEIGHTS = ("unet", "vae", "text_encoder")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# built-in bases, with their folders in the package
EMBEDDED = {"tiny": "tiny", "tiny-xl": "tiny_xl", "tiny-v": "tiny_v"}


def tiny_folder(name: str = "tiny") -> Path:
    """Return the folder of a built-in base, in a checkout or an installed wheel. name: a key of EMBEDDED."""
    import safelight

    return Path(safelight.__file__).resolve().parent / EMBEDDED[name]


@dataclass(frozen=True)
class Base:
    """A resolved `model.base`.

    folder: has the configs, the tokenizer, and the weights that `file` does not hold; None for `random:NAME`.
    random_name: NAME of `random:NAME`, '' for a base with weights. file: the single file, if the base is one.
    setting: the setting that named the folder and its value, for messages.
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
        """Return the diffusers or transformers config of unet, vae, scheduler or a text encoder."""
        if self.random_name:
            return dict(RANDOM_MODELS[self.random_name][part])
        config = _read_config(part, self.folder, config_name(part), self.setting)
        if part == "scheduler" and self.file is not None:
            config |= self.file.schedule
        return config

    @property
    def zeroes_empty_text(self) -> bool:
        """Whether the embeddings of the empty text are zeros, as the base was trained."""
        if self.folder is None:
            return self.family.zeroes_empty_text
        index = _read_config("model_index", self.folder, "model_index.json", self.setting)
        return index.get("force_zeros_for_empty_prompt", self.family.zeroes_empty_text)

    def noise_schedule(self, prediction: str = "auto", zero_terminal_snr: bool = False) -> NoiseSchedule:
        """Return the schedule that the base was trained under, see make_schedule. Raises UserError."""
        config = self.config_of("scheduler")
        try:
            return make_schedule(config, prediction, zero_terminal_snr)
        except UserError as error:
            path = f" ({self.folder / config_name('scheduler')})" if self.folder is not None else ""
            raise UserError(f"model.base {self.spec!r}{path}: {error}") from None


def encoder_widths(base: Base) -> dict[str, int]:
    """Return the width of each text encoder's embeddings, by its folder."""
    return {part: base.config_of(part)["hidden_size"] for part in base.family.text_encoders}


def config_name(part: str) -> str:
    """Return the name of a part's config in a diffusers folder."""
    return f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"


def _read_config(part: str, folder: Path, name: str, setting: str) -> dict:
    """Return the checked config of a part, from folder/name. setting: the setting that named the folder."""
    try:
        path = model_file(folder, name)
        return checked(part, read_json_object(path, MAX_CONFIG_BYTES), path)
    except FileNotFoundError:
        raise UserError(
            f"{setting}: {path} is missing, which a diffusers folder of its kind has; get it again"
        ) from None
    except (UserError, OSError) as error:
        raise UserError(f"{setting}: {error}") from None


def base_of(model: Model) -> Base:
    """Return the base of a run's [model] table. Raises UserError if it is missing or not supported."""
    base = resolve_model(model, with_weights=True)
    if base.folder is not None:
        for part in ("unet", *base.family.text_encoders, "scheduler"):
            base.config_of(part)
        vae_config(base, model.vae)
    return base


def resolve_model(model: Model, with_weights: bool = False) -> Base:
    """Return the base of a run's [model] table.

    with_weights: download them if the base is on the hub; a plan needs only the configs.
    """
    return resolve_base(model.base, model.config, has_vae=bool(model.vae), with_weights=with_weights)


def resolve_base(spec: str, config: str = "", has_vae: bool = False, with_weights: bool = True) -> Base:
    """Return the base that `model.base` names. config: `model.config`; has_vae: whether `model.vae` is set.
    with_weights: as for `resolve_model`.

    Raises UserError if it is missing or not supported.
    """
    setting, suffix = f"model.base {spec!r}", Path(spec).suffix.lower()
    if suffix == ".safetensors" and not Path(spec).is_dir():
        return _resolve_file(SingleFile(Path(spec), "model.base"), spec, config, has_vae, with_weights)
    if config:
        raise UserError(
            f"model.config {config!r} is only for a base that is a single .safetensors file, and {setting} is not; "
            "leave model.config empty"
        )
    if spec in EMBEDDED:
        return Base(spec, tiny_folder(spec), setting=setting)
    if spec.startswith("random:"):
        name = spec.removeprefix("random:")
        if name not in RANDOM_MODELS:
            raise UserError(f"{setting} is unknown; use one of {', '.join('random:' + n for n in RANDOM_MODELS)}")
        return Base(spec, None, name, setting=setting)
    if Path(spec).is_file() or suffix in PICKLES:
        raise UserError(
            f"{setting} is not a .safetensors file; other formats can run code and are never opened: "
            "convert it to .safetensors, or give the diffusers folder or hub id of the same model"
        )
    if spec.lower() in KNOWN_SHAPES and "/" not in spec and not Path(spec).exists():
        raise UserError(
            f"{setting} is only for `safelight plan`, which needs no more than a model's shapes; give the model's "
            "diffusers folder, .safetensors file or hub id"
        )
    fix = f"give a diffusers folder on this machine{'' if with_weights else ', or plan for sd15, sd21 or sdxl'}"
    folder = _diffusers_folder(spec, "model.base", fix, WEIGHTS if with_weights else ())
    return Base(spec, folder, setting=setting)


def _resolve_file(file: SingleFile, spec: str, config: str, has_vae: bool, with_weights: bool) -> Base:
    """Return the base of a single file, with the folder of everything that the file does not hold."""
    file.check_base()
    parts_held = {"vae": file.has_vae, "text_encoder": file.has_text_encoder}
    missing = [part for part, is_held in parts_held.items() if not is_held]
    if not config:
        if file.family is None:
            raise UserError(
                f"{file} has a UNet for text embeddings of width {file.text_width}, which is none of {text_widths()}; "
                "set model.config to the diffusers folder that the file was made from"
            )
        if file.family.default_configs is None:
            raise UserError(
                f"{file} is {file.family.title}, and does not say whether it predicts epsilon or v; "
                "set model.config to the diffusers folder or hub id of the model it is based on"
            )
        if "text_encoder" in missing:
            raise UserError(
                f"{file} does not contain a text encoder; set model.config to a diffusers folder or hub id that has "
                "its text encoder"
            )
        if "vae" in missing and not has_vae:
            raise UserError(
                f"{file} does not contain an autoencoder; set model.vae to one, or model.config to a diffusers folder "
                "or hub id that has one"
            )
    if config in EMBEDDED:
        return Base(spec, tiny_folder(config), file=file, setting=f"model.config {config!r}")
    needed = [part for part in missing if with_weights and not (part == "vae" and has_vae)]
    fix = (
        f"set model.config to a diffusers folder, for the configs, tokenizer and scheduler that {file.path.name} lacks"
    )
    config = config or file.family.default_configs
    folder = _diffusers_folder(config, "model.config", fix, needed)
    return Base(spec, folder, file=file, setting=f"model.config {config!r}")


def _diffusers_folder(spec: str, setting: str, fix: str, parts: Sequence[str]) -> Path:
    """Return a local diffusers folder, or the downloaded snapshot of a hub id with the weights of `parts`.

    parts: of WEIGHTS; text_encoder stands for all of the model's text encoders.
    """
    folder = Path(spec)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{setting} {spec!r} is not a diffusers folder: it has no model_index.json; {fix}")
    is_local = folder.exists()
    if not is_local:
        # configs first, so that a refused model is not downloaded
        folder = fetch(spec, setting, fix, ())
    index = _read_config("model_index", folder, "model_index.json", f"{setting} {spec!r}")
    if not is_supported_pipeline(index):
        pipeline = index.get("_class_name", "diffusers model")
        raise UserError(f"{setting} {spec!r} is a {pipeline}; only {supported_titles()} are supported")
    if why := why_unsupported(_read_config("unet", folder, config_name("unet"), f"{setting} {spec!r}")):
        raise UserError(f"{setting} {spec!r} is {why}")
    if is_local or not parts:
        return folder
    others = [name for name in index if name.startswith("text_encoder_")] if "text_encoder" in parts else []
    return fetch(spec, setting, fix, [*parts, *others])


def vae_config(base: Base, override: str) -> dict:
    """Return the config of the run's autoencoder: from the folder `override`, else the base's. A file has none."""
    if not override or Path(override).suffix.lower() == ".safetensors":
        return {"_class_name": "AutoencoderKL", **base.config_of("vae")}
    _check_vae_folder(Path(override))
    config = _read_config("vae", Path(override), "config.json", f"model.vae {override!r}")
    return {"_class_name": "AutoencoderKL", **config}


def _check_vae_folder(folder: Path) -> None:
    """Raise UserError, saying what it is instead, unless model.vae names the folder of an autoencoder."""
    setting = f"model.vae {str(folder)!r}"
    if folder.is_file():
        raise UserError(
            f"{setting} is not a .safetensors file; other formats can run code and are never opened: "
            "convert it to .safetensors, or give its diffusers folder"
        )
    if not folder.exists():
        raise UserError(
            f"{setting} does not exist; give a diffusers folder of an autoencoder on this machine, which a hub id is "
            "not, or a .safetensors file, or leave model.vae empty for the base's own"
        )
    if (folder / "config.json").is_file():
        return
    if (folder / "vae" / "config.json").is_file():
        raise UserError(f"{setting} is the folder of a whole model; set model.vae to {str(folder / 'vae')!r} in it")
    raise UserError(
        f"{setting} is not an autoencoder's folder: it has no config.json; give a diffusers folder of "
        "an autoencoder, or a .safetensors file"
    )


def check_vae(base: Base, override: str) -> None:
    """Raise UserError for a model.vae whose latents have another size or number of channels than the base's own.

    The base was trained on its own latents and would have to learn all anew. A `random:` base knows none yet, and one
    that comes without an autoencoder's config does not tell. A single file always has the size of the base's.
    """
    if base.folder is None or not override or not model_file(base.folder, config_name("vae")).is_file():
        return
    given, own = vae_config(base, override), vae_config(base, "")
    for what, size_of in (
        ("{} px wide", latent_factor),
        ("of {} channels", lambda config: config["latent_channels"]),
    ):
        size, expected = size_of(given), size_of(own)
        if size != expected:
            raise UserError(
                f"model.vae {override!r} makes latents {what.format(size)}, and {base.setting} was trained on latents "
                f"{what.format(expected)}; give an autoencoder of the base's kind, or leave model.vae empty for its own"
            )


def latent_factor(config: dict) -> int:
    """Return how many pixels one latent covers along each side, from an autoencoder's config."""
    is_tiny = config["_class_name"] == "AutoencoderTiny"
    return 2 ** (len(config["encoder_block_out_channels" if is_tiny else "block_out_channels"]) - 1)


@functools.cache
def _vae_bytes(config: str) -> int:
    from diffusers import AutoencoderKL, AutoencoderTiny

    values = json.loads(config)
    kind = AutoencoderTiny if values["_class_name"] == "AutoencoderTiny" else AutoencoderKL
    vae = build(lambda: kind.from_config(values), "the autoencoder")
    return sum(4 * p.numel() for p in vae.parameters())


def vae_bytes(base: Base, override: str) -> int:
    """Return the bytes of the run's autoencoder in fp32, from its config."""
    return _vae_bytes(json.dumps(vae_config(base, override), sort_keys=True))


def bucket_multiple(base: Base, latent_factor: int) -> int:
    """Return the multiple, in px, that the sides of buckets have: an eighth of the native side, at most 64."""
    native = base.family.native_px(base.config_of("unet"), latent_factor)
    return min(64, max(2 * latent_factor, native // 8))
