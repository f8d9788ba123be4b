"""Loads the parts of a model with their weights onto the CPU, from safetensors only.

Each part is loaded separately, when it is needed, so that the encoders and the UNet need not be in memory together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from safelight.errors import UserError
from safelight.kernels.philox import Key, Purpose, words
from safelight.trainer.families.family import tokenizer_folder
from safelight.trainer.families.original_layout import Layout, Place, Shape, older_vae_name
from safelight.trainer.models.base import Base, tiny_folder, vae_config
from safelight.trainer.models.build import build, shapes_of, text_config, text_encoder_with
from safelight.trainer.models.model_folder import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    check_fit,
    check_nothing_else,
    weight_files,
)
from safelight.trainer.models.single_file import SingleFile
from safelight.trainer.models.tensor_files import TensorFile, read_state
from safelight.trainer.models.tokenizer import load_tokenizer
from safelight.untrusted import open_regular


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
    config = base.config_of("unet")
    return _load_folder(lambda: UNet2DConditionModel.from_config(config), base.folder, "unet", dtype)


def unet_fingerprint(base: Base, seed: int) -> str:
    """Return a hash of a base's UNet, 64 hex digits: of its config, and of the files of its weights.

    seed: the run's, from which a `random:` base draws them.
    """
    digest = hashlib.sha256(json.dumps(base.config_of("unet"), sort_keys=True).encode())
    if base.folder is None:
        digest.update(f"random, torch {torch.__version__}, seed {seed}".encode())
        return digest.hexdigest()
    if base.file is not None:
        paths = {base.file.path}
    else:
        paths = {file.path for file in weight_files(base.folder, "unet", DIFFUSERS_STEM).values()}
    for path in sorted(paths):
        with open_regular(path) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def meta_unet(base: Base) -> nn.Module:
    """Return the UNet on the meta device, which allocates no memory."""
    from diffusers import UNet2DConditionModel

    config = base.config_of("unet")
    return build(lambda: UNet2DConditionModel.from_config(config), base.setting)


def check_unet(base: Base) -> None:
    """Raise UserError if load_unet would, or if a weight is not finite. Reads the weights, one tensor at a time.

    Encoding, which may take hours, comes before load_unet.
    """
    if base.folder is None:
        return
    unet = meta_unet(base)
    if base.file is not None:
        layout = base.file.check_unet(unet, base.setting)
        files = dict.fromkeys(base.file.shapes, base.file.file)
    else:
        layout, files = _in_folder(base.folder, "unet", DIFFUSERS_STEM, shapes_of(unet))
    for place in layout.values():
        files[place.name].read_finite(place.name)


def _in_folder(folder: Path, part: str, stem: str, shapes: dict[str, Shape]) -> tuple[Layout, dict[str, TensorFile]]:
    """Return the place of each tensor of a module in the files of folder/part, and the files by the names in them.

    stem: see weight_files. shapes: of the module's tensors. Raises UserError if the files do not fit.
    """
    files = weight_files(folder, part, stem)
    layout = {name: Place(next((n for n in _names_in_files(name) if n in files), name)) for name in shapes}
    check_fit(folder / part, files, layout, shapes)
    if part == "unet":
        check_nothing_else(folder / part, files, layout)
    return layout, files


def _names_in_files(name: str) -> tuple[str, ...]:
    """Return the names that a tensor may have in a diffusers folder, the present one first."""
    # transformers 4 prefixes the names of a text encoder's tensors, 5 does not
    bare = name.removeprefix("text_model.")
    return name, older_vae_name(name), bare, f"text_model.{bare}"


def _load_folder(make: Callable[[], nn.Module], folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
    """Return the UNet or autoencoder of folder/part on the CPU. make: builds it from its config."""
    module = build(make, folder / part)
    shapes = shapes_of(module)
    layout, files = _in_folder(folder, part, DIFFUSERS_STEM, shapes)
    module.load_state_dict(read_state(files, layout, shapes, dtype), assign=True)
    return module.eval()


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
        folder, part = (Path(override), "") if override else (base.folder, "vae")
        try:
            vae = _load_folder(lambda: model_class.from_config(config), folder, part, torch.float32)
        except UserError as error:
            if not override:
                raise
            way_out = "" if base.folder is None else ", or leave model.vae empty for the base's own"
            raise UserError(f"model.vae {error}{way_out}") from error
    return vae.eval().requires_grad_(False)


def load_texts(base: Base, tokenizer_override: str, seed: int) -> list[tuple[object, nn.Module]]:
    """Return (tokenizer, frozen text encoder in fp32 on the CPU) for each of the base's text encoders.

    A `random:` base defaults to the tiny base's tokenizer.
    """
    if tokenizer_override and base.folder is not None:
        raise UserError(
            f"model.tokenizer {tokenizer_override!r} does not fit the text encoder of {base.spec!r}, which was trained "
            "with its own; leave model.tokenizer empty"
        )
    if tokenizer_override and not Path(tokenizer_override).is_dir():
        raise UserError(
            f"model.tokenizer {tokenizer_override!r} is not a folder; give one with a CLIP tokenizer, or leave it empty"
        )
    if base.folder is None:
        folder, part = (Path(tokenizer_override), "") if tokenizer_override else (tiny_folder(), "tokenizer")
        tokenizer = load_tokenizer(folder, part)
        return [(tokenizer, _random_text_encoder(base, part, tokenizer, seed)) for part in base.family.text_encoders]
    return [_load_text(base, part) for part in base.family.text_encoders]


def meta_texts(base: Base) -> dict[str, nn.Module]:
    """Return the text encoders on the meta device, which allocates no memory, by their folders.

    Those of a `random:` base as they are published: with more tokens than the tiny base's tokenizer has.
    """
    import transformers

    kinds = base.family.text_encoders
    return {
        part: build(lambda part=part: getattr(transformers, kinds[part])(text_config(base.config_of(part))), part)
        for part in kinds
    }


def _random_text_encoder(base: Base, part: str, tokenizer, seed: int) -> nn.Module:
    """Return a text encoder with random weights. part: as in the family's text_encoders."""
    import transformers

    config = transformers.CLIPTextConfig(
        **base.config_of(part),
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # the first one's seed is that of runs which had only one
    with seeded_initialization(seed, part.replace("text_encoder", "text")):
        return getattr(transformers, base.family.text_encoders[part])(config).eval().requires_grad_(False)


def _load_text(base: Base, part: str) -> tuple[object, nn.Module]:
    """Return (tokenizer, text encoder) of a base with weights. part: as in the family's text_encoders."""
    import transformers

    config = text_config(base.config_of(part))
    if base.file is not None and base.file.has_text_encoder:
        text_encoder = base.file.load_text_encoder(base.family, part, config, base.setting)
    else:
        kind = getattr(transformers, base.family.text_encoders[part])
        shapes = shapes_of(build(lambda: kind(config), base.folder / part))
        layout, files = _in_folder(base.folder, part, TRANSFORMERS_STEM, shapes)
        text_encoder = text_encoder_with(kind, config, read_state(files, layout, shapes, torch.float32))
    folder = tokenizer_folder(part)
    tokenizer = load_tokenizer(base.folder, folder, config.max_position_embeddings, config.vocab_size)
    return tokenizer, text_encoder.eval().requires_grad_(False)
