"""The ahead-of-time gate: compiles every kernel for every GPU generation, on a machine without a GPU.

Triton can compile for any target without the device. kernels/aot/workload.py runs each op on meta tensors; the launches
are recorded with exactly the arguments a GPU would see, and compiled for sm_75 to sm_120. What the code does is read by
machine_code.py and committed in kernels/aot/aot.json. An entry is valid as long as the kernel's code (comments and
docstrings aside) and Triton's version are the same.

kernels/aot/limits.toml holds the worst of each kernel's figures. A kernel that gets worse fails, here and in the tests;
one that gets better has its limits tightened.

    python -m safelight.kernels.aot.compile_all            compile what aot.json lacks, update it, print what fails
    python -m safelight.kernels.aot.compile_all --loosen   the same, and accept kernels that got worse

Shapes of real models are compiled in the dtype that a GPU trains in (fp16 on sm_75, which has no bf16; bf16 from sm_80
on), a few representative ones in the other dtypes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.kernels.aot.machine_code import Code, read_code
from safelight.kernels.aot.workload import full, odd, representative, tiny
from safelight.kernels.triton.jit import Launch, record_launches

RESULTS = Path(__file__).with_name("aot.json")
LIMITS = Path(__file__).with_name("limits.toml")
COLUMNS = [field.name for field in dataclasses.fields(Code) if field.name != "forbidden"]
TARGETS = (75, 80, 86, 89, 90, 100, 120)
TINY_TARGETS = (75, 90)  # the tiny models' launches are compiled for these: they are many, and their times matter less


@dataclass(frozen=True)
class Case:
    """One compilation, whatever the target.

    label: kernel, argument types and constants; launch: one that needs it; is_odd: whether only shapes need it that no
    vectorized access fits, or tiny models. Its figures count for no limit.
    """

    label: str
    launch: Launch
    is_odd: bool = False


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


def cases_of(workload: Callable[[torch.dtype], None], dtype: torch.dtype, is_odd: bool = False) -> list[Case]:
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
        cases.setdefault(label, Case(label, launch, is_odd))
    return list(cases.values())


def kernel_name(launch: Launch) -> str:
    """Return a launch's kernel as file.name: geglu._geglu_fwd_kernel."""
    return f"{launch.kernel.function.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"


@functools.cache
def required_cases() -> dict[int, dict[str, Case]]:
    """Return target -> label -> case of everything that must compile."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32

    @functools.cache
    def cases(workload: Callable[[torch.dtype], None], dtype: torch.dtype) -> list[Case]:
        return cases_of(workload, dtype, is_odd=workload in (odd, tiny))

    by_target = {}
    for target in TARGETS:
        parts = [(full, fp16)] if target == 75 else [(full, bf16), (representative, fp16)]
        # what is not odd comes last and so decides where both need the same
        aside = [(odd, dtype) for _, dtype in (*parts, (representative, fp32))]
        aside += [(tiny, parts[0][1])] if target in TINY_TARGETS else []
        parts = [*aside, *parts, (representative, fp32)]
        by_target[target] = {case.label: case for part in parts for case in cases(*part)}
    return by_target


def compile_case(case: Case, target: int):
    """Return Triton's compiled kernel of a case for a target. Triton's own errors propagate."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.launch.kernel.compiled, *_specialization(case.launch))
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(case.launch.options))


def source_hash(launch: Launch) -> str:
    """Return a hash of the kernel's code; an entry with another hash is out of date."""
    return hashlib.sha256(launch.kernel.source().encode()).hexdigest()[:16]


def read_results() -> dict:
    """Return the committed results, or empty ones if another version of Triton made them, or other columns are read."""
    import triton

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if results.get("triton") != triton.__version__ or results.get("columns") != COLUMNS:
        return {"triton": triton.__version__, "columns": COLUMNS, "kernels": {}}
    for kernel in results["kernels"].values():
        for label, targets in kernel["cases"].items():
            kernel["cases"][label] = {target: row for names, row in targets.items() for target in names.split()}
    return results


def entry_of(results: dict, case: Case, target: int) -> Code | None:
    """Return the figures of a case on a target, None if they are missing or out of date."""
    kernel = results["kernels"].get(kernel_name(case.launch))
    if kernel is None or kernel["source"] != source_hash(case.launch):
        return None
    numbers = kernel["cases"].get(case.label, {}).get(str(target))
    return None if numbers is None else Code(*numbers)


def entries(results: dict) -> list[tuple[int, Case, Code]]:
    """Return every required case that has a valid entry, as (target, case, its figures)."""
    return [
        (target, case, code)
        for target, cases in required_cases().items()
        for case in cases.values()
        if (code := entry_of(results, case, target)) is not None
    ]


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
    kernel["cases"].setdefault(case.label, {})[str(target)] = [getattr(code, name) for name in COLUMNS]


def _by_figures(targets: dict[str, list]) -> dict[str, list]:
    """Return "75 80" -> row for target -> row: targets whose code has equal figures share a row."""
    rows: dict[str, list[str]] = {}
    for target in sorted(targets, key=int):
        rows.setdefault(json.dumps(targets[target]), []).append(target)
    return {" ".join(names): json.loads(row) for row, names in rows.items()}


def write_results(results: dict, labels: Iterable[str]) -> None:
    """Write the results of the cases with these labels, one line each, dropping all others."""
    labels = set(labels)
    lines = []
    for name, kernel in sorted(results["kernels"].items()):
        cases = {label: kernel["cases"][label] for label in sorted(kernel["cases"]) if label in labels}
        if not cases:
            continue
        rows = ",\n".join(
            f"   {json.dumps(label)}: {json.dumps(_by_figures(targets))}" for label, targets in cases.items()
        )
        lines.append(f' {json.dumps(name)}: {{"source": {json.dumps(kernel["source"])}, "cases": {{\n{rows}}}}}')
    note = f'"columns": {json.dumps(COLUMNS)}'
    text = f'{{"triton": {json.dumps(results["triton"])}, {note}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"
    RESULTS.write_text(text, encoding="utf-8")


def worst(figures: Iterable[tuple[Case, Code]]) -> dict[str, dict[str, int]]:
    """Return kernel -> the worst of its figures over compilations, those of odd shapes left out."""
    kernels: dict[str, dict[str, int]] = {}
    for case, code in figures:
        if case.is_odd:
            continue
        mine = {
            "registers": code.registers,
            "instructions_per_element": math.ceil(code.instructions_per_element),
            "barriers": code.barriers,
            "gathers": code.gathers,
            "lookups": code.lookups,
            "width": code.width,
        }
        row = kernels.setdefault(kernel_name(case.launch), mine)
        row.update({name: (min if name == "width" else max)(row[name], n) for name, n in mine.items()})
    return kernels


def read_limits() -> dict[str, dict[str, int]]:
    """Return the committed limits, kernel -> figure -> the worst it may be."""
    return tomllib.loads(LIMITS.read_text(encoding="utf-8")) if LIMITS.exists() else {}


def write_limits(limits: dict[str, dict[str, int]]) -> None:
    """Write the limits, a kernel a line."""
    lines = [
        "# Written by kernels/aot/compile_all.py: the worst of each kernel's figures in aot.json, over all its",
        "# compilations but those of odd shapes. machine_code.py says what is counted. width: bytes of the narrowest",
        "# access to the tensors' data, the smallest is the worst.",
        *(
            f"{json.dumps(name)} = {{ {', '.join(f'{key} = {value}' for key, value in row.items())} }}"
            for name, row in sorted(limits.items())
        ),
    ]
    LIMITS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _allowed(name: str, limit: int) -> float:
    """Return the worst that is accepted at a limit: assemblers differ by some registers and instructions."""
    return {"registers": limit + 8, "instructions_per_element": 1.1 * limit}.get(name, limit)


def beyond_limits(kernels: dict[str, dict[str, int]], limits: dict[str, dict[str, int]]) -> list[str]:
    """Return one message for each figure that is worse than its limit allows. A kernel without limits has none."""
    messages = []
    for kernel, row in sorted(kernels.items()):
        for name, limit in limits.get(kernel, {}).items():
            is_worse = row[name] < limit if name == "width" else row[name] > _allowed(name, limit)
            if is_worse:
                messages.append(f"{kernel}: {name.replace('_', ' ')} {row[name]}, limit {limit}")
    return messages


def looser_than_needed(kernels: dict[str, dict[str, int]], limits: dict[str, dict[str, int]]) -> list[str]:
    """Return one message for each limit that is missing, or so far from the figure that a loss would not be noticed."""
    messages = []
    for kernel, row in sorted(kernels.items()):
        for name, n in row.items():
            limit = limits.get(kernel, {}).get(name)
            if limit is None:
                messages.append(f"{kernel}: no limit of {name.replace('_', ' ')}")
            elif (n > limit) if name == "width" else limit > _allowed(name, n):
                messages.append(f"{kernel}: {name.replace('_', ' ')} {n}, limit {limit}")
    return messages


def _new_limits(kernels: dict[str, dict[str, int]], loosen: bool) -> dict[str, dict[str, int]]:
    """Return the limits after a compilation: kept, tightened where a kernel got better, loosened only if asked."""
    before, limits = read_limits(), {}
    for kernel, row in kernels.items():
        old = {} if loosen else before.get(kernel, {})
        limits[kernel] = {
            name: n if name not in old else max(n, old[name]) if name == "width" else min(n, old[name])
            for name, n in row.items()
        }
    return limits


def one_of_each() -> list[Case]:
    """Return one representative case of every kernel."""
    return list({kernel_name(case.launch): case for case in reversed(cases_of(representative, torch.float16))}.values())


def update(loosen: bool = False) -> tuple[dict, list[str]]:
    """Compile the missing cases and write aot.json and limits.toml; return (results, messages of what fails the gate).

    loosen: accept kernels whose figures got worse.
    """
    results = read_results()
    missing = missing_cases(results)
    failed = []
    try:
        for number, (target, case) in enumerate(missing, start=1):
            code = read_code(compile_case(case, target))
            if code.failures():
                failed += [f"sm_{target} {case.label}: {why}" for why in code.failures()]
            else:
                _add(results, case, target, code)
            print(f"\r{number} of {len(missing)} compiled, {len(failed)} failed", end="", file=sys.stderr, flush=True)
    finally:
        # whatever ends it, what is compiled need not be compiled again
        write_results(results, (label for cases in required_cases().values() for label in cases))
    if missing:
        print(file=sys.stderr)
    kernels = worst((case, code) for _, case, code in entries(results))
    limits = _new_limits(kernels, loosen)
    write_limits(limits)
    return results, failed + beyond_limits(kernels, limits)


def main(arguments: list[str]) -> int:
    """Update aot.json and limits.toml; return 1 if anything fails the gate, else 0."""
    _, failed = update(loosen=arguments == ["--loosen"])
    print("\n".join(failed) or f"{RESULTS.name} is complete: {sum(map(len, required_cases().values()))} compilations")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
