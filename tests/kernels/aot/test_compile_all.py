"""The ahead-of-time gate: aot.json has every compilation, all pass, and bad kernels fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from safelight.kernels.aot import compile_all as aot
from safelight.kernels.aot.machine_code import Code, read_code
from safelight.kernels.aot.workload import representative
from safelight.kernels.triton.jit import Kernel, kernel, record_launches

if TYPE_CHECKING:
    import triton.language as tl

MAX_COMPILED_HERE = 40
COMMAND = "python -m safelight.kernels.aot.compile_all"
ROOT = Path(__file__).parents[3]
# of a made-up compilation, as aot.json has them
FIGURES = (40, 0, 1024, 320, 8, 2, 0, 0, 16, "2 x 16", "1 x 16")
# kernel -> bytes of its narrowest access to data, where less than 8, and why it cannot be more
NARROW = {
    # small tensors: biases and norms, at addresses that are read from a table; int8 remainders
    "adamw8bit._adamw32bit_kernel": 1,
    # a loss mask has one value a pixel, where latents have four; the figures of a sample are 4 bytes each
    "diffusion_loss._diffusion_loss_bwd_kernel": 4,
    "diffusion_loss._partial_losses_kernel": 4,
    "diffusion_loss._finish_losses_kernel": 4,
    # groups of 10 channels: 20 bytes, so that every other group begins 4 bytes past a multiple of 8
    "group_norm_silu._apply_kernel": 4,
    "group_norm_silu._bwd_dx_kernel": 4,
    "group_norm_silu._bwd_reduce_kernel": 4,
    "group_norm_silu._bwd_sums_kernel": 4,
    "group_norm_silu._bwd_whole_kernel": 4,
    "group_norm_silu._group_stats_kernel": 4,
    # two elements a thread, in a kernel that computes for thousands of instructions; its tensors are small
    "noising._noising_kernel": 2,
}
# the schedule's value at a sample's timestep
GATHERING = {"diffusion_loss._finish_losses_kernel"}
CONSTRAINTS = ROOT / "constraints.txt"


@pytest.fixture(scope="module")
def results() -> dict:
    return aot.read_results()


@pytest.fixture(scope="module")
def required() -> dict:
    return aot.required_cases()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Use a fresh Triton cache, so that these tests neither read nor fill the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def all_kernels() -> set[str]:
    """Return every kernel in kernels/ that host code launches; unlike helpers', its name ends in _kernel."""
    import importlib

    kernels = set()
    for path in sorted(ROOT.joinpath("kernels").rglob("*.py")):
        module = importlib.import_module("safelight." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
        kernels |= {
            f"{path.stem}.{name}"
            for name, value in vars(module).items()
            if isinstance(value, Kernel) and name.endswith("_kernel") and value.function.__module__ == module.__name__
        }
    return kernels


def test_the_results_are_of_the_pinned_triton():
    """With another Triton the tests that read the results are skipped; with the pinned one they must be up to date."""
    (pinned,) = re.findall(r"^triton==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert json.loads(aot.RESULTS.read_text())["triton"] == pinned


def test_every_kernel_is_compiled(required):
    assert len(all_kernels()) >= 19
    for target, cases in required.items():
        assert {aot.kernel_name(case.launch) for case in cases.values()} == all_kernels(), target


def test_every_required_compilation_is_in_the_results_and_passes(results, required):
    """A few missing ones are compiled here."""
    if not results["kernels"]:
        pytest.skip(f"{aot.RESULTS.name} was made with another Triton version")
    missing = aot.missing_cases(results)
    assert len(missing) <= MAX_COMPILED_HERE, f"{aot.RESULTS.name} lacks {len(missing)} compilations; run {COMMAND}"
    for target, case in missing:
        assert read_code(aot.compile_case(case, target)).failures() == [], case.label
    entries = aot.entries(results)
    assert [(target, case.label) for target, case, code in entries if code.failures()] == []
    # with more than 168 registers a thread, fewer than three programs of four warps fit on an SM
    assert [(target, case.label) for target, case, code in entries if code.registers > 168] == []


def test_no_kernel_is_worse_than_its_limits(results):
    """limits.toml is changed by hand, or by --loosen, where a kernel is meant to get worse."""
    if not results["kernels"]:
        pytest.skip(f"{aot.RESULTS.name} was made with another Triton version")
    kernels = aot.worst((case, code) for _, case, code in aot.entries(results))
    assert aot.beyond_limits(kernels, aot.read_limits()) == []
    assert aot.looser_than_needed(kernels, aot.read_limits()) == [], f"run {COMMAND}, which tightens them"


def test_data_is_accessed_in_wide_words(results):
    """At least 8 bytes, but where a reason stands here; GATHERING kernels alone load at addresses that they loaded."""
    if not results["kernels"]:
        pytest.skip(f"{aot.RESULTS.name} was made with another Triton version")
    kernels = aot.worst((case, code) for _, case, code in aot.entries(results))
    assert {name: row["width"] for name, row in kernels.items() if row["width"] < 8} == NARROW
    assert {name for name, row in kernels.items() if row["gathers"]} == GATHERING


def test_bf16_is_compiled_for_all_but_sm_75(required):
    """A T4 has no bf16; precision auto selects fp16 there."""
    assert not any("bf16" in label for label in required[75])
    assert all(any("bf16" in label for label in cases) for target, cases in required.items() if target > 75)


def alternating() -> list:
    """Return one case of each kernel, each with one of two targets in turn."""
    cases = aot.one_of_each()
    return [
        pytest.param(case, (75, 90)[number % 2], id=aot.kernel_name(case.launch)) for number, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("case", "target"), alternating())
def test_one_compilation_of_each_kernel(results, case, target):
    """Compiled here it passes, and is no worse than the committed figures."""
    compiled = aot.compile_case(case, target)
    # Triton 3.6 distributes three-dimensional pointer tiles badly: up to 242 registers instead of 72 (docs/log.md)
    assert not re.search(r"tensor<\d+x\d+x\d+x!tt\.ptr", compiled.asm["ttir"])
    code = read_code(compiled)
    assert code.failures() == []
    assert 0 < code.registers <= 255
    assert code.instructions > 0
    entry = aot.entry_of(results, case, target)
    if entry is not None:
        assert code.registers <= entry.registers
        assert code.shared_bytes <= entry.shared_bytes
        assert (code.barriers, code.gathers, code.width) == (entry.barriers, entry.gathers, entry.width)


@pytest.mark.parametrize("target", [75, 90])
def test_noising_has_no_fused_multiply_add(target):
    """Equal bits require every product and sum to be rounded separately (with a logvar, exp needs no equal bits)."""
    with record_launches() as launches:
        representative(torch.float16)
    launch = next(x for x in launches if x.kernel.__name__ == "_noising_kernel" and not x.arguments["HAS_LOGVAR"])
    ptx = aot.compile_case(aot.Case("noising", launch), target).asm["ptx"]
    assert not re.findall(r"\bfma\S*", ptx)
    assert not re.findall(r"\S*\.ftz\S*", ptx)
    assert len(re.findall(r"\bmul\.rn\.f32", ptx)) > 20
    # the assembler may fuse a multiplication without .rn
    assert not re.findall(r"\b(?:mul|add|sub)\.f32", ptx)


@kernel
def _double_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float64)
    tl.store(x_ptr + i, (x * x * x).to(tl.float32))


@kernel
def _matrix_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = x_ptr + i[:, None] * BLOCK + i[None, :]
    x = tl.load(at)
    tl.store(at, tl.dot(x, x).to(tl.float16))


@kernel
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c = tl.load(x_ptr + i), tl.load(x_ptr + BLOCK + i), tl.load(x_ptr + 2 * BLOCK + i)
    for _ in range(10):
        a, b, c = tl.exp(b) * c, tl.exp(c) * a, tl.exp(a) * b
    tl.store(x_ptr + i, a + b + c)


@kernel
def _sharing_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i[:, None] + 256 * i[None, :], tl.load(x_ptr + 256 * i[:, None] + i[None, :]))


@pytest.mark.parametrize(
    ("bad", "dtype", "block", "message"),
    [
        (_double_kernel, torch.float32, 128, "f64"),
        (_matrix_kernel, torch.float16, 32, "mma"),
        (_spilling_kernel, torch.float32, 16384, "spilled"),
        (_sharing_kernel, torch.int64, 256, "shared memory, limit 65536"),
    ],
)
def test_bad_kernels_fail_the_gate(bad, dtype, block, message):
    with record_launches() as launches:
        bad[(1,)](torch.empty(8, device="meta", dtype=dtype), BLOCK=block)
    code = read_code(aot.compile_case(aot.Case(bad.__name__, launches[0]), 80))
    assert message in " ".join(code.failures())


def test_an_entry_is_valid_only_for_its_source(required, monkeypatch):
    case = next(case for case in required[90].values() if "_geglu_fwd" in case.label)
    entry = {"source": aot.source_hash(case.launch), "cases": {case.label: {"90": list(FIGURES)}}}
    results = {"triton": "x", "kernels": {aot.kernel_name(case.launch): entry}}
    assert aot.entry_of(results, case, 90) == Code(*FIGURES)
    assert aot.entry_of(results, case, 75) is None
    monkeypatch.setattr(Kernel, "source", lambda self: "another")
    assert aot.entry_of(results, case, 90) is None


def test_results_of_another_triton_are_ignored(tmp_path, monkeypatch):
    import triton

    path = tmp_path / "aot.json"
    path.write_text('{"triton": "1.0.0", "kernels": {"a.b": {}}}')
    monkeypatch.setattr(aot, "RESULTS", path)
    empty = {"triton": triton.__version__, "columns": aot.COLUMNS, "kernels": {}}
    assert aot.read_results() == empty
    path.write_text(json.dumps({**empty, "columns": ["registers"], "kernels": {"a.b": {}}}))
    assert aot.read_results() == empty


def test_results_are_written_and_read_back(tmp_path, monkeypatch, required):
    monkeypatch.setattr(aot, "RESULTS", tmp_path / "aot.json")
    cases = [case for case in required[80].values() if "geglu" in case.label]
    results = aot.read_results()
    for number, case in enumerate(cases):
        for target in (80, 86):
            aot._add(results, case, target, Code(30 + number, *FIGURES[1:]))
    aot.write_results(results, [case.label for case in cases[1:]])
    assert aot.RESULTS.read_text().count('"80 86"') == len(cases) - 1
    again = aot.read_results()
    assert aot.entry_of(again, cases[0], 80) is None
    assert [aot.entry_of(again, case, 80).registers for case in cases[1:]] == [31 + i for i in range(len(cases) - 1)]
