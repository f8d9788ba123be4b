"""`safelight bench aot`: what the kernels compiled for other GPUs take and do.

Compilation is in kernels/aot/compile_all.py and needs no GPU; what is counted is said in machine_code.py beside it.
"""

from __future__ import annotations

import math

from safelight.kernels.aot import compile_all

# compute capabilities: the oldest that is supported (Turing) and Hopper
QUICK_TARGETS = (75, 90)
FIGURES = ("registers", "stack_bytes", "shared_bytes", "instructions_per_element", "barriers", "gathers", "lookups")
# of the table in a terminal, for FIGURES but registers, and the width
COLUMNS = ("spilled B", "shared B", "instr/elem", "barriers", "gathers", "lookups", "access B")

# kernel -> target -> figure -> maximum over the kernel's compilations, of "width", bytes of the narrowest access to the
# tensors' data, the minimum; "compilations" -> their number
Rows = dict[str, dict[int, dict[str, int]]]


def _add(rows: Rows, kernel: str, target: int, code: compile_all.Code) -> None:
    start = {**dict.fromkeys(FIGURES, 0), "width": code.width, "compilations": 0}
    row = rows.setdefault(kernel, {}).setdefault(target, start)
    row["compilations"] += 1
    for name in FIGURES:
        row[name] = max(row[name], math.ceil(getattr(code, name)))
    row["width"] = min(row["width"], code.width)


def one_of_each() -> tuple[Rows, list[str]]:
    """Compile one case of every kernel for QUICK_TARGETS; return (rows, a line for each failure)."""
    rows: Rows = {}
    failed = []
    for case in compile_all.one_of_each():
        for target in QUICK_TARGETS:
            code = compile_all.read_code(compile_all.compile_case(case, target))
            _add(rows, compile_all.kernel_name(case.launch), target, code)
            failed += [f"sm_{target} {case.label}: {why}" for why in code.failures()]
    return dict(sorted(rows.items())), failed


def whole_table() -> tuple[Rows, list[str]]:
    """Compile what aot.json lacks, store it there, and return (rows of the whole table, a line for each failure)."""
    table, failed = compile_all.update()
    rows: Rows = {}
    # a compilation that failed is not stored
    for target, case, code in compile_all.entries(table):
        _add(rows, compile_all.kernel_name(case.launch), target, code)
    return dict(sorted(rows.items())), failed


def table_rows(rows: Rows, targets: list[int]) -> list[tuple]:
    """Return rows for the terminal: registers by target, number of compilations, and the worst over all targets."""
    return [
        (
            kernel.replace("._", " ").removesuffix("_kernel"),
            *(str(row[target]["registers"]) if target in row else "-" for target in targets),
            f"{sum(figures['compilations'] for figures in row.values()):,}",
            *(f"{max(figures[name] for figures in row.values()):,}" for name in FIGURES[1:]),
            str(min(figures["width"] for figures in row.values())),
        )
        for kernel, row in rows.items()
    ]
