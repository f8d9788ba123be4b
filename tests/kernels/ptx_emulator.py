"""Runs compiled kernels without a GPU: an emulator of the PTX that Triton makes of kernels without loops.

The interpreter shows what a kernel means, not what it is compiled to: layouts, exchanges between threads, masks and
inline assembly are the compiler's. All threads of a program step through the instructions together. Approximate
instructions return any of the results that NVIDIA's PTX manual permits, drawn at random.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
import torch

from safelight.kernels.aot import compile_all as aot
from safelight.kernels.triton.jit import Kernel, Launch

INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z0-9]+(?:\.[a-z0-9:_]+)*)\s*(.*);")
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
REGISTERS = {"%rs": np.uint16, "%rd": np.uint64, "%r": np.uint32, "%p": np.bool_}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray | np.float32) -> np.ndarray:
    """Return a b + c of float32 arrays, rounded once: in float64 rounded to odd, then to float32."""
    product, c = a.astype(np.float64) * b, np.asarray(c, dtype=np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    is_even_and_inexact = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    bits = np.where(is_even_and_inexact, np.where((error > 0) == (total > 0), bits + 1, bits - 1), bits)
    return bits.view(np.float64).astype(np.float32)


def _number_type(name: str) -> type:
    """Return the numpy type of a PTX type: u32, s64, b16, f32."""
    kind = {"u": "uint", "b": "uint", "s": "int", "f": "float"}[name[0]]
    return np.dtype(kind + name[1:]).type


class Emulator:
    """One compiled kernel. `run` executes a grid of programs over tensors in host memory."""

    def __init__(self, kernel: Kernel, launch: Launch, target: int, generator: np.random.Generator):
        self.compiled = aot.compile_case(aot.Case(kernel.__name__, launch), target)
        self.num_threads = 32 * self.compiled.metadata.num_warps
        self.generator = generator
        body = self.compiled.asm["ptx"].partition("\n{\n")[2]
        lines = (re.sub(r"//.*", "", line).strip() for line in body.split("\n"))
        self.lines = [line for line in lines if line and not line.startswith((".", "}"))]
        self.labels = {line[:-1]: i for i, line in enumerate(self.lines) if line.endswith(":")}

    def run(self, grid: tuple[int, ...], arguments: list) -> None:
        """Execute the programs of a one-dimensional grid, one after another."""
        for program in range(grid[0]):
            self.program, self.arguments = program, arguments
            self.registers: dict[str, np.ndarray] = {}
            self.shared = np.full(65536, 0xA5, dtype=np.uint8)
            self._run_program()

    def _run_program(self) -> None:
        position = 0
        while position < len(self.lines):
            line = self.lines[position]
            position += 1
            if line.endswith(":"):
                continue
            match = INSTRUCTION.fullmatch(line)
            assert match, line
            negation, predicate, opcode, operands = match.groups()
            active = np.ones(self.num_threads, dtype=bool)
            if predicate:
                active = self.registers[predicate] ^ bool(negation)
            name, *modifiers = opcode.split(".")
            if name == "ret" and active.all():
                return
            if name == "bra":
                assert active.all() or not active.any(), "threads part ways"
                if active.any():
                    position = self.labels[operands.strip()]
            elif name != "bar":
                parts = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands)]
                self._execute(name, modifiers, parts, active)

    # operands

    def _value(self, operand: str, kind: type) -> np.ndarray:
        """Return an operand's values in all threads, as numbers of a type of its own width or narrower."""
        if operand.startswith("0f"):
            return np.full(self.num_threads, int(operand[2:], 16), dtype=np.uint32).view(kind)
        if operand == "%tid.x":
            return np.arange(self.num_threads, dtype=kind)
        if operand == "%ctaid.x":
            return np.full(self.num_threads, self.program, dtype=kind)
        if operand == "global_smem":
            return np.zeros(self.num_threads, dtype=kind)
        if not operand.startswith("%"):
            number = int(operand.rstrip("U"), 0)
            return (
                np.full(self.num_threads, number & (1 << 8 * np.dtype(kind).itemsize) - 1)
                .astype(f"u{np.dtype(kind).itemsize}")
                .view(kind)
            )
        values = self.registers[operand]
        if kind is not np.bool_:
            values = values.astype(f"u{np.dtype(kind).itemsize}", copy=False).view(kind)
        return values

    def _write(self, register: str, values: np.ndarray, active: np.ndarray) -> None:
        kind = REGISTERS[re.match(r"%[a-z]+", register).group()]
        values = np.ascontiguousarray(values)
        if kind is not np.bool_:
            values = values.view(f"u{values.dtype.itemsize}").astype(kind)
        before = self.registers.get(register, np.zeros(self.num_threads, dtype=kind))
        self.registers[register] = np.where(active, values, before)

    def _address(self, operand: str, kind: type) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        address = self._value(base.strip(), kind).astype(np.int64)
        return address + int(offset or 0)

    # instructions

    def _execute(self, name: str, modifiers: list[str], operands: list[str], active: np.ndarray) -> None:
        if name in ("ld", "st"):
            self._move(name, modifiers, operands, active)
            return
        kind = np.bool_ if modifiers[-1] == "pred" else _number_type(modifiers[-1])
        with np.errstate(all="ignore"):
            if name == "mov":
                self._mov(kind, operands, active)
                return
            if name == "cvt":
                self._write(operands[0], self._converted(modifiers, operands[1:]), active)
                return
            if name == "setp":
                a, b = (self._value(x, kind) for x in operands[1:3])
                is_true = np.isnan(a) | np.isnan(b) if modifiers[0] == "nan" else COMPARISONS[modifiers[0]](a, b)
                self._write(operands[0], is_true, active)
                return
            if name == "selp":
                a, b, p = (*(self._value(x, kind) for x in operands[1:3]), self.registers[operands[3]])
                self._write(operands[0], np.where(p, a, b), active)
                return
            if name == "shfl":
                lane = np.arange(self.num_threads) ^ int(operands[2])
                self._write(operands[0], self._value(operands[1], np.uint32)[lane], active)
                return
            if "wide" in modifiers:
                wide = np.dtype(f"{kind().dtype.kind}{2 * kind().itemsize}")
                values = [self._value(x, kind).astype(wide) for x in operands[1:3]]
                values += [self._value(x, wide.type) for x in operands[3:]]
            else:
                is_shift = name in ("shl", "shr", "bfe")
                values = [self._value(x, np.uint32 if is_shift and i else kind) for i, x in enumerate(operands[1:])]
            self._write(operands[0], self._computed(name, modifiers, kind, values), active)

    def _computed(self, name: str, modifiers: list[str], kind: type, v: list[np.ndarray]) -> np.ndarray:
        is_float = kind is np.float32
        if name == "mul" and "hi" in modifiers:
            return (v[0].astype(np.uint64) * v[1] >> np.uint64(32)).astype(np.uint32)
        if name in ("rcp", "rsqrt"):
            return self._approximation(name, v[0])
        if name == "prmt":
            return self._permuted(*v)
        if name in ("max", "min") and is_float:
            return (np.fmax if name == "max" else np.fmin)(v[0], v[1])
        functions = {
            "add": lambda: v[0] + v[1],
            "sub": lambda: v[0] - v[1],
            "mul": lambda: v[0] * v[1],
            "mad": lambda: v[0] * v[1] + v[2],
            "fma": lambda: fma(*v),
            "neg": lambda: (v[0].view(np.uint32) ^ np.uint32(1 << 31)) if is_float else -v[0],
            "abs": lambda: np.abs(v[0]),
            "copysign": lambda: np.copysign(v[1], v[0]),
            "max": lambda: np.maximum(v[0], v[1]),
            "min": lambda: np.minimum(v[0], v[1]),
            "and": lambda: v[0] & v[1],
            "or": lambda: v[0] | v[1],
            "xor": lambda: v[0] ^ v[1],
            "not": lambda: ~v[0],
            "shl": lambda: v[0] << v[1].astype(v[0].dtype),
            "shr": lambda: v[0] >> v[1].astype(v[0].dtype),
            # to the top and down again, so that a signed field is extended by its sign
            "bfe": lambda: v[0] << (32 - v[1] - v[2]).astype(v[0].dtype) >> (32 - v[2]).astype(v[0].dtype),
        }
        return functions[name]()

    def _approximation(self, name: str, x: np.ndarray) -> np.ndarray:
        exact = 1 / x.astype(np.float64) if name == "rcp" else 1 / np.sqrt(x.astype(np.float64))
        near = exact.astype(np.float32)
        other = (near.view(np.int32) + self.generator.integers(-2, 3, len(x), dtype=np.int32)).view(np.float32)
        error = np.spacing(near).astype(np.float64) if name == "rcp" else exact * 2.0**-22.9
        is_permitted = np.abs(other - exact) <= error
        # 1/2 for 2 - 2^-23 would lead to the wrong reciprocal (tests/kernels/triton/test_correct_rounding.py)
        is_permitted &= np.isfinite(near) & ((x.view(np.int32) & 0x7FFFFF) != 0x7FFFFF)
        return np.where(is_permitted, other, near)

    def _permuted(self, a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        pool = np.stack([(x >> np.uint32(8 * i)) & np.uint32(255) for x in (a, b) for i in range(4)])
        result = np.zeros_like(a)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = pool[nibble & 7, np.arange(len(a))]
            byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
            result |= byte << np.uint32(8 * i)
        return result

    def _mov(self, kind: type, operands: list[str], active: np.ndarray) -> None:
        names = [[x.strip() for x in operand.strip("{} ").split(",")] for operand in operands]
        if len(names[0]) == len(names[1]) == 1:
            self._write(operands[0], self._value(operands[1], kind), active)
        elif len(names[1]) == 1:
            values = self._value(operands[1], kind)
            narrow = np.dtype(f"u{values.dtype.itemsize // len(names[0])}")
            pieces = np.ascontiguousarray(values).view(narrow).reshape(self.num_threads, -1)
            for i, name in enumerate(names[0]):
                if name != "_":
                    self._write(name, pieces[:, i], active)
        else:
            narrow = np.dtype(f"u{np.dtype(kind).itemsize // len(names[1])}").type
            pieces = np.stack([self._value(name, narrow) for name in names[1]], axis=1)
            self._write(operands[0], np.ascontiguousarray(pieces).view(kind)[:, 0], active)

    def _converted(self, modifiers: list[str], operands: list[str]) -> np.ndarray:
        if modifiers[-2] == "f16x2":
            # the first operand to the upper half
            pair = np.stack([self._value(x, np.float32).astype(np.float16) for x in reversed(operands)], axis=1)
            return np.ascontiguousarray(pair).view(np.uint32)[:, 0]
        to, source = (_number_type(name) for name in modifiers[-2:])
        values = self._value(operands[0], source)
        if "rmi" in modifiers:
            values = np.floor(values)
        assert not {"rni", "rpi"} & set(modifiers), modifiers
        return values.astype(to)

    def _move(self, name: str, modifiers: list[str], operands: list[str], active: np.ndarray) -> None:
        space, kind = modifiers[0], np.dtype(_number_type(modifiers[-1]))
        target = operands[0] if name == "ld" else operands[1]
        registers = [x.strip() for x in target.strip("{} ").split(",")]
        if space == "param":
            number = int(operands[1].strip("[]").rpartition("_")[2])
            value = self.arguments[number] if number < len(self.arguments) else 0
            if isinstance(value, float):
                value = int(np.float32(value).view(np.uint32))
            self._write(registers[0], np.full(self.num_threads, value, dtype=kind), active)
            return
        pointer = operands[1] if name == "ld" else operands[0]
        address = self._address(pointer, np.uint64 if space == "global" else np.uint32)
        width = kind.itemsize * len(registers)
        assert not (address[active] % width).any(), "not aligned"
        if name == "ld":
            read = np.zeros((self.num_threads, width), dtype=np.uint8)
            for thread in np.flatnonzero(active):
                read[thread] = self._memory(space, int(address[thread]), width)
            for register, values in zip(registers, read.view(kind).T, strict=True):
                self._write(register, values, active)
        else:
            written = np.stack([self._value(x, kind.type) for x in registers], axis=1)
            written = np.ascontiguousarray(written).view(np.uint8)
            for thread in np.flatnonzero(active):
                self._memory(space, int(address[thread]), width)[:] = written[thread]

    def _memory(self, space: str, address: int, width: int) -> np.ndarray:
        if space == "shared":
            assert 0 <= address <= self.compiled.metadata.shared - width, "outside of the shared memory"
            return self.shared[address : address + width]
        return np.frombuffer((ctypes.c_uint8 * width).from_address(address), dtype=np.uint8)


def emulate(kernel: Kernel, grid: tuple[int, ...], target: int, *arguments, **options) -> None:
    """Launch a kernel on tensors in host memory as a GPU of that compute capability would run it."""
    named = dict(zip(kernel.parameters, arguments, strict=False))
    named |= {name: options.pop(name) for name in kernel.parameters if name in options}
    if not kernel.fp_fusion:
        options["enable_fp_fusion"] = False
    emulator = Emulator(kernel, Launch(kernel, grid, named, options), target, np.random.default_rng(1))
    given = [named[name] for name in kernel.parameters if isinstance(named[name], (float, torch.Tensor))]
    emulator.run(grid, [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given])
