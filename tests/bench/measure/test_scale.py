"""`bench scale`: what is counted of a step over two processes, and what a gradient's memory is."""

import json

import pytest
import torch
from torch import nn

from safelight.__main__ import main
from safelight.bench.measure.scale import GradientMemory, bench_scale
from safelight.trainer.memory_plan.communication import aligned_bytes
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import meta_unet
from tests.small_base import small_base


def test_gradients_are_counted_while_they_live():
    first, last = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
    memory = GradientMemory([*first.parameters(), *last.parameters()])
    with memory:
        last(first(torch.ones(1, 8))).sum().backward()
        assert memory.now == memory.peak == 4 * (64 + 32)
        first.weight.grad = None
        assert memory.now == 4 * 32
    memory.close()
    assert memory.peak == 4 * 96


@pytest.mark.slow
def test_both_send_all_gradients_and_ours_keeps_none_between_steps(capsys):
    base = small_base()
    one, two = bench_scale(base, 8, 1, (1, 2), repeats=1, rounds=1, device="cpu", bucket_mib=0.05)
    parameters = list(meta_unet(resolve_base(base)).parameters())
    gradients = sum(4 * p.numel() for p in parameters)
    figures = two["figures"]
    # half of 2 (N - 1) / N times the payload is N - 1 = 1 times
    assert figures["ddp"]["sent_bytes"] == gradients
    assert figures["ours"]["sent_bytes"] == figures["ours_fused"]["sent_bytes"] == aligned_bytes(parameters)
    assert figures["ours"]["gradient_held_mib"] == figures["ours_fused"]["gradient_held_mib"] == 0
    assert figures["ddp"]["gradient_held_mib"] == round(gradients / 2**20, 2)
    assert figures["ours_fused"]["gradient_peak_mib"] < figures["ddp"]["gradient_peak_mib"]
    assert one["figures"]["ours"]["sent_bytes"] == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--processes", "0"], "--processes must be numbers of 1 or more"),
        (["--repeats", "0"], "repeats"),
        (["--bucket-mib", "-1"], "--bucket-mib -1 is below 0; use 0 or more"),
    ],
)
def test_mistakes_are_said(options, expected, capsys):
    assert main(["bench", "scale", *options]) == 2
    assert expected in capsys.readouterr().err


def test_the_numbers_of_processes_are_listed_as_json(monkeypatch, capsys):
    measured = []
    monkeypatch.setattr("safelight.bench.measure.scale.bench_scale", lambda *given: measured.append(given) or [])
    assert main(["bench", "scale", "--processes", "1", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert measured[0][3] == (1, 3)
