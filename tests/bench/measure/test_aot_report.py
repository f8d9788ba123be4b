"""`bench aot`: the assembler's figures as they stand in the table, worst first, and a failed gate in the exit status."""

import json
from dataclasses import replace

import pytest

from safelight.__main__ import main
from safelight.kernels.aot import compile_all as aot


@pytest.fixture
def geglu_alone(monkeypatch, tmp_path):
    """One kernel, two compilations; the user's Triton cache and the committed table are not touched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(aot, "RESULTS", tmp_path / "aot.json")
    cases = [case for case in aot.one_of_each() if "_geglu_fwd" in case.label]
    assert len(cases) == 1
    monkeypatch.setattr(aot, "one_of_each", lambda: cases)
    monkeypatch.setattr(
        aot, "required_cases", lambda: {75: {c.label: c for c in cases}, 90: {c.label: c for c in cases}}
    )
    return cases[0]


def test_one_configuration_of_each_kernel_is_compiled_for_two_cards(geglu_alone, capsys):
    assert main(["bench", "aot", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == []
    (row,) = told["kernels"].values()
    assert set(row) == {"75", "90"}
    for target, found in row.items():
        code = aot.read_code(aot.compile_case(geglu_alone, int(target)))
        assert found == {
            "registers": code.registers,
            "stack_bytes": 0,
            "shared_bytes": code.shared_bytes,
            "code_bytes": code.code_bytes,
            "compilations": 1,
        }
    assert not aot.RESULTS.exists()


def test_all_fills_the_table_and_prints_the_worst(geglu_alone, monkeypatch, capsys):
    assert main(["bench", "aot", "--all"]) == 0
    first = capsys.readouterr()
    assert "geglu geglu_fwd" in first.out
    assert "2 of 2 compiled" in first.err
    results = aot.read_results()
    assert aot.entry_of(results, geglu_alone, 75).registers > 0
    # nothing is compiled twice
    monkeypatch.setattr(aot, "compile_case", None)
    assert main(["bench", "aot", "--all"]) == 0
    assert capsys.readouterr().out == first.out


def test_spilled_registers_fail(geglu_alone, monkeypatch, capsys):
    read = aot.read_code
    monkeypatch.setattr(aot, "read_code", lambda compiled: replace(read(compiled), stack_bytes=16))
    for words in (["bench", "aot"], ["bench", "aot", "--all"]):
        assert main(words) == 1
        assert "16 bytes of spilled registers" in capsys.readouterr().out
    assert aot.read_results()["kernels"] == {}
