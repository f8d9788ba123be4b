"""`bench aot`: figures of compiled kernels, the table in aot.json, and a non-zero exit status for spilled registers."""

import json
import math
from dataclasses import replace

import pytest

from safelight.__main__ import main
from safelight.kernels.aot import compile_all


@pytest.fixture
def geglu_alone(monkeypatch, tmp_path):
    """Compile only one kernel, with a temporary Triton cache and aot.json."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(compile_all, "RESULTS", tmp_path / "aot.json")
    monkeypatch.setattr(compile_all, "LIMITS", tmp_path / "limits.toml")
    cases = [case for case in compile_all.one_of_each() if "_geglu_fwd" in case.label]
    assert len(cases) == 1
    monkeypatch.setattr(compile_all, "one_of_each", lambda: cases)
    monkeypatch.setattr(
        compile_all, "required_cases", lambda: {75: {c.label: c for c in cases}, 90: {c.label: c for c in cases}}
    )
    return cases[0]


def test_one_case_of_each_kernel_is_compiled_for_two_targets(geglu_alone, capsys):
    assert main(["bench", "aot", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["failed"] == []
    (row,) = printed["kernels"].values()
    assert set(row) == {"75", "90"}
    for target, figures in row.items():
        code = compile_all.read_code(compile_all.compile_case(geglu_alone, int(target)))
        assert figures == {
            "registers": code.registers,
            "stack_bytes": 0,
            "shared_bytes": code.shared_bytes,
            "instructions_per_element": math.ceil(code.instructions_per_element),
            "barriers": code.barriers,
            "gathers": 0,
            "lookups": 0,
            "width": 16,
            "compilations": 1,
        }
    assert not compile_all.RESULTS.exists()


def test_all_completes_the_table_and_prints_it(geglu_alone, monkeypatch, capsys):
    assert main(["bench", "aot", "--all"]) == 0
    first = capsys.readouterr()
    assert "geglu geglu_fwd" in first.out
    assert "2 of 2 compiled" in first.err
    table = compile_all.read_results()
    assert compile_all.entry_of(table, geglu_alone, 75).registers > 0
    assert compile_all.read_limits()["geglu._geglu_fwd_kernel"]["width"] == 16
    # nothing is compiled twice
    monkeypatch.setattr(compile_all, "compile_case", None)
    assert main(["bench", "aot", "--all"]) == 0
    assert capsys.readouterr().out == first.out


def test_spilled_registers_fail(geglu_alone, monkeypatch, capsys):
    read = compile_all.read_code
    monkeypatch.setattr(compile_all, "read_code", lambda compiled: replace(read(compiled), stack_bytes=16))
    for words in (["bench", "aot"], ["bench", "aot", "--all"]):
        assert main(words) == 1
        assert "16 bytes of spilled registers" in capsys.readouterr().out
    assert compile_all.read_results()["kernels"] == {}
