"""Where the parts of a Stable Diffusion come from: the tiny base, a diffusers folder, a single file, the hub, or nothing.

Each part is loaded when it is needed and alone, so that encoders and UNet never share the memory. safetensors only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from safelight.kernels.philox import Key, Purpose, words
from safelight.trainer.config import Model
from safelight.trainer.hub import PARTS, fetch
from safelight.trainer.presets import SD15
from safelight.trainer.random_models import RANDOM_MODELS
from safelight.trainer.single_file import SingleFile

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# diffusers and transformers put a variant before or behind a shard's number
_WEIGHTS = re.compile(r"[^.]+?(?:\.(\w+?))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors")
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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

    def config_of(self, part: str) -> dict:
        """Return the diffusers or transformers config of unet, vae, text_encoder or scheduler."""
        if self.random_name:
            return dict(RANDOM_MODELS[self.random_name][part])
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config = _read_json(self.folder / part / name, self.setting)
        if part == "scheduler" and self.file is not None and self.file.prediction_type:
            config["prediction_type"] = self.file.prediction_type
        return config


def _read_json(path: Path, setting: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{setting}: {path} is missing; a diffusers folder has {path.parent.name}/{path.name}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{setting}: {path} is not readable as JSON: {error}") from None


def base_of(model: Model) -> Base:
    """Return where the base of a run's [model] table is. Raises ValueError, one line, if it is nowhere, or cannot be trained yet."""
    base = resolve_model(model)
    if base.random_name and "text_encoder" not in RANDOM_MODELS[base.random_name]:
        raise ValueError(
            f"model.base {model.base!r} is for `safelight plan` and `safelight bench` alone: only Stable Diffusion 1.x and 2.x "
            "can be trained yet; use random:sd15 or random:sd21"
        )
    return base


def resolve_model(model: Model) -> Base:
    """As base_of, and for what can be planned alone, too: SDXL."""
    return resolve_base(model.base, model.config, has_vae=bool(model.vae))


def resolve_base(spec: str, config: str = "", has_vae: bool = False) -> Base:
    """Return where a `model.base` is; config: `model.config`; has_vae: an autoencoder is given beside it.

    Raises ValueError, one line, if it is nowhere, or of a kind that is not supported.
    """
    setting, suffix = f"model.base {spec!r}", Path(spec).suffix.lower()
    if suffix == ".safetensors" and not Path(spec).is_dir():
        return _resolve_file(SingleFile(Path(spec), "model.base"), spec, config, has_vae)
    if config:
        raise ValueError(
            f"model.config {config!r} is for a single .safetensors file; {setting} is none, leave it empty"
        )
    if spec == "tiny":
        return Base(spec, tiny_folder(), setting=setting)
    if spec.startswith("random:"):
        name = spec.removeprefix("random:")
        if name not in RANDOM_MODELS:
            raise ValueError(f"{setting} is unknown; use one of {', '.join('random:' + n for n in RANDOM_MODELS)}")
        return Base(spec, None, name, setting=setting)
    if Path(spec).is_file() or suffix in PICKLES:
        raise ValueError(
            f"{setting} is no .safetensors file; other formats can run code and are never opened: convert it first"
        )
    return Base(spec, _diffusers_folder(spec, "model.base", "give a diffusers folder", PARTS), setting=setting)


def _resolve_file(file: SingleFile, spec: str, config: str, has_vae: bool) -> Base:
    """Return the base of a single file, with the folder of all that it does not hold."""
    file.check_base()
    lacking = [part for part, there in (("vae", file.has_vae), ("text_encoder", file.has_text_encoder)) if not there]
    if not config:
        if file.family == "2.x":
            raise ValueError(
                f"{file} is Stable Diffusion 2.x, whose weights do not tell whether they predict epsilon or v; "
                "set model.config to the diffusers folder or hub id of the one it comes from"
            )
        if not file.family:
            raise ValueError(
                f"{file} attends to width {file.text_width}, not to 768 (1.x) or 1024 (2.x); "
                "set model.config to the diffusers folder it was made from"
            )
        if "text_encoder" in lacking:
            raise ValueError(
                f"{file} holds no text encoder; set model.config to a diffusers folder or hub id that has it"
            )
        if "vae" in lacking and not has_vae:
            raise ValueError(
                f"{file} holds no autoencoder; set model.vae to one, or model.config to a folder that has one"
            )
    if config == "tiny":
        return Base(spec, tiny_folder(), file=file, setting="model.config 'tiny'")
    wanted = [part for part in lacking if not (part == "vae" and has_vae)]
    fix = f"set model.config to a diffusers folder: {file.path.name} has no configs, tokenizer and scheduler of its own"
    folder = _diffusers_folder(config or SD15, "model.config", fix, wanted)
    return Base(spec, folder, file=file, setting=f"model.config {config or SD15!r}")


def _diffusers_folder(spec: str, setting: str, fix: str, parts: Sequence[str]) -> Path:
    """Return a diffusers folder that is here, or the snapshot of a hub id with the weights of `parts`."""
    folder = Path(spec)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{setting} {spec!r} is no diffusers folder: it has no model_index.json")
    is_here = folder.exists()
    if not is_here:
        # configs first: gigabytes of a model that is refused are not fetched
        folder = fetch(spec, setting, fix, ())
    index = _read_json(folder / "model_index.json", f"{setting} {spec!r}")
    pipeline = index.get("_class_name", "")
    if "XL" in pipeline or "text_encoder_2" in index or "transformer" in index:
        raise ValueError(f"{setting} {spec!r} is a {pipeline}; only Stable Diffusion 1.x and 2.x are supported yet")
    return folder if is_here or not parts else fetch(spec, setting, fix, parts)


def fingerprint(module: nn.Module, *extra: str) -> str:
    """Return a SHA-256 over a module's tensors by name, dtype and bytes, and over any extra words."""
    digest = hashlib.sha256("\n".join(extra).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def seeded_initialisation(seed: int, part: str):
    """Library initialisers draw from torch's generator: seed it as a function of (seed, part), put it back after."""
    state = torch.random.get_rng_state()
    sample_id = int.from_bytes(part.encode()[:7], "big")
    torch.manual_seed(int(words(Key(seed, Purpose.INITIAL_WEIGHTS, sample_id), 1)[0]))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def load_unet(base: Base, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the UNet on the CPU, in `dtype`; with random weights of `seed` for a `random:` base."""
    from diffusers import UNet2DConditionModel

    if base.folder is None:
        with seeded_initialisation(seed, "unet"):
            return UNet2DConditionModel.from_config(base.config_of("unet")).to(dtype)
    if base.file is not None:
        config = base.config_of("unet")
        return base.file.load_unet(lambda: UNet2DConditionModel.from_config(config), dtype, base.setting)
    return _from_folder(UNet2DConditionModel, base.folder / "unet", dtype)


def meta_unet(base: Base) -> nn.Module:
    """Return the UNet on the meta device: shapes without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(base.config_of("unet"))


def check_unet(base: Base) -> None:
    """Raise ValueError, one line, where load_unet would, from configs and headers alone: hours of encoding may lie between."""
    if base.folder is None:
        return
    unet = meta_unet(base)
    if base.file is not None:
        base.file.check_unet(unet, base.setting)
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    folder = base.folder / "unet"
    for path in _weights_in(folder)[1]:
        try:
            with safe_open(path, "pt") as file:
                found.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _unfit(folder, f"{path.name}: {error}") from error
    if missing := set(wanted) - set(found):
        raise _lacking(folder, missing)
    for name, shape in wanted.items():
        if found[name] != shape:
            raise _unfit(folder, f"{name} is {found[name]}, not {shape}")


def _unfit(folder: Path, error: object) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ValueError(f"{folder}: its weights are damaged or do not fit its config.json: {reason}")


def _lacking(folder: Path, missing: Collection[str]) -> ValueError:
    return ValueError(
        f"{folder}: its .safetensors lack {len(missing)} of the model's tensors, the first is {min(missing)}"
    )


def _weights_in(folder: Path) -> tuple[str | None, list[Path]]:
    """Return the variant to take of a model's folder, None for the plain files, and its files."""
    variants: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := _WEIGHTS.fullmatch(path.name):
            variants.setdefault(match[1] or match[2], []).append(path)
    if not variants:
        found = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
        raise ValueError(f"{folder} holds no .safetensors (found: {found}); other formats are never loaded")
    # the plain file is the fp32 one where there are several; of two halves fp16 has the more digits
    variant = next((name for name in (None, "fp16", "bf16") if name in variants), min(variants, key=str))
    return variant, variants[variant]


def _from_folder(model_class, folder: Path, dtype: torch.dtype) -> nn.Module:
    variant, _ = _weights_in(folder)
    try:
        module, info = model_class.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _unfit(folder, error) from error
    # the libraries fill a gap with random weights and a warning
    if info["missing_keys"]:
        raise _lacking(folder, info["missing_keys"])
    return module


def vae_config(base: Base, override: str) -> dict:
    """Return the config of the run's autoencoder: that of the folder given, or else the base's, which fits a file too."""
    if not override or Path(override).suffix.lower() == ".safetensors":
        return {"_class_name": "AutoencoderKL", **base.config_of("vae")}
    if Path(override).is_file():
        raise ValueError(
            f"model.vae {override!r} is no .safetensors file; other formats can run code and are never opened"
        )
    path = Path(override) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.vae {override!r} is no autoencoder folder: it has no config.json")
    config = _read_json(path, f"model.vae {override!r}")
    if config.get("_class_name") not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ValueError(
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


def load_vae(base: Base, override: str, seed: int) -> nn.Module:
    """Return the frozen autoencoder in fp32 on the CPU: the base's, or the one of the folder or file given."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    config = vae_config(base, override)
    file = base.file if base.file is not None and base.file.has_vae else None
    if override and Path(override).suffix.lower() == ".safetensors":
        file = SingleFile(Path(override), "model.vae")
    elif override:
        file = None
    if file is not None:
        if config["_class_name"] != "AutoencoderKL":
            raise ValueError(
                f"{file} holds an AutoencoderKL, {base.setting} a {config['_class_name']}; give another model.config"
            )
        vae = file.load_vae(lambda: AutoencoderKL.from_config(config), base.setting)
    elif base.folder is None and not override:
        with seeded_initialisation(seed, "vae"):
            vae = AutoencoderKL.from_config(config)
    else:
        model_class = AutoencoderTiny if config["_class_name"] == "AutoencoderTiny" else AutoencoderKL
        vae = _from_folder(model_class, Path(override) if override else base.folder / "vae", torch.float32)
    return vae.eval().requires_grad_(False)


def load_text(base: Base, tokenizer_override: str, seed: int) -> tuple[object, nn.Module]:
    """Return (tokenizer, frozen text encoder in fp32 on the CPU). A `random:` base has the tiny vocabulary by default."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    if tokenizer_override and base.folder is not None:
        raise ValueError(
            f"model.tokenizer {tokenizer_override!r} does not fit the text encoder of {base.spec!r}; leave it empty"
        )
    folder = tokenizer_override or (base.folder or tiny_folder()) / "tokenizer"
    if not Path(folder).is_dir():
        raise ValueError(f"model.tokenizer {str(folder)!r} is no folder")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if base.file is not None and base.file.has_text_encoder:
        config = CLIPTextConfig.from_dict(base.config_of("text_encoder"))
        return tokenizer, base.file.load_text_encoder(config, base.setting).eval().requires_grad_(False)
    if base.folder is not None:
        return tokenizer, _from_folder(
            CLIPTextModel, base.folder / "text_encoder", torch.float32
        ).eval().requires_grad_(False)
    config = CLIPTextConfig(
        **base.config_of("text_encoder"),
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded_initialisation(seed, "text"):
        return tokenizer, CLIPTextModel(config).eval().requires_grad_(False)


def pick_device(name: str) -> torch.device:
    """Return the device of run.device, a GPU with its number. Raises ValueError for cuda where there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but torch finds no CUDA device; use auto or cpu")
    # tensors tell their device so, it is equal to no "cuda", and torch.cuda.set_per_process_memory_fraction takes none without
    return torch.device("cuda", torch.cuda.current_device())


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the UNet's dtype. auto: fp32 on a CPU; on a GPU bf16 where it has bf16 arithmetic (cc >= 8.0), else fp16."""
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError("model.precision bf16: this GPU has no bf16 arithmetic; use fp16 or auto")
    return {name: dtype for dtype, name in PRECISIONS.items()}[precision]
