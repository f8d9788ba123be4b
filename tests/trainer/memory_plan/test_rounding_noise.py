"""The formula for stochastic-rounding noise agrees with a simulation and with the committed experiment."""

import json
import math
from pathlib import Path

import pytest
import torch

from safelight.bench.core.results import RESULTS
from safelight.kernels.optim.split_weights import join, split
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.memory_plan.rounding_noise import STEADY, noise_to_displacement, spacing
from safelight.trainer.registry.schedules import learning_rate
from tools.rounding import LR, SHAPES


def simulated(dtype: torch.dtype, memory: str, rates: list[float], fan_in: int, num: int = 4096) -> float:
    """Return the noise-to-displacement ratio of Adam on random gradients with weights rounded at every step."""
    generator = torch.Generator().manual_seed(3)
    true = torch.randn(num, generator=generator) / math.sqrt(fan_in)
    value = join(*split(true, dtype, "exact"))
    if memory == "rounded":
        value = value.to(dtype).float()
    true, begun = value.clone(), value.clone()
    steady = STEADY * torch.randn(num, generator=generator)
    m, v = torch.zeros(num), torch.zeros(num)
    for step, lr in enumerate(rates, start=1):
        g = steady + torch.randn(num, generator=generator)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        moved = lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        true = true - moved
        words = torch.randint(0, 2**32, (num,), generator=generator)
        value = join(*split(value - moved, dtype, memory, words))
    return float((value - true).norm() / (true - begun).norm())


@pytest.mark.parametrize(
    ("dtype", "memory", "peak", "schedule"),
    [
        (torch.bfloat16, "rounded", 1e-6, "constant"),
        (torch.bfloat16, "near", 1e-6, "cosine"),
        (torch.float16, "rounded", 2e-5, "cosine"),
        (torch.float16, "near", 1e-6, "constant"),
    ],
)
def test_the_formula_agrees_with_a_simulation(dtype, memory, peak, schedule):
    optimizer = Optimizer(schedule=schedule, lr=peak, warmup_steps=20)
    rates = [learning_rate(optimizer, step, 400) for step in range(400)]
    expected = noise_to_displacement([(4096, 1024)], dtype, memory, rates)
    assert simulated(dtype, memory, rates, 1024) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("memory", ["near", "rounded"])
def test_the_formula_agrees_with_the_committed_experiment(memory):
    lines = [json.loads(line) for line in Path(RESULTS / "rounding.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["config"]["weights"] == "SD1.5 shapes"][-1]
    measured = found["figures"][memory]["noise_to_displacement"]
    expected = noise_to_displacement(SHAPES, torch.bfloat16, memory, [LR] * found["config"]["num_steps"])
    assert expected == pytest.approx(measured, rel=0.1)


def test_more_steps_and_larger_rates_have_relatively_less_noise():
    def ratio(num: int, lr: float) -> float:
        return noise_to_displacement(SHAPES, torch.bfloat16, "rounded", [lr] * num)

    assert ratio(2000, 1e-6) < 0.6 * ratio(200, 1e-6)
    assert ratio(200, 1e-5) < 0.5 * ratio(200, 1e-6)


def test_the_grid_of_a_mode():
    one = torch.ones(()).double().numpy()
    assert spacing(one, torch.bfloat16, "rounded") == 2**-7
    assert spacing(one, torch.float16, "rounded") == 2**-10
    assert spacing(one, torch.bfloat16, "near") == 2**-15
    assert spacing(one, torch.float16, "near") == 2**-17
    # subnormals of fp16
    assert spacing(1e-3 * one * 1e-3, torch.float16, "rounded") == 2**-24
