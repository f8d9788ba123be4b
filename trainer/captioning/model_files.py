"""Which files of a captioner's folder are used, and what of them: nothing that runs code, asks the hub or fills memory.

A folder or hub repository may come from anybody. Its JSON files are read within bounds, stripped of every setting that
makes transformers import code, download something or open another file, and written into a temporary folder. From there
transformers makes the processor. Weights are read by us, from .safetensors only, and must be as many as the config
says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.captioning.tokenizer_file import MAX_TOKEN_CHARACTERS, check_tokenizer
from safelight.trainer.models.hub import fetch_transformers
from safelight.trainer.models.model_folder import TRANSFORMERS_STEM, bad_weights, model_file, weight_files
from safelight.trainer.models.tensor_files import FLOATS, TensorFile
from safelight.untrusted import read_bytes, read_json_object

# tokenizer.json of a vocabulary of 256,000 tokens has 33 MB
MAX_JSON_BYTES = 2**26
# a tokenizer_config.json of 6,000 reserved tokens has 1.1 MB
MAX_CONFIG_BYTES = 2**22
MAX_TEXT_BYTES = 2**24
# the longest known config has 2,000 values
MAX_ITEMS = 10_000
# the largest integers by parts of their names, the first that fits; None: any. Pictures are resized to `height` and
# `width`; `longest_edge` and `shortest_edge` are a number of pixels in some families
LIMITS: tuple[tuple[tuple[str, ...], int | None], ...] = (
    (("theta",), None),
    (("layers", "depth", "num_blocks"), 512),
    (("height", "width", "image_size", "patch_size"), 8192),
    (("num_", "seq_len"), 2**16),
    # vocabularies and positions
    (("",), 2**24),
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    "chat_template.json",
)
TEXT_FILES = ("vocab.txt", "merges.txt", "chat_template.jinja")
# settings that name code, another model or another way to run: transformers' own defaults are used instead
_DROPPED = {
    *("auto_map", "custom_pipelines", "_name_or_path", "name_or_path", "_commit_hash", "transformers_weights"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_experts_implementation"),
    *("fusion_config", "distributed_config", "dtype", "torch_dtype", "base_model_tp_plan", "tokenizer_file"),
    *("_experts_implementation_internal", "custom_generate", "compile_config", "kernel_config"),
}
# of a generation_config.json: what belongs to the model; everything else is the user's
_GENERATION = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "no_repeat_ngram_size"),
    *("length_penalty", "early_stopping"),
)


@dataclass(frozen=True)
class ModelFiles:
    """A captioner's checked files. folder: the model's; staged: the temporary folder with its checked JSON files.

    values: their contents, by name.
    """

    folder: Path
    staged: Path
    values: dict[str, dict]

    @property
    def config(self) -> dict:
        return self.values["config.json"]

    def generation(self) -> dict:
        """Return those values of generation_config.json that belong to the model."""
        values = self.values.get("generation_config.json", {})
        return {name: values[name] for name in _GENERATION if name in values}

    def read_weights(self) -> tuple[dict[str, Tensor], str]:
        """Return (all tensors by name, the fingerprint of weights and settings).

        The tensors stay in the file until they are used. Raises UserError if they are missing, damaged, quantized or
        not finite.
        """
        files = weight_files(self.folder, "", TRANSFORMERS_STEM)
        digest = hashlib.sha256()
        for path in sorted(self.staged.iterdir()):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + read_bytes(path))
        mapped = {file.path: file.map() for file in files.values()}
        tensors: dict[str, Tensor] = {}
        for name, file in sorted(files.items()):
            entry = file.entries[name]
            if entry.dtype not in FLOATS and not entry.dtype.startswith(("I", "U", "BOOL")):
                raise UserError(
                    f"{self.folder} is quantized ({name[:80]} is {entry.dtype}); give the fp16, bf16 or fp32 model"
                )
            tensors[name] = mapped[file.path][name]
            _check_finite(file, name, tensors[name])
            digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode(errors="backslashreplace"))
            digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return tensors, digest.hexdigest()

    def check_size(self, num_needed: int, num_stored: int) -> None:
        """Raise UserError if a config claims more than the files hold, which would be filled with random values."""
        if num_needed > num_stored:
            raise bad_weights(
                self.folder, f"its config.json describes {num_needed:,} weights, and its files have {num_stored:,}"
            )


def _check_finite(file: TensorFile, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and tensor.numel():
        smallest, largest = tensor.aminmax()
        if not (smallest.isfinite() and largest.isfinite()):
            raise UserError(
                f"{file.path}: {name[:80]} has values that are not finite; get this file again, or use another model"
            )


@contextmanager
def opened(spec: str, setting: str = "--model", what: str = "a captioner") -> Iterator[ModelFiles]:
    """Yield the checked files of a model: of a local folder, or of a hub repository, downloaded if need be.

    setting: that named it, and what it has to be, for messages. Raises UserError.
    """
    folder = _folder_of(spec, setting, what)
    staged = Path(tempfile.mkdtemp(prefix="safelight-"))
    try:
        try:
            values = {name: _checked_json(folder, name) for name in JSON_FILES if _exists(folder, name)}
            for name, value in values.items():
                (staged / name).write_text(json.dumps(value), encoding="utf-8")
            for name in TEXT_FILES:
                if _exists(folder, name):
                    (staged / name).write_bytes(read_bytes(model_file(folder, name), MAX_TEXT_BYTES))
        except OSError as error:
            raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
        if "config.json" not in values:
            raise UserError(f"{folder} has no config.json; get this folder again, or install Safelight again")
        yield ModelFiles(folder, staged, values)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def tiny_captioner_folder() -> Path:
    """Return the folder of the built-in tiny captioner, in a checkout or an installed wheel."""
    import safelight

    return Path(safelight.__file__).resolve().parent / "tiny_captioner"


def _folder_of(spec: str, setting: str, what: str) -> Path:
    if spec == "tiny":
        return tiny_captioner_folder()
    folder = Path(os.path.expanduser(spec))
    fix = f"give the folder of {what} on this machine"
    if os.path.isfile(folder):
        raise UserError(f"{setting} {spec!r} is a file; give the model's folder, with its config.json, or its hub id")
    if not os.path.isdir(folder):
        return fetch_transformers(spec, setting, fix)
    if not _exists(folder, "config.json"):
        raise UserError(f"{setting} {spec!r} is not a model's folder: it has no config.json; {fix}, or its hub id")
    return folder


def _exists(folder: Path, name: str) -> bool:
    return os.path.lexists(model_file(folder, name))


def _checked_json(folder: Path, name: str) -> dict:
    max_bytes = MAX_JSON_BYTES if name in VOCABULARIES else MAX_CONFIG_BYTES
    values = read_json_object(model_file(folder, name), max_bytes, clamp_ints=True)
    if name == "tokenizer.json":
        check_tokenizer(values, folder / name)
    if name in VOCABULARIES:
        return values
    # a tokenizer's longest text is 10^30 in many files, for no limit
    return _without_code(values, folder / name, is_bounded=name != "tokenizer_config.json")


def _without_code(value: object, path: Path, is_bounded: bool, key: str = "") -> object:
    """Return a JSON value without the settings in _DROPPED, at any depth. Raises UserError for values out of bounds."""
    if isinstance(value, dict):
        if value.get("quantization_config"):
            raise UserError(f"{path.parent} is quantized; give the fp16, bf16 or fp32 model")
        if value.get("use_pretrained_backbone") or str(value.get("model_type", "")).startswith("timm"):
            raise UserError(f"{path} needs another model as its backbone, which is not downloaded; use another model")
        kept = {name: child for name, child in value.items() if name not in _DROPPED}
        return {name: _without_code(child, path, is_bounded, name) for name, child in kept.items()}
    if isinstance(value, list):
        if is_bounded and len(value) > MAX_ITEMS:
            raise UserError(f"{path}: {key} has {counted(len(value), 'value')}, over the limit of {MAX_ITEMS:,}")
        return [_without_code(child, path, is_bounded, key) for child in value]
    # a prompt has a token for a photograph thousands of times
    if isinstance(value, str) and "token" in key and len(value) > MAX_TOKEN_CHARACTERS:
        raise UserError(f"{path}: {key} has {len(value):,} characters, over the limit of {MAX_TOKEN_CHARACTERS:,}")
    if is_bounded and isinstance(value, int) and not isinstance(value, bool):
        limit = next(limit for parts, limit in LIMITS if any(part in key for part in parts))
        if limit is not None and abs(value) > limit:
            raise UserError(f"{path}: {key} is {value:,}, over the limit of {limit:,}; use another model")
    return value
