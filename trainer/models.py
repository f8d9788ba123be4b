"""Where the parts of a Stable Diffusion come from: the embedded tiny base, a diffusers folder, the hub, or nothing.

Each part is loaded when it is needed and alone, so that encoders and UNet never share the memory. safetensors only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from safelight.kernels.philox import Key, Purpose, words
from safelight.trainer.random_models import RANDOM_MODELS

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def tiny_folder() -> Path:
    """Return the embedded tiny base's folder, in a checkout or an installed wheel."""
    import safelight

    return Path(safelight.__file__).resolve().parent / "tiny"


@dataclass(frozen=True)
class Base:
    """A resolved `model.base`. folder is None for `random:NAME`; random_name is '' otherwise."""

    spec: str
    folder: Path | None
    random_name: str = ""

    @property
    def from_scratch(self) -> bool:
        return bool(self.random_name)

    def config_of(self, part: str) -> dict:
        """Return the diffusers or transformers config of unet, vae, text_encoder or scheduler."""
        if self.random_name:
            return dict(RANDOM_MODELS[self.random_name][part])
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return _read_json(self.folder / part / name, f"model.base {self.spec!r}")


def _read_json(path: Path, setting: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{setting}: {path} is missing; a diffusers folder has {path.parent.name}/{path.name}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{setting}: {path} is not readable as JSON: {error}") from None


def resolve_base(spec: str) -> Base:
    """Return where a `model.base` is. Raises ValueError, one line, if it is nowhere."""
    if spec == "tiny":
        return Base(spec, tiny_folder())
    if spec.startswith("random:"):
        name = spec.removeprefix("random:")
        if name not in RANDOM_MODELS:
            raise ValueError(
                f"model.base {spec!r} is unknown; use one of {', '.join('random:' + n for n in RANDOM_MODELS)}"
            )
        return Base(spec, None, name)
    if (Path(spec) / "model_index.json").is_file():
        index = _read_json(Path(spec) / "model_index.json", f"model.base {spec!r}")
        pipeline = index.get("_class_name", "")
        if "XL" in pipeline or "text_encoder_2" in index or "transformer" in index:
            raise ValueError(
                f"model.base {spec!r} is a {pipeline}; only Stable Diffusion 1.x and 2.x are supported yet"
            )
        return Base(spec, Path(spec))
    if Path(spec).exists():
        raise ValueError(f"model.base {spec!r} is no diffusers folder: it has no model_index.json")
    return Base(spec, _fetch(spec))


def _late_bar() -> type:
    """Return a tqdm that is drawn after two seconds, so that what is here already goes unmentioned."""
    from tqdm import tqdm

    class LateBar(tqdm):
        def __init__(self, *args, **options):
            # the command line turns libraries' bars off; gigabytes on their way are ours to show
            interval = 0.2 if sys.stderr.isatty() else 10
            super().__init__(*args, **{**options, "disable": False, "delay": 2, "mininterval": interval})

    return LateBar


def _fetch(spec: str) -> Path:
    """Return the local snapshot of a hub repository, fetching its safetensors and configs if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors"]
    try:
        return Path(
            snapshot_download(
                spec, allow_patterns=patterns, ignore_patterns=["*fp16*", "*non_ema*"], tqdm_class=_late_bar()
            )
        )
    except HFValidationError:
        raise ValueError(f"model.base {spec!r} is neither a folder here nor a hub id (owner/name)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model.base {spec!r} is no folder here and could not be had from the hub ({reason[:100]}); give a diffusers folder"
        ) from None


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
    return _from_folder(UNet2DConditionModel, base.folder / "unet", dtype)


def meta_unet(base: Base) -> nn.Module:
    """Return the UNet on the meta device: shapes without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(base.config_of("unet"))


def _from_folder(model_class, folder: Path, dtype: torch.dtype) -> nn.Module:
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
        raise ValueError(f"{folder} holds no .safetensors (found: {found}); other formats are never loaded")
    variant = None if any(".fp16." not in p.name for p in folder.glob("*.safetensors")) else "fp16"
    try:
        module, info = model_class.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{folder}: its weights are damaged or do not fit its config.json: {reason}") from error
    # the libraries fill a gap with random weights and a warning
    if info["missing_keys"]:
        first, num = min(info["missing_keys"]), len(info["missing_keys"])
        raise ValueError(f"{folder}: its .safetensors lack {num} of the model's tensors, the first is {first}")
    return module


def vae_config(base: Base, override: str) -> dict:
    """Return the config of the run's autoencoder: that of the folder given, or else the base's."""
    if not override:
        return {"_class_name": "AutoencoderKL", **base.config_of("vae")}
    path = Path(override) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.vae {override!r} is no autoencoder folder: it has no config.json")
    config = _read_json(path, f"model.vae {override!r}")
    if config.get("_class_name") not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ValueError(
            f"model.vae {override!r} is a {config.get('_class_name')}; use an AutoencoderKL or AutoencoderTiny"
        )
    return config


def load_vae(base: Base, override: str, seed: int) -> nn.Module:
    """Return the frozen autoencoder in fp32 on the CPU: the base's, or the AutoencoderKL/-Tiny folder given."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    if override:
        name = vae_config(base, override)["_class_name"]
        model_class = AutoencoderTiny if name == "AutoencoderTiny" else AutoencoderKL
        vae = _from_folder(model_class, Path(override), torch.float32)
    elif base.folder is None:
        with seeded_initialisation(seed, "vae"):
            vae = AutoencoderKL.from_config(base.config_of("vae"))
    else:
        vae = _from_folder(AutoencoderKL, base.folder / "vae", torch.float32)
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
    """Return the device of run.device. Raises ValueError for cuda where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but torch finds no CUDA device; use auto or cpu")
    return torch.device(name)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the UNet's dtype. auto: fp32 on a CPU; on a GPU bf16 where it has bf16 arithmetic (cc >= 8.0), else fp16."""
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError("model.precision bf16: this GPU has no bf16 arithmetic; use fp16 or auto")
    return {name: dtype for dtype, name in PRECISIONS.items()}[precision]
