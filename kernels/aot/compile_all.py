"""The ahead-of-time gate: every kernel compiled for every card, on a machine that has none.

Triton compiles for any target without a GPU. The launches of kernels/aot/workload.py, which runs each op on meta tensors, are
recorded with the very arguments that a GPU would see, and compiled for sm_75 to sm_120. What the assembler made of them stands
in kernels/aot/aot.json: registers a thread, stack bytes (spilled registers), shared memory, code bytes. A kernel's entry holds as
long as its source and Triton's version do.

    python -m safelight.kernels.aot.compile_all            compile what the table lacks, write it, print what fails the gate

Full shape lists are compiled in the dtype a card trains in (fp16 on sm_75, which has no bf16; bf16 from sm_80 on), a
representative one in the other dtypes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.kernels.aot.workload import full, representative
from safelight.kernels.triton.jit import Launch, record_launches

TABLE = Path(__file__).with_name("aot.json")
TARGETS = (75, 80, 86, 89, 90, 100, 120)
MAX_SHARED_BYTES = 64 * 1024  # sm_75's limit, the smallest
# double precision, and matrix units: an elementwise kernel or a reduction that uses either is not what it should be
FORBIDDEN = re.compile(r"\b(?:[a-z0-9.]+\.f64|(?:wmma|mma|wgmma|tcgen05)\.[a-z0-9_.]+)")


@dataclass(frozen=True)
class Case:
    """One compilation but for its target. label: what distinguishes it among its kernel's; launch: one that needs it."""

    label: str
    launch: Launch


@dataclass(frozen=True)
class Code:
    """What the assembler made. forbidden: double-precision and matrix instructions found."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    code_bytes: int
    forbidden: tuple[str, ...] = ()

    def failures(self) -> list[str]:
        """Return what fails the gate, in words."""
        found = []
        if self.stack_bytes:
            found.append(f"{self.stack_bytes} bytes of spilled registers a thread")
        if self.shared_bytes > MAX_SHARED_BYTES:
            found.append(f"{self.shared_bytes} bytes of shared memory, limit {MAX_SHARED_BYTES}")
        if self.forbidden:
            found.append(f"instructions that should not be there: {', '.join(self.forbidden)}")
        return found


def _specialization(launch: Launch) -> tuple[dict[str, str], dict[tuple, object], dict[tuple, list]]:
    """Return the (signature, constants, attributes) that Triton compiles a launch under."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    function = launch.kernel.compiled
    bind = create_function_from_signature(function.signature, function.params, CUDABackend)
    _, found, _ = bind(**launch.arguments)
    signature = {name: kind for name, (kind, _) in zip(function.arg_names, found, strict=True)}
    constants = {
        (i,): launch.arguments[name] for i, name in enumerate(function.arg_names) if signature[name] == "constexpr"
    }
    attributes = {
        (i,): CUDABackend.parse_attr(key)
        for i, (kind, key) in enumerate(found)
        if kind != "constexpr" and isinstance(key, str)
    }
    return signature, constants, attributes


def cases_of(workload: Callable[[torch.dtype], None], dtype: torch.dtype) -> list[Case]:
    """Return the distinct compilations a workload needs, in the order it first needs them."""
    with record_launches() as launches:
        workload(dtype)
    found: dict[str, Case] = {}
    for launch in launches:
        signature, constants, attributes = _specialization(launch)
        parts = []
        for i, (name, kind) in enumerate(signature.items()):
            if kind == "constexpr":
                parts.append(f"{name}={constants[(i,)]}")
            else:
                parts.append(kind + ("/16" if attributes.get((i,)) else ""))
        options = [f"{name}={value}" for name, value in sorted(launch.options.items())]
        label = f"{name_of(launch)}({', '.join(parts + options)})"
        found.setdefault(label, Case(label, launch))
    return list(found.values())


def name_of(launch: Launch) -> str:
    """Return the kernel's file and name."""
    return f"{launch.kernel.function.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"


def wanted() -> dict[int, dict[str, Case]]:
    """Return the cases of each target, by label."""
    halves, brains, floats = torch.float16, torch.bfloat16, torch.float32
    lists = {
        (workload, dtype): cases_of(workload, dtype)
        for workload, dtype in ((full, halves), (full, brains), (representative, halves), (representative, floats))
    }
    chosen = {}
    for target in TARGETS:
        parts = [(full, halves)] if target == 75 else [(full, brains), (representative, halves)]
        chosen[target] = {case.label: case for part in (*parts, (representative, floats)) for case in lists[part]}
    return chosen


def _text_bytes(cubin: bytes) -> int:
    """Return the size of an ELF file's .text sections."""
    offset, size, count, names_index = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = sections[names_index][4]

    def name(section: tuple) -> bytes:
        start = names + section[0]
        return cubin[start : cubin.index(b"\0", start)]

    return sum(section[5] for section in sections if name(section).startswith(b".text"))


def compile_case(case: Case, target: int):
    """Return Triton's compiled kernel of one case for one target. Triton's own errors pass through."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.launch.kernel.compiled, *_specialization(case.launch))
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(case.launch.options))


def read_code(compiled) -> Code:
    """Return what the assembler made of a compiled kernel."""
    from triton import knobs

    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Code(
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        # what a launch asks for beside what the code declares
        numbers["SHARED"] + compiled.metadata.shared,
        _text_bytes(cubin),
        tuple(sorted(set(FORBIDDEN.findall(compiled.asm["ptx"])))),
    )


def source_hash(launch: Launch) -> str:
    """Return the hash a kernel's table entry holds under."""
    return hashlib.sha256(launch.kernel.source().encode()).hexdigest()[:16]


def read_table() -> dict:
    """Return the committed table, or an empty one of this Triton version where it was made with another."""
    import triton

    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    if table.get("triton") != triton.__version__:
        return {"triton": triton.__version__, "kernels": {}}
    return table


def entry_of(table: dict, case: Case, target: int) -> Code | None:
    """Return what the table holds of a case on a target, None where it lacks it."""
    kernel = table["kernels"].get(name_of(case.launch))
    if kernel is None or kernel["source"] != source_hash(case.launch):
        return None
    numbers = kernel["cases"].get(case.label, {}).get(str(target))
    return None if numbers is None else Code(*numbers)


def lacking(table: dict) -> list[tuple[int, Case]]:
    """Return the (target, case) pairs that the table lacks."""
    return [
        (target, case)
        for target, cases in wanted().items()
        for case in cases.values()
        if entry_of(table, case, target) is None
    ]


def _add(table: dict, case: Case, target: int, code: Code) -> None:
    fresh = {"source": source_hash(case.launch), "cases": {}}
    kernel = table["kernels"].setdefault(name_of(case.launch), fresh)
    if kernel["source"] != fresh["source"]:
        kernel.update(fresh)
    numbers = [code.registers, code.stack_bytes, code.shared_bytes, code.code_bytes]
    kernel["cases"].setdefault(case.label, {})[str(target)] = numbers


def write_table(table: dict, keep: Iterable[str]) -> None:
    """Write the table without the cases that nothing needs any more: one line a case."""
    keep = set(keep)
    lines = []
    for name, kernel in sorted(table["kernels"].items()):
        cases = {label: kernel["cases"][label] for label in sorted(kernel["cases"]) if label in keep}
        if not cases:
            continue
        rows = ",\n".join(f"   {json.dumps(label)}: {json.dumps(targets)}" for label, targets in cases.items())
        lines.append(f' {json.dumps(name)}: {{"source": {json.dumps(kernel["source"])}, "cases": {{\n{rows}}}}}')
    note = '"columns": ["registers", "stack bytes", "shared bytes", "code bytes"]'
    text = f'{{"triton": {json.dumps(table["triton"])}, {note}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"
    TABLE.write_text(text, encoding="utf-8")


def one_of_each() -> list[Case]:
    """Return one representative case of every kernel."""
    return list({name_of(case.launch): case for case in reversed(cases_of(representative, torch.float16))}.values())


def update() -> tuple[dict, list[str]]:
    """Compile what the table lacks and write it; return (the table, what fails the gate, a line each)."""
    table = read_table()
    missing = lacking(table)
    failed = []
    for number, (target, case) in enumerate(missing, start=1):
        code = read_code(compile_case(case, target))
        if code.failures():
            failed += [f"sm_{target} {case.label}: {why}" for why in code.failures()]
        else:
            _add(table, case, target, code)
        print(f"\r{number} of {len(missing)} compiled, {len(failed)} failed", end="", file=sys.stderr, flush=True)
    if missing:
        print(file=sys.stderr)
    write_table(table, (label for cases in wanted().values() for label in cases))
    return table, failed


def main() -> int:
    """Bring the table up to date; return 1 where something fails the gate."""
    _, failed = update()
    print("\n".join(failed) or f"{TABLE.name} is complete: {sum(map(len, wanted().values()))} compilations")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
