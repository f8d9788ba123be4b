"""Reads .safetensors files that somebody else may have made: those of models and of checkpoints.

A header is checked before anything is read: its size, that every tensor's bytes are as many as its dtype and shape say,
and that the tensors cover the file without holes or overlaps. No library is asked: it would choose the file to
open, or believe what the header says.
Format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from safelight.errors import UserError
from safelight.trainer.families.original_layout import Layout, Shape
from safelight.untrusted import UnsafeFile, open_regular, parse_json

# SDXL's header has 0.4 MB; the rest is room for other tools' metadata
MAX_HEADER_BYTES = 2**24
MAX_DIMENSIONS = 16
MAX_NAME_CHARS = 1000
# a tensor without values may claim dimensions whose product torch cannot count
MAX_VALUES = 2**48
# the dtypes of weights
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {
    **FLOATS,
    **{"BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
}
# bits of one value of every dtype in the format
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. start, end: of its bytes, counted from the file's first."""

    dtype: str
    shape: Shape
    start: int
    end: int


class TensorFile:
    """A .safetensors file with a checked header.

    Raises UnsafeFile with what is wrong with the file, OSErrors as open does.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 or header_size > size - 8:
                raise UnsafeFile("its header is longer than the file")
            if header_size > MAX_HEADER_BYTES:
                raise UnsafeFile(f"its header has {header_size:,} bytes, over the limit of {MAX_HEADER_BYTES:,}")
            try:
                header = parse_json(file.read(header_size))
            except UnsafeFile as error:
                raise UnsafeFile(f"its header is not valid JSON: {error}") from None
        if not isinstance(header, dict):
            raise UnsafeFile("its header is not a JSON object")
        self.metadata = _metadata(header.pop("__metadata__", {}))
        self.entries = {name: _entry(name, value, 8 + header_size) for name, value in header.items()}
        _check_covered(self.entries, 8 + header_size, size)

    def read(self, name: str) -> Tensor:
        """Return a tensor. Raises UserError if torch lacks its dtype or the file has become shorter."""
        entry, dtype = self.entries[name], self._dtype(name)
        content = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        with open_regular(self.path) as file:
            file.seek(entry.start)
            if file.readinto(content.numpy()) != len(content):
                raise UserError(f"{self.path} was cut off while it was read; get it again")
        return content.view(dtype).reshape(entry.shape)

    def map(self) -> dict[str, Tensor]:
        """Return all tensors, by name, in memory that the system reads from the file when it is needed.

        Writing to them does not change the file. Raises UserError if torch lacks a dtype.
        """
        with open_regular(self.path) as file:
            content = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        tensors = {}
        for name, entry in self.entries.items():
            dtype, part = self._dtype(name), content[entry.start : entry.end]
            # torch views only bytes that are aligned
            aligned = part if entry.start % dtype.itemsize == 0 else part.clone()
            tensors[name] = aligned.view(dtype).reshape(entry.shape)
        return tensors

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.entries[name].dtype
        if dtype not in DTYPES:
            raise UserError(f"{self.path}: {name[:80]} is {dtype}, which cannot be read; get this file again")
        return DTYPES[dtype]

    def read_finite(self, name: str) -> Tensor:
        """Return a tensor whose dtype is one of FLOATS. Raises UserError if one of its values is NaN or infinite."""
        tensor = self.read(name)
        if not is_finite(tensor):
            raise UserError(
                f"{self.path}: {name} has values that are not finite, so everything computed from it would be NaN; "
                "get this file again, or use another model"
            )
        return tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file. Raises OSError, with the file's name, if the system refuses it."""
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        # its text is all that safetensors keeps of the system's error
        if (found := re.search(r"\(os error ([0-9]+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UnsafeFile("the metadata in its header is not a table of text")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(name: str, value: object, data_start: int) -> Entry:
    """Return a tensor's entry from its value in the header. data_start: where the header ends."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    is_valid = (
        len(name) <= MAX_NAME_CHARS
        and isinstance(dtype, str)
        and dtype in _BITS
        and isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(map(_is_count, shape))
        and math.prod(max(1, size) for size in shape) <= MAX_VALUES
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(map(_is_count, offsets))
        and 8 * (offsets[1] - offsets[0]) == math.prod(shape) * _BITS[dtype]
    )
    if not is_valid:
        raise UnsafeFile(f"the entry of {name[:80]} in its header is not valid")
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_covered(entries: Mapping[str, Entry], start: int, end: int) -> None:
    """Raise UnsafeFile unless the tensors cover the bytes from start to end, each once."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise UnsafeFile(f"the bytes of {name[:80]} do not begin where those of the tensor before it end")
        position = entry.end
    if position != end:
        raise UnsafeFile(f"its tensors have {position - start:,} bytes, but {end - start:,} follow the header")


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a floating-point tensor are finite. Needs no memory of the tensor's size."""
    if tensor.numel() == 0:
        return True
    # NaN is passed on; 15 times faster than isfinite().all()
    smallest, largest = tensor.detach().aminmax()
    return bool(smallest.isfinite() and largest.isfinite())


def first_non_finite(paths: Iterable[Path]) -> str | None:
    """Return "FILE: TENSOR" for the first floating-point tensor in .safetensors files that is not finite, else None.

    Raises UnsafeFile for a damaged file.
    """
    for path in paths:
        file = TensorFile(path)
        for name, entry in file.entries.items():
            if entry.dtype in FLOATS and not is_finite(file.read(name)):
                return f"{path}: {name}"
    return None


def read_state(
    files: Mapping[str, TensorFile], layout: Layout, shapes: Mapping[str, Shape], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a module's state dict in dtype, read one tensor at a time. Raises UserError if a value is not finite.

    files: the file of each tensor, by its name there. layout, shapes: by the module's names.
    """
    state = {}
    for name, place in layout.items():
        tensor = files[place.name].read_finite(place.name)
        if place.third is not None:
            tensor = tensor.chunk(3)[place.third].clone()
        elif place.transposed:
            tensor = tensor.T.contiguous()
        state[name] = tensor.reshape(shapes[name]).to(dtype)
    return state
