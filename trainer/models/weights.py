"""Loads the parts of a model with their weights onto the CPU, from safetensors only.

Each part is loaded separately, when it is needed, so that the encoders and the UNet need not be in memory together.
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
from safelight.text import counted
from safelight.trainer.models.base import Base, tiny_folder, vae_config
from safelight.trainer.models.single_file import SingleFile

# a weights file, whose variant (fp16) stands before or after the shard's number
_WEIGHTS_FILE = re.compile(r"[^.]+?(?:\.(\w+?))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors")


def fingerprint(module: nn.Module, *extra: str) -> str:
    """Return the SHA-256 of a module's tensors (names, dtypes, shapes, bytes) and of any extra strings."""
    digest = hashlib.sha256("\n".join(extra).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def seeded_initialization(seed: int, part: str):
    """Seed torch's generator from (seed, part) inside the block, for libraries' initializers; restore it afterwards."""
    state = torch.random.get_rng_state()
    sample_id = int.from_bytes(part.encode()[:7], "big")
    torch.manual_seed(int(words(Key(seed, Purpose.INITIAL_WEIGHTS, sample_id), 1)[0]))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def load_unet(base: Base, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the UNet on the CPU in `dtype`; for a `random:` base its weights are random, from `seed`."""
    from diffusers import UNet2DConditionModel

    if base.folder is None:
        with seeded_initialization(seed, "unet"):
            return UNet2DConditionModel.from_config(base.config_of("unet")).to(dtype)
    if base.file is not None:
        config = base.config_of("unet")
        return base.file.load_unet(lambda: UNet2DConditionModel.from_config(config), dtype, base.setting)
    return _from_folder(UNet2DConditionModel, base.folder / "unet", dtype)


def meta_unet(base: Base) -> nn.Module:
    """Return the UNet on the meta device, which allocates no memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(base.config_of("unet"))


def check_unet(base: Base) -> None:
    """Raise UserError if load_unet would, from configs and file headers only.

    Encoding, which may take hours, comes before load_unet.
    """
    if base.folder is None:
        return
    unet = meta_unet(base)
    if base.file is not None:
        base.file.check_unet(unet, base.setting)
        return
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    actual: dict[str, tuple[int, ...]] = {}
    folder = base.folder / "unet"
    for path in _weights_in(folder)[1]:
        try:
            with safe_open(path, "pt") as file:
                actual.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _bad_weights(folder, f"{path.name}: {error}") from error
    if missing := set(expected) - set(actual):
        raise _missing_tensors(folder, missing)
    for name, shape in expected.items():
        if actual[name] != shape:
            raise _bad_weights(folder, f"{name} is {actual[name]}, not {shape}")


def _bad_weights(folder: Path, error: object) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(
        f"{folder}: its weights are damaged or do not fit its config.json; get this folder again ({reason})"
    )


def _missing_tensors(folder: Path, missing: Collection[str]) -> UserError:
    return UserError(
        f"{folder}: its .safetensors files lack {counted(len(missing), 'tensor')} required by its config.json, "
        f"the first is {min(missing)}; get this folder again"
    )


def _weights_in(folder: Path) -> tuple[str | None, list[Path]]:
    """Return the preferred variant in a model's folder, None for files without one, and the files of that variant."""
    variants: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := _WEIGHTS_FILE.fullmatch(path.name):
            variants.setdefault(match[1] or match[2], []).append(path)
    if not variants:
        names = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
        raise UserError(
            f"{folder} has no .safetensors file (it has {names}); other formats are never loaded, because they can run "
            "code: convert its weights to .safetensors"
        )
    # files without a variant are fp32 if there are several; fp16 has more mantissa bits than bf16
    variant = next((name for name in (None, "fp16", "bf16") if name in variants), min(variants, key=str))
    return variant, variants[variant]


def _from_folder(model_class, folder: Path, dtype: torch.dtype) -> nn.Module:
    variant, _ = _weights_in(folder)
    try:
        module, info = model_class.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _bad_weights(folder, error) from error
    # the libraries only warn, and fill missing tensors with random weights
    if info["missing_keys"]:
        raise _missing_tensors(folder, info["missing_keys"])
    return module


def load_vae(base: Base, override: str, seed: int) -> nn.Module:
    """Return the frozen autoencoder in fp32 on the CPU: from the folder or file `override`, else the base's."""
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
                f"{file} contains an AutoencoderKL, but {base.setting} has the config of a {config['_class_name']}; "
                "set model.config to a folder with an AutoencoderKL"
            )
        vae = file.load_vae(lambda: AutoencoderKL.from_config(config), base.setting)
    elif base.folder is None and not override:
        with seeded_initialization(seed, "vae"):
            vae = AutoencoderKL.from_config(config)
    else:
        model_class = AutoencoderTiny if config["_class_name"] == "AutoencoderTiny" else AutoencoderKL
        vae = _from_folder(model_class, Path(override) if override else base.folder / "vae", torch.float32)
    return vae.eval().requires_grad_(False)


def load_text(base: Base, tokenizer_override: str, seed: int) -> tuple[object, nn.Module]:
    """Return (tokenizer, frozen text encoder in fp32 on the CPU). A `random:` base defaults to the tiny tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    if tokenizer_override and base.folder is not None:
        raise UserError(
            f"model.tokenizer {tokenizer_override!r} does not fit the text encoder of {base.spec!r}, which was trained "
            "with its own; leave model.tokenizer empty"
        )
    folder = tokenizer_override or (base.folder or tiny_folder()) / "tokenizer"
    if not Path(folder).is_dir():
        raise UserError(
            f"model.tokenizer {str(folder)!r} is not a folder; give one with a CLIP tokenizer, or leave it empty"
        )
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
    with seeded_initialization(seed, "text"):
        return tokenizer, CLIPTextModel(config).eval().requires_grad_(False)
