"""`safelight bench attention`: shapes, figures of each backend, and the reason where one cannot run."""

import pytest
import torch

from safelight.__main__ import main
from safelight.bench.core.results import read
from safelight.bench.measure import attention
from safelight.kernels.unet.attention import Case

CPU = torch.device("cpu")


def test_the_shapes_are_those_of_the_models():
    gpu = torch.device("cuda")
    sd15, sdxl = (attention.shapes_of(model, gpu) for model in ("sd15", "sdxl"))
    assert sd15[0] == Case(40, 8, 4096, 4096)
    assert {case.head_dim for case in sd15} == {40, 80, 160}
    assert {(c.queries, c.keys) for c in sdxl} == {(4096, 4096), (4096, 77), (1024, 1024), (1024, 77)}
    assert {(c.head_dim, c.heads) for c in sdxl} == {(64, 10), (64, 20)}
    assert Case(64, 5, 9216, 9216) in attention.shapes_of("sd21", gpu)
    assert max(case.queries for case in attention.shapes_of("sd15", CPU)) == attention.CPU_TOKENS


def test_the_ratio_and_saved_bytes_of_each_backend():
    figures = attention.measure(Case(40, 2, 32, 77), 1, torch.float32, CPU, repeats=2)
    assert figures["chosen"] == "cpu-flash"
    flash, math = figures["cpu-flash"], figures["math"]
    assert flash["ratio"] == 1.0
    both = [row["forward_ms"][1] + row["backward_ms"][1] for row in (flash, math)]
    assert math["ratio"] == pytest.approx(both[1] / both[0], abs=1e-3)
    # the output and the log-sum-exp; math also saves the attention matrices
    assert flash["saved_mib"] == pytest.approx((2 * 32 * 40 * 4 + 2 * 32 * 4) / 2**20, abs=1e-3)
    assert math["saved_mib"] > flash["saved_mib"] + 2 * 32 * 77 * 4 / 2**20 - 1e-3


def test_a_backend_that_cannot_run_has_its_reason(monkeypatch):
    monkeypatch.setattr(attention, "allowed_backends", lambda *args: ["cudnn", "cpu-flash"])
    monkeypatch.setattr(attention, "MAX_SCORES", 0)
    record = {"config": {"head_dim": 40}, "figures": attention.measure(Case(40, 1, 8, 8), 1, torch.float32, CPU, 1)}
    assert record["figures"]["cudnn"]["cannot"].startswith("Could not run 'aten::_scaled_dot_product_cudnn")
    plain, padded = attention.reasons_of([record])
    assert plain.startswith("cudnn was not measured at head dim 40: Could not run")
    assert padded.startswith("cudnn@64 was not measured at head dim 40: Could not run")


def test_the_command_prints_a_table_and_appends_a_line_per_shape(tmp_path, capsys):
    results = tmp_path / "r.jsonl"
    arguments = ["--model", "sdxl", "--device", "cpu", "--repeats", "1", "--append", str(results)]
    assert main(["bench", "attention", *arguments]) == 0
    out = capsys.readouterr().out
    assert "20 x 64, 128 x 128" in out
    assert "cpu-flash *" in out
    assert attention.CPU_NOTE in out
    records = read(results)
    assert len(records) == 4
    assert all(r["note"] == attention.CPU_NOTE and r["figures"]["chosen"] == "cpu-flash" for r in records)
    assert main(["bench", "attention", "--batch-size=-1"]) == 2
    assert "must be 0 or more" in capsys.readouterr().err
