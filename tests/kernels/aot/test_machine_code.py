"""Counts of compiled kernels: against what nvdisasm reads, and in kernels whose counts are known."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
import torch

from safelight.kernels.aot import compile_all as aot
from safelight.kernels.aot import machine_code
from safelight.kernels.aot.machine_code import Code, read_code
from safelight.kernels.triton.jit import kernel, record_launches

if TYPE_CHECKING:
    import triton.language as tl


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(function, *arguments, target: int = 90, **options):
    with record_launches() as launches:
        function[(1,)](*arguments, **options)
    return aot.compile_case(aot.Case(function.__name__, launches[0]), target)


def meta(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(4096, device="meta", dtype=dtype)


@kernel
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@kernel
def _table_kernel(x_ptr, table_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(table_ptr + tl.load(x_ptr + i).to(tl.int32)))


@kernel
def _search_kernel(x_ptr, bounds_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    low = tl.full((BLOCK,), 0, tl.int32)
    for step in range(8):
        middle = low + (128 >> step)
        low = tl.where(tl.load(bounds_ptr + middle) <= x, middle, low)
    tl.store(y_ptr + i, low)


@kernel
def _two_loops_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        value = tl.load(x_ptr + start + i)
        total += value
    for start in range(0, n, BLOCK):
        value = start + i
        tl.store(y_ptr + value, tl.load(x_ptr + value) - total)


@kernel
def _carried_kernel(x_ptr, next_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    for _ in range(n):
        at = tl.load(next_ptr + at)
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + at))


@kernel
def _pointer_kernel(addresses_ptr, like_ptr, BLOCK: tl.constexpr):
    x_ptr = tl.load(addresses_ptr + tl.program_id(0)).to(tl.pointer_type(like_ptr.dtype.element_ty))
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2.0 * tl.load(x_ptr + i))


@kernel
def _lookup_kernel(x_ptr, table_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    table = tl.load(table_ptr + tl.arange(0, 256))
    tl.store(y_ptr + i, tl.gather(table, tl.load(x_ptr + i).to(tl.int32), 0))


@kernel
def _row_sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.reduce(tl.load(x_ptr + i), 0, tl.standard._sum_combine))


def test_a_vectorized_copy():
    """Four elements a thread, each 2 bytes: one access of 8 bytes each way, if 16 divides n; else one an element."""
    code = read_code(compiled(_copy_kernel, meta(torch.float16), meta(torch.float16), 4096, BLOCK=512))
    assert (code.elements, code.width, code.loads, code.stores) == (4, 8, "1 x 8", "1 x 8")
    assert (code.barriers, code.gathers, code.lookups, code.failures()) == (0, 0, 0, [])
    odd = read_code(compiled(_copy_kernel, meta(torch.float16), meta(torch.float16), 4097, BLOCK=512))
    assert (odd.elements, odd.width, odd.loads, odd.stores) == (4, 2, "4 x 2", "4 x 2")
    assert odd.instructions_per_element > code.instructions_per_element


def test_gathers_are_loads_at_loaded_addresses():
    arguments = meta(torch.uint8), meta(torch.float32), meta(torch.float32)
    code = read_code(compiled(_table_kernel, *arguments, BLOCK=1024))
    assert (code.elements, code.gathers, code.lookups) == (8, 8, 0)
    assert code.width == 4
    # the loop that searches is counted once, or eight times where Triton unrolls it
    search = read_code(compiled(_search_kernel, *(meta(torch.float32),) * 2, meta(torch.int32), BLOCK=1024))
    assert search.gathers == 8


def test_loops_carry_loaded_addresses_and_share_no_names():
    two = read_code(compiled(_two_loops_kernel, meta(torch.float32), meta(torch.float32), 4096, BLOCK=1024))
    assert two.gathers == 0
    arguments = meta(torch.float32), meta(torch.int32), meta(torch.float32)
    # the load in the loop and the one after it, 8 elements a thread each
    assert read_code(compiled(_carried_kernel, *arguments, 5, BLOCK=1024)).gathers == 16


def test_an_address_that_one_pointer_gives_to_a_tile_is_no_gather():
    code = read_code(compiled(_pointer_kernel, meta(torch.int64), meta(torch.float32), BLOCK=512))
    assert code.gathers == 0
    # Triton knows no alignment of an address that is loaded
    assert (code.width, code.loads) == (4, "1 x 8, 4 x 4")


def test_lookups_are_in_a_table_that_the_program_holds():
    code = read_code(compiled(_lookup_kernel, meta(torch.uint8), meta(torch.float32), meta(torch.float32), BLOCK=1024))
    assert (code.gathers, code.lookups) == (0, 8)


def test_a_parameter_among_large_tiles_does_not_count_as_data():
    """The sum of a row is stored 4 bytes wide; its row is loaded 16 bytes wide."""
    code = read_code(compiled(_row_sum_kernel, meta(torch.float32), meta(torch.float32), BLOCK=2048))
    assert (code.width, code.loads, code.stores) == (16, "4 x 16", "1 x 4")
    assert code.barriers >= 1


@pytest.mark.parametrize("target", [75, 90, 120])
def test_instructions_and_barriers_are_those_that_nvdisasm_reads(target, tmp_path):
    from triton import knobs

    kernels = [
        compiled(_row_sum_kernel, *(meta(torch.float32),) * 2, target=target, BLOCK=2048),
        compiled(_copy_kernel, *(meta(torch.float16),) * 2, 4097, target=target, BLOCK=512),
    ]
    for one in kernels:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(one.asm["cubin"])
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)", text)
        while names[-1] == "NOP":
            names.pop()
        assert names.pop() == "BRA"
        code = read_code(one)
        assert code.instructions == len(names)
        assert code.barriers == sum(name.startswith("BAR") for name in names)


def test_a_while_loop_is_refused():
    with pytest.raises(ValueError, match="while loop"):
        machine_code.read_tiles("%0 = scf.while (%a = %b)")


def code_of(**figures) -> Code:
    usual = {"registers": 40, "stack_bytes": 0, "shared_bytes": 0, "instructions": 400, "elements": 8, "barriers": 2}
    return Code(**{**usual, "gathers": 0, "lookups": 0, "width": 8, "loads": "", "stores": "", **figures})


@pytest.fixture
def case():
    return next(case for case in aot.required_cases()[90].values() if "_geglu_fwd" in case.label and not case.is_odd)


def test_the_worst_of_a_kernels_figures_is_its_limit(case):
    codes = [code_of(registers=50), code_of(width=16, barriers=3), code_of(instructions=401)]
    expected = {
        "registers": 50,
        "instructions_per_element": 51,
        "barriers": 3,
        "gathers": 0,
        "lookups": 0,
        "width": 8,
    }
    assert aot.worst((case, code) for code in codes) == {"geglu._geglu_fwd_kernel": expected}
    odd = aot.Case(case.label, case.launch, is_odd=True)
    assert aot.worst([(odd, code_of())]) == {}


@pytest.mark.parametrize(
    ("worse", "within"),
    [
        ({"registers": 49}, {"registers": 48}),
        ({"instructions": 448}, {"instructions": 440}),
        ({"barriers": 3}, {"barriers": 1}),
        ({"gathers": 1}, {}),
        ({"lookups": 1}, {}),
        ({"width": 4}, {"width": 16}),
    ],
)
def test_a_kernel_that_gets_worse_exceeds_its_limits(case, worse, within):
    limits = aot.worst([(case, code_of())])
    assert aot.beyond_limits(aot.worst([(case, code_of(**within))]), limits) == []
    (message,) = aot.beyond_limits(aot.worst([(case, code_of(**worse))]), limits)
    assert message.startswith("geglu._geglu_fwd_kernel: ")
    assert next(iter(worse)).partition("_")[0] in message


def test_limits_are_tightened_but_loosened_only_if_asked(case, tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "LIMITS", tmp_path / "limits.toml")
    usual = aot.worst([(case, code_of())])
    aot.write_limits(usual)
    assert aot.read_limits() == usual
    better, worse = (aot.worst([(case, code_of(barriers=n, width=w))]) for n, w in ((1, 16), (4, 2)))
    assert aot._new_limits(better, loosen=False) == better
    assert aot._new_limits(worse, loosen=False) == usual
    assert aot._new_limits(worse, loosen=True) == worse
    assert aot.looser_than_needed(usual, usual) == []
    assert len(aot.looser_than_needed(better, usual)) == 2
    assert len(aot.looser_than_needed(usual, {})) == 6
