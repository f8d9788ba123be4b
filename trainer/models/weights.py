"""The parts of a Stable Diffusion with their weights, on the CPU; safetensors only.

Each part is loaded when it is needed and alone, so that encoders and UNet never share the memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, words
from safelight.trainer.models.base import Base, tiny_folder, vae_config
from safelight.trainer.models.single_file import SingleFile

# diffusers and transformers put a variant before or behind a shard's number
_WEIGHTS = re.compile(r"[^.]+?(?:\.(\w+?))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors")


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
    """Raise UserError, one line, where load_unet would, from configs and headers alone: hours of encoding may lie between."""
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
    return UserError(f"{folder}: its weights are damaged or do not fit its config.json: {reason}")


def _lacking(folder: Path, missing: Collection[str]) -> ValueError:
    return UserError(
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
        raise UserError(f"{folder} holds no .safetensors (found: {found}); other formats are never loaded")
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
            raise UserError(
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
        raise UserError(
            f"model.tokenizer {tokenizer_override!r} does not fit the text encoder of {base.spec!r}; leave it empty"
        )
    folder = tokenizer_override or (base.folder or tiny_folder()) / "tokenizer"
    if not Path(folder).is_dir():
        raise UserError(f"model.tokenizer {str(folder)!r} is no folder")
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
