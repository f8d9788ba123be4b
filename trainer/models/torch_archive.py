"""Reads the tensors of a file that torch.save wrote (.pt, .bin) without loading a pickle.

Such a file is a zip with the tensors' bytes and a program for pickle's machine, `data.pkl`, that builds whatever holds
them. Python's pickle would run what the program names. Here the program is read as data: pickletools lists its
instructions, and those few that make tables, lists, text, numbers and plain tensors are carried out on a stack of our
own. Every other instruction, and every name but those of torch's tensors, is refused. Nothing is imported or called.
Format: the docstring of Python's pickletools; torch/serialization.py.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safelight.untrusted import UnsafeFile, read_bytes

# an embedding of 75 vectors for SDXL has 0.6 MB; some files carry the program that made them
MAX_BYTES = 2**26
MAX_PROGRAM_BYTES = 2**18
MAX_VALUES = 2**22
MAX_DIMENSIONS = 4
_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
}
_TENSOR, _PARAMETER, _TABLE = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
)
_KNOWN = {*_STORAGES, _TENSOR, _PARAMETER, _TABLE}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "BINFLOAT"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """A name that the program imports: one of _KNOWN."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str


_MARK = object()


def read_archive(path: Path) -> object:
    """Return the object that torch.save wrote: tables, lists, texts, numbers, and tensors on the CPU.

    Raises UnsafeFile for a file that holds anything else or is damaged, OSErrors as open does.
    """
    content = read_bytes(path, MAX_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            programs = [name for name in entries if name.endswith("/data.pkl")]
            if len(programs) != 1:
                raise UnsafeFile("it is a zip, but not of torch.save: it has no data.pkl")
            root = programs[0].removesuffix("data.pkl")

            def read(name: str, limit: int) -> bytes:
                info = entries.get(f"{root}{name}")
                # torch compresses nothing; a compressed entry may be a thousand times as large as the file
                if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
                    raise UnsafeFile(f"its entry {name[:40]!r} is missing, compressed or too large")
                return archive.read(info)

            if f"{root}byteorder" in entries and read("byteorder", 16) != b"little":
                raise UnsafeFile("it was written by a machine of another byte order")
            return _Program(read).run(read("data.pkl", MAX_PROGRAM_BYTES))
    except UnsafeFile:
        raise
    # whatever zipfile and pickletools make of damage
    except (zipfile.BadZipFile, ValueError, LookupError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UnsafeFile(f"it is damaged, or not a file of torch.save ({str(error)[:100]})") from None


class _Program:
    """pickle's machine for what torch.save writes of tensors in tables. read: returns an entry of the zip."""

    def __init__(self, read):
        self._read, self._stack, self._memo = read, [], {}

    def run(self, program: bytes) -> object:
        stack, memo = self._stack, self._memo
        for opcode, argument, _ in pickletools.genops(program):
            name = opcode.name
            if name in _VALUES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "MARK":
                stack.append(_MARK)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _TUPLES:
                stack.append(tuple(self._pop(_TUPLES[name])))
            elif name == "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            elif name == "GLOBAL":
                if argument not in _KNOWN:
                    raise UnsafeFile(
                        f"it asks for {str(argument).replace(' ', '.')[:80]}, which is no part of a tensor"
                    )
                stack.append(_Name(argument))
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "REDUCE":
                called, arguments = self._pop(2)
                stack.append(self._made(called, arguments))
            elif name in ("SETITEM", "SETITEMS"):
                pairs = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
                self._top(dict).update(zip(map(self._key, pairs[::2]), pairs[1::2], strict=True))
            elif name in ("APPEND", "APPENDS"):
                values = self._pop(1) if name == "APPEND" else self._pop_to_mark()
                self._top(list).extend(values)
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise UnsafeFile(f"its program has the instruction {name}, which tensors in tables do not need")
        raise UnsafeFile("its program has no end")

    def _pop(self, num: int) -> list:
        if len(self._stack) < num:
            raise UnsafeFile("its program takes more than it has made")
        values = self._stack[-num:]
        del self._stack[-num:]
        return values

    def _pop_to_mark(self) -> list:
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _top(self, kind: type):
        if not isinstance(self._stack[-1], kind):
            raise UnsafeFile("its program puts something into what is no table or list")
        return self._stack[-1]

    def _key(self, key: object) -> str | int:
        if not isinstance(key, str | int):
            raise UnsafeFile("it has a table whose keys are neither text nor numbers")
        return key

    def _storage(self, named: object) -> _Storage:
        match named:
            case ("storage", _Name(kind), str(key), str(), int()) if kind in _STORAGES and key.isalnum():
                return _Storage(_STORAGES[kind], key)
        raise UnsafeFile("it has a tensor whose values are no floating-point numbers")

    def _made(self, called: object, arguments: object) -> object:
        match called, arguments:
            case _Name(name), () if name == _TABLE:
                return {}
            case _Name(name), (Tensor() as tensor, bool(), dict()) if name == _PARAMETER:
                return tensor
            case _Name(name), (
                _Storage() as storage,
                int(offset),
                tuple(shape),
                tuple(strides),
                bool(),
                dict(),
                *_,
            ) if name == _TENSOR:
                return self._tensor(storage, offset, shape, strides)
        raise UnsafeFile("its program makes something that is no tensor")

    def _tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> Tensor:
        sizes = (*shape, *strides, offset)
        is_plain = len(shape) == len(strides) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in sizes)
        if not is_plain or math.prod(max(1, n) for n in shape) > MAX_VALUES:
            raise UnsafeFile(f"it has a tensor of shape {str(shape)[:60]}, which is none of an embedding's")
        steps = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        if any(n > 1 and stride != step for n, stride, step in zip(shape, strides, steps, strict=True)):
            raise UnsafeFile("it has a tensor whose values are not in order")
        content = self._read(f"data/{storage.key}", MAX_BYTES)
        start = offset * storage.dtype.itemsize
        stop = start + math.prod(shape) * storage.dtype.itemsize
        if stop > len(content):
            raise UnsafeFile("it has a tensor with fewer values than its shape says")
        return torch.frombuffer(bytearray(content[start:stop]), dtype=storage.dtype).reshape(shape).clone()
