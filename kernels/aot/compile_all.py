"""The ahead-of-time gate: compiles every kernel for every GPU generation, on a machine without a GPU.

Triton can compile for any target without the device. kernels/aot/workload.py runs each op on meta tensors; the launches
are recorded with exactly the arguments a GPU would see, and compiled for sm_75 to sm_120. The results are committed in
kernels/aot/aot.json: registers per thread, stack bytes (spilled registers), shared memory, code bytes. An entry is
valid as long as the kernel's code (comments and docstrings aside) and Triton's version are the same.

    python -m safelight.kernels.aot.compile_all            compile what aot.json lacks, update it, print what fails

All shapes are compiled in the dtype a GPU trains in (fp16 on sm_75, which has no bf16; bf16 from sm_80 on), a few
representative ones in the other dtypes.
"""

from __future__ import annotations

import functools
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

RESULTS = Path(__file__).with_name("aot.json")
TARGETS = (75, 80, 86, 89, 90, 100, 120)
MAX_SHARED_BYTES = 64 * 1024  # the limit of sm_75, the smallest
# double precision and tensor cores: an elementwise kernel or a reduction that uses either has a bug
FORBIDDEN = re.compile(r"\b(?:[a-z0-9.]+\.f64|(?:wmma|mma|wgmma|tcgen05)\.[a-z0-9_.]+)")


@dataclass(frozen=True)
class Case:
    """One compilation, whatever the target. label: kernel, argument types and constants; launch: one that needs it."""

    label: str
    launch: Launch


@dataclass(frozen=True)
class Code:
    """Figures of the assembled code. registers: per thread; forbidden: fp64 and tensor-core instructions."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    code_bytes: int
    forbidden: tuple[str, ...] = ()

    def failures(self) -> list[str]:
        """Return why the code fails the gate, one message each."""
        messages = []
        if self.stack_bytes:
            messages.append(f"{self.stack_bytes} bytes of spilled registers per thread")
        if self.shared_bytes > MAX_SHARED_BYTES:
            messages.append(f"{self.shared_bytes} bytes of shared memory, limit {MAX_SHARED_BYTES}")
        if self.forbidden:
            messages.append(f"forbidden instructions: {', '.join(self.forbidden)}")
        return messages


def _specialization(launch: Launch) -> tuple[dict[str, str], dict[tuple, object], dict[tuple, list]]:
    """Return the (signature, constants, attributes) that Triton specializes a launch for."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    function = launch.kernel.compiled
    bind = create_function_from_signature(function.signature, function.params, CUDABackend)
    _, specializations, _ = bind(**launch.arguments)
    signature = {name: kind for name, (kind, _) in zip(function.arg_names, specializations, strict=True)}
    constants = {
        (i,): launch.arguments[name] for i, name in enumerate(function.arg_names) if signature[name] == "constexpr"
    }
    attributes = {
        (i,): CUDABackend.parse_attr(key)
        for i, (kind, key) in enumerate(specializations)
        if kind != "constexpr" and isinstance(key, str)
    }
    return signature, constants, attributes


def cases_of(workload: Callable[[torch.dtype], None], dtype: torch.dtype) -> list[Case]:
    """Return the distinct compilations that a workload needs, in order of first use."""
    with record_launches() as launches:
        workload(dtype)
    cases: dict[str, Case] = {}
    for launch in launches:
        signature, constants, attributes = _specialization(launch)
        parts = []
        for i, (name, kind) in enumerate(signature.items()):
            if kind == "constexpr":
                parts.append(f"{name}={constants[(i,)]}")
            else:
                parts.append(kind + ("/16" if attributes.get((i,)) else ""))
        options = [f"{name}={value}" for name, value in sorted(launch.options.items())]
        label = f"{kernel_name(launch)}({', '.join(parts + options)})"
        cases.setdefault(label, Case(label, launch))
    return list(cases.values())


def kernel_name(launch: Launch) -> str:
    """Return a launch's kernel as file.name: geglu._geglu_fwd_kernel."""
    return f"{launch.kernel.function.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"


@functools.cache
def required_cases() -> dict[int, dict[str, Case]]:
    """Return target -> label -> case of everything that must compile."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    cases = {
        (workload, dtype): cases_of(workload, dtype)
        for workload, dtype in ((full, fp16), (full, bf16), (representative, fp16), (representative, fp32))
    }
    by_target = {}
    for target in TARGETS:
        parts = [(full, fp16)] if target == 75 else [(full, bf16), (representative, fp16)]
        by_target[target] = {case.label: case for part in (*parts, (representative, fp32)) for case in cases[part]}
    return by_target


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
    """Return Triton's compiled kernel of a case for a target. Triton's own errors propagate."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.launch.kernel.compiled, *_specialization(case.launch))
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(case.launch.options))


def read_code(compiled) -> Code:
    """Return the figures of a compiled kernel, read with cuobjdump."""
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
        # static shared memory, and the dynamic part requested at launch
        numbers["SHARED"] + compiled.metadata.shared,
        _text_bytes(cubin),
        tuple(sorted(set(FORBIDDEN.findall(compiled.asm["ptx"])))),
    )


def source_hash(launch: Launch) -> str:
    """Return a hash of the kernel's code; an entry with another hash is out of date."""
    return hashlib.sha256(launch.kernel.source().encode()).hexdigest()[:16]


def read_results() -> dict:
    """Return the committed results, or empty ones if they were made with another Triton version."""
    import triton

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if results.get("triton") != triton.__version__:
        return {"triton": triton.__version__, "kernels": {}}
    return results


def entry_of(results: dict, case: Case, target: int) -> Code | None:
    """Return the figures of a case on a target, None if they are missing or out of date."""
    kernel = results["kernels"].get(kernel_name(case.launch))
    if kernel is None or kernel["source"] != source_hash(case.launch):
        return None
    numbers = kernel["cases"].get(case.label, {}).get(str(target))
    return None if numbers is None else Code(*numbers)


def missing_cases(results: dict) -> list[tuple[int, Case]]:
    """Return the (target, case) pairs that have no valid entry."""
    return [
        (target, case)
        for target, cases in required_cases().items()
        for case in cases.values()
        if entry_of(results, case, target) is None
    ]


def _add(results: dict, case: Case, target: int, code: Code) -> None:
    fresh = {"source": source_hash(case.launch), "cases": {}}
    kernel = results["kernels"].setdefault(kernel_name(case.launch), fresh)
    if kernel["source"] != fresh["source"]:
        kernel.update(fresh)
    numbers = [code.registers, code.stack_bytes, code.shared_bytes, code.code_bytes]
    kernel["cases"].setdefault(case.label, {})[str(target)] = numbers


def write_results(results: dict, labels: Iterable[str]) -> None:
    """Write the results of the cases with these labels, one line each, dropping all others."""
    labels = set(labels)
    lines = []
    for name, kernel in sorted(results["kernels"].items()):
        cases = {label: kernel["cases"][label] for label in sorted(kernel["cases"]) if label in labels}
        if not cases:
            continue
        rows = ",\n".join(f"   {json.dumps(label)}: {json.dumps(targets)}" for label, targets in cases.items())
        lines.append(f' {json.dumps(name)}: {{"source": {json.dumps(kernel["source"])}, "cases": {{\n{rows}}}}}')
    note = '"columns": ["registers", "stack bytes", "shared bytes", "code bytes"]'
    text = f'{{"triton": {json.dumps(results["triton"])}, {note}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"
    RESULTS.write_text(text, encoding="utf-8")


def one_of_each() -> list[Case]:
    """Return one representative case of every kernel."""
    return list({kernel_name(case.launch): case for case in reversed(cases_of(representative, torch.float16))}.values())


def update() -> tuple[dict, list[str]]:
    """Compile the missing cases and write aot.json; return (results, messages of cases that fail the gate)."""
    results = read_results()
    missing = missing_cases(results)
    failed = []
    for number, (target, case) in enumerate(missing, start=1):
        code = read_code(compile_case(case, target))
        if code.failures():
            failed += [f"sm_{target} {case.label}: {why}" for why in code.failures()]
        else:
            _add(results, case, target, code)
        print(f"\r{number} of {len(missing)} compiled, {len(failed)} failed", end="", file=sys.stderr, flush=True)
    if missing:
        print(file=sys.stderr)
    write_results(results, (label for cases in required_cases().values() for label in cases))
    return results, failed


def main() -> int:
    """Update aot.json; return 1 if anything fails the gate, else 0."""
    _, failed = update()
    print("\n".join(failed) or f"{RESULTS.name} is complete: {sum(map(len, required_cases().values()))} compilations")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
