"""`safelight bench aot`: registers, spills, shared memory and code size of the kernels compiled for other GPUs.

Compilation is in kernels/aot/compile_all.py and needs no GPU.
"""

from __future__ import annotations

from safelight.kernels.aot import compile_all

# compute capabilities: the oldest that is supported (Turing) and Hopper
QUICK_TARGETS = (75, 90)
FIGURES = ("registers", "stack_bytes", "shared_bytes", "code_bytes")

# kernel -> target -> figure -> maximum over the kernel's compilations; "compilations" -> their number
Rows = dict[str, dict[int, dict[str, int]]]


def _add(rows: Rows, kernel: str, target: int, code: compile_all.Code) -> None:
    row = rows.setdefault(kernel, {}).setdefault(target, dict.fromkeys((*FIGURES, "compilations"), 0))
    row["compilations"] += 1
    for name in FIGURES:
        row[name] = max(row[name], getattr(code, name))


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
    for target, cases in compile_all.required_cases().items():
        for case in cases.values():
            code = compile_all.entry_of(table, case, target)
            # a compilation that failed is not stored
            if code is not None:
                _add(rows, compile_all.kernel_name(case.launch), target, code)
    return dict(sorted(rows.items())), failed


def table_rows(rows: Rows, targets: list[int]) -> list[tuple]:
    """Return rows for the terminal: registers by target, number of compilations, and maxima over all targets."""
    return [
        (
            kernel.replace("._", " ").removesuffix("_kernel"),
            *(str(row[target]["registers"]) if target in row else "-" for target in targets),
            f"{sum(figures['compilations'] for figures in row.values()):,}",
            *(f"{max(figures[name] for figures in row.values()):,}" for name in ("stack_bytes", "shared_bytes")),
            f"{max(figures['code_bytes'] for figures in row.values()) / 1024:.1f}",
        )
        for kernel, row in rows.items()
    ]
