"""Fills a module of ours with the weights in one .safetensors file that the user names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from safelight.errors import UserError
from safelight.trainer.models.build import shapes_of
from safelight.trainer.models.tensor_files import FLOATS, TensorFile, is_finite
from safelight.untrusted import UnsafeFile

# counters of training, of no use here, which some files lack
_UNUSED = "num_batches_tracked"


def fill(module: nn.Module, file: TensorFile, what: str, names: dict[str, str] | None = None) -> nn.Module:
    """Return the module with a file's weights in fp32, for inference. Other tensors of the file are left alone.

    what: the file should be, for messages. names: in the file, where they differ from the module's. Raises UserError
    if tensors are missing, of another shape, or not finite.
    """
    state = {}
    for name, shape in shapes_of(module).items():
        if name.endswith(_UNUSED):
            state[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        source = (names or {}).get(name, name)
        entry = file.entries.get(source)
        if entry is None:
            raise UserError(f"{file.path} is not {what}: it has no tensor {source}; give a file with its usual names")
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise UserError(
                f"{file.path} is not {what}: {source} is {entry.dtype} of {entry.shape}, not floats of {shape}; "
                "get this file again"
            )
        state[name] = file.read_finite(source).float()
        # fp64 values may be none in fp32
        if not is_finite(state[name]):
            raise UserError(f"{file.path}: {source} has values beyond fp32; get this file again")
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def open_weights(path: Path) -> TensorFile:
    """Return a .safetensors file of which only the header is read yet. Raises UserError."""
    try:
        return TensorFile(path)
    except UnsafeFile as error:
        raise UserError(f"{path} is no .safetensors file: {error}; get this file again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
