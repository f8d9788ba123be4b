"""The experiment on rounding: its order of the memory modes, and its picture."""

import torch

from safelight.bench.core.plot import plot
from safelight.bench.core.results import make_record
from tools import rounding


def test_the_modes_come_in_their_order_and_are_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(rounding, "NUM_STEPS", {"SD1.5 shapes": 30})
    monkeypatch.setattr(rounding, "SHAPES", ((64, 64), (100,)))
    found = rounding.measure("SD1.5 shapes")
    noise = {mode: line["noise_to_displacement"] for mode, line in found.items() if mode != "fp32"}
    assert noise["exact"] == 0
    assert 0 < noise["near"] < noise["rounded"]
    assert noise["plain bf16"] > 0.5
    # fp32 values move at each step, bf16 ones almost never
    assert found["fp32"]["changed_values"] == found["exact"]["changed_values"] > 0.9
    assert found["plain bf16"]["changed_values"] == found["plain bf16"]["changed_weights"] < 0.05
    config = {"weights": "SD1.5 shapes", "precision": "bf16", "lr": rounding.LR, "num_steps": 30}
    files, _ = plot([make_record("rounding", config, found, torch.device("cpu"))], tmp_path)
    assert [path.name for path in files] == ["rounding.png"]


def test_the_tiny_base_is_measured_with_its_own_gradients(monkeypatch):
    monkeypatch.setattr(rounding, "NUM_STEPS", {"tiny": 1})
    monkeypatch.setattr(rounding, "MODES", ("fp32", "exact"))
    found = rounding.measure("tiny")
    assert found["exact"]["noise_to_displacement"] == 0
    assert found["exact"]["loss"] == found["fp32"]["loss"] > 0
