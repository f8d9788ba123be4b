"""Which files of a model's folder may be opened: regular files that lie in it, and of weights only .safetensors.

The files are chosen here and read by us, so that no library follows a link, an index or a setting out of the folder, or
opens a format that can run code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safelight.errors import UserError, first_line
from safelight.text import counted
from safelight.trainer.families.original_layout import Layout, Shape
from safelight.trainer.models.tensor_files import FLOATS, TensorFile
from safelight.untrusted import UnsafeFile, path_in, read_json_object

# what the libraries call files of weights, without variant, shard and suffix
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
# an index has a line per tensor
MAX_INDEX_BYTES = 2**24
# an index of shards, whose variant stands before or after the word index
_INDEX_FILE = re.compile(r"([^.]+)\.safetensors\.(?:index(?:\.(\w+))?|(\w+)\.index)\.json")
# a weights file, whose variant (fp16) stands before or after the shard's number
_WEIGHTS_FILE = re.compile(r"([^.]+?)(?:\.(\w+?))?(-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors")


def model_file(folder: Path, name: str) -> Path:
    """Return folder/name, which must lie in the model's folder, also after links are resolved; it need not exist.

    A snapshot in the hub's cache consists of links to blobs beside it, so there the folder of the repository counts.
    Raises UnsafeFile if the path leads out.
    """
    absolute = Path(os.path.abspath(folder))
    root = absolute
    for parent in (absolute, *absolute.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            root = parent.parent.parent
    path = Path(folder) / name
    try:
        path_in(root, os.path.join(absolute.relative_to(root), name))
    except UnsafeFile:
        raise UnsafeFile(
            f"{path} leads out of the model's folder, to {os.path.realpath(path)}; such links are never followed: "
            "replace it by a copy"
        ) from None
    return path


def weight_files(folder: Path, part: str, stem: str) -> dict[str, TensorFile]:
    """Return the file of each tensor in the weights of folder/part, by the tensor's name. Only headers are read.

    stem: DIFFUSERS_STEM or TRANSFORMERS_STEM. Files without a variant are preferred, then fp16
    and bf16. Raises UserError if there are no weights, or an index names anything but .safetensors files beside it.
    """
    where = model_file(folder, part)
    files: dict[str, TensorFile] = {}
    for name in _chosen_names(folder, part, stem):
        path = model_file(folder, os.path.join(part, name))
        try:
            file = TensorFile(path)
        except (UnsafeFile, OSError) as error:
            raise bad_weights(where, f"{name}: {error}") from error
        for tensor in file.entries:
            if tensor in files:
                raise bad_weights(where, f"{tensor} is in {files[tensor].path.name} and in {name}")
            files[tensor] = file
    return files


def _chosen_names(folder: Path, part: str, stem: str) -> list[str]:
    """Return the names of the files of the preferred variant: one, or all shards."""
    where = model_file(folder, part)
    found = sorted(path.name for path in where.glob("*"))
    wholes: dict[str | None, str] = {}
    shards: dict[str | None, list[str]] = {}
    indices: dict[str | None, str] = {}
    for name in found:
        if (match := _WEIGHTS_FILE.fullmatch(name)) and match[1] == stem:
            variant = match[2] or match[4]
            if match[3]:
                shards.setdefault(variant, []).append(name)
            else:
                wholes[variant] = name
        elif (match := _INDEX_FILE.fullmatch(name)) and match[1] == stem:
            indices.setdefault(match[2] or match[3], name)
    # an index may name files as it likes; one without files may be a rest of another variant
    variants = wholes.keys() | shards.keys() or indices.keys()
    if not variants:
        kind = f"{stem}.safetensors" if any(name.endswith(".safetensors") for name in found) else ".safetensors file"
        raise UserError(
            f"{where} has no {kind} (it has {', '.join(found[:9]) or 'nothing'}); other formats are never loaded, "
            "because they can run code: convert its weights to .safetensors"
        )
    # files without a variant are fp32 if there are several; fp16 has more mantissa bits than bf16
    variant = next((name for name in (None, "fp16", "bf16") if name in variants), min(variants, key=str))
    index = indices.get(variant)
    # where there are both, transformers loads the whole file, and diffusers the shards
    if variant in wholes and (index is None or stem == TRANSFORMERS_STEM):
        return [wholes[variant]]
    return shards.get(variant, []) if index is None else _indexed_names(folder, part, index)


def _indexed_names(folder: Path, part: str, index: str) -> list[str]:
    """Return the names of the shards in an index."""
    where = model_file(folder, part)
    shard_of = read_json_object(model_file(folder, os.path.join(part, index)), MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise bad_weights(where, f"{index} has no weight_map from tensors to files")
    names = sorted(set(shard_of.values()))
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise UserError(
                f"{where}: its index {index} names {name!r}, which is no .safetensors file of this folder; other "
                "formats are never loaded, because they can run code: get this folder again"
            )
    if missing := [name for name in names if not model_file(folder, os.path.join(part, name)).exists()]:
        raise UserError(
            f"{where} lacks {counted(len(missing), 'file')} that its index {index} names, the first is {missing[0]}; "
            "get this folder again"
        )
    return names


def bad_weights(folder: Path, error: object) -> UserError:
    """Return the error that says that the weights in a folder cannot be used. error: why."""
    reason = first_line(error)
    return UserError(
        f"{folder}: its weights are damaged or do not fit its config.json; get this folder again ({reason})"
    )


def check_fit(folder: Path, files: Mapping[str, TensorFile], layout: Layout, shapes: Mapping[str, Shape]) -> None:
    """Raise UserError unless the files have the tensors of a module, as floating-point numbers of the right shape.

    folder: for messages. layout: the name in the files, by the module's; shapes: by the module's.
    """
    if missing := sorted(place.name for place in layout.values() if place.name not in files):
        raise UserError(
            f"{folder}: its .safetensors files lack {counted(len(missing), 'tensor')} required by its config.json, "
            f"the first is {missing[0]}; get this folder again"
        )
    for name, place in layout.items():
        entry = files[place.name].entries[place.name]
        if entry.dtype not in FLOATS:
            raise UserError(f"{folder} is quantized ({place.name} is {entry.dtype}); give the fp16, bf16 or fp32 model")
        if entry.shape != shapes[name]:
            raise bad_weights(folder, f"{place.name} is {entry.shape}, not {shapes[name]}")


def check_nothing_else(folder: Path, files: Mapping[str, TensorFile], layout: Layout) -> None:
    """Raise UserError if the files have tensors that the module lacks: without them it is another model."""
    if others := sorted(files.keys() - {place.name for place in layout.values()}):
        raise UserError(
            f"{folder}: its .safetensors files have {counted(len(others), 'tensor')} more than its config.json, the "
            f"first is {others[0][:80]}; get this folder again"
        )
