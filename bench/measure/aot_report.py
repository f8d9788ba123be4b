"""`safelight bench aot`: what the assembler made of the kernels, for cards that are not here (kernels/aot/compile_all.py)."""

from __future__ import annotations

from safelight.kernels.aot import compile_all as aot

# the oldest card that is supported, and the newest whose code most people will run
QUICK_TARGETS = (75, 90)
FIGURES = ("registers", "stack_bytes", "shared_bytes", "code_bytes")

# kernel -> target -> figure -> the largest of its compilations, and their number
Rows = dict[str, dict[int, dict[str, int]]]


def _add(rows: Rows, kernel: str, target: int, code: aot.Code) -> None:
    row = rows.setdefault(kernel, {}).setdefault(target, dict.fromkeys((*FIGURES, "compilations"), 0))
    row["compilations"] += 1
    for name in FIGURES:
        row[name] = max(row[name], getattr(code, name))


def one_of_each() -> tuple[Rows, list[str]]:
    """Compile one case of every kernel for two cards; return (rows, what fails the gate)."""
    rows: Rows = {}
    failed = []
    for case in aot.one_of_each():
        for target in QUICK_TARGETS:
            code = aot.read_code(aot.compile_case(case, target))
            _add(rows, aot.kernel_name(case.launch), target, code)
            failed += [f"sm_{target} {case.label}: {why}" for why in code.failures()]
    return dict(sorted(rows.items())), failed


def all_cases() -> tuple[Rows, list[str]]:
    """Compile the cases that aot.json lacks, update it, and return (rows of all cases, what fails the gate)."""
    results, failed = aot.update()
    rows: Rows = {}
    for target, cases in aot.required_cases().items():
        for case in cases.values():
            code = aot.entry_of(results, case, target)
            # a case that fails the gate has no entry
            if code is not None:
                _add(rows, aot.kernel_name(case.launch), target, code)
    return dict(sorted(rows.items())), failed


def table(rows: Rows, targets: list[int]) -> list[tuple]:
    """Return rows for the terminal: registers by target, then the number of compilations and the worst of all targets."""
    return [
        (
            kernel.replace("._", " ").removesuffix("_kernel"),
            *(str(row[target]["registers"]) if target in row else "-" for target in targets),
            f"{sum(found['compilations'] for found in row.values()):,}",
            *(f"{max(found[name] for found in row.values()):,}" for name in ("stack_bytes", "shared_bytes")),
            f"{max(found['code_bytes'] for found in row.values()) / 1024:.1f}",
        )
        for kernel, row in rows.items()
    ]
