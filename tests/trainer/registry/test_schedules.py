"""Every schedule equals its closed form, and torch's or diffusers' scheduler over a whole stage."""

import math
import subprocess
import sys
from itertools import pairwise
from typing import get_args

import diffusers.optimization
import pytest
import torch
from torch.optim import lr_scheduler

from safelight.trainer.config.schema import Optimizer, Stage, TextEncoder
from safelight.trainer.config.toml import parse_config
from safelight.trainer.registry.schedules import (
    DEFAULTS,
    SCHEDULE_SETTINGS,
    SCHEDULES,
    corner_steps,
    help_text,
    learning_rate,
    unused_settings,
)

PEAK, NUM_STEPS = 3e-4, 60
# what each schedule is tried with; a schedule without a row fails
SETTINGS = {
    "constant": {},
    "linear": {"lr_end": 0.1},
    "cosine": {"lr_end": 0.1},
    "cosine_restarts": {"lr_end": 0.05, "lr_cycles": 4, "lr_cycle_decay": 0.5},
    "polynomial": {"lr_end": 0.2, "lr_power": 3.0},
    "one_cycle": {"lr_start": 0.1, "lr_rise": 0.25, "lr_end": 0.01},
}


def rates(num_steps: int = NUM_STEPS, **settings) -> list[float]:
    optimizer = Optimizer(lr=PEAK, **settings)
    return [learning_rate(optimizer, step, num_steps) for step in range(num_steps)]


def rates_of(scheduler_of, lr: float = PEAK, num_steps: int = NUM_STEPS) -> list[float]:
    """Return the rates of a scheduler over an optimizer of torch, before each of the steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = scheduler_of(optimizer)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def closed_form(schedule: str, done: float) -> float:
    """Return the fraction of the peak with the values of SETTINGS, written out."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - 0.9 * done
    if schedule == "cosine":
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
    if schedule == "cosine_restarts":
        cycle = int(4 * done)
        return 0.05 + (max(0.05, 0.5**cycle) - 0.05) * (1 + math.cos(math.pi * (4 * done - cycle))) / 2
    if schedule == "polynomial":
        return 0.2 + 0.8 * (1 - done) ** 3
    if done < 0.25:
        return 0.1 + 0.9 * (1 - math.cos(math.pi * done / 0.25)) / 2
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (done - 0.25) / 0.75)) / 2


def test_it_imports_no_torch():
    code = "import sys; import safelight.trainer.registry.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_it_equals_its_closed_form_after_a_linear_warm_up(schedule, warmup_steps):
    found = rates(schedule=schedule, warmup_steps=warmup_steps, **SETTINGS[schedule])
    span = NUM_STEPS - warmup_steps
    expected = [PEAK * closed_form(schedule, step / span) for step in range(span)]
    assert found[warmup_steps:] == pytest.approx(expected, rel=1e-12)
    first = expected[0]
    assert found[:warmup_steps] == pytest.approx([first * (n + 1) / (warmup_steps + 1) for n in range(warmup_steps)])
    assert all(rate > 0 for rate in found)


@pytest.mark.parametrize(
    ("settings", "scheduler_of"),
    [
        ({"schedule": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (
            {"schedule": "linear", "lr_end": 0.1},
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=NUM_STEPS),
        ),
        (
            {"schedule": "cosine", "lr_end": 0.1},
            lambda o: lr_scheduler.CosineAnnealingLR(o, NUM_STEPS, eta_min=0.1 * PEAK),
        ),
        (
            {"schedule": "cosine_restarts", "lr_end": 0.1, "lr_cycles": 4},
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, NUM_STEPS // 4, eta_min=0.1 * PEAK),
        ),
        ({"schedule": "polynomial", "lr_power": 3.0}, lambda o: lr_scheduler.PolynomialLR(o, NUM_STEPS, power=3.0)),
        (
            # OneCycleLR is at its peak in step pct_start * total - 1 and at its end in the last of the total steps
            {"schedule": "one_cycle", "lr_start": 1 / 25, "lr_rise": 0.3, "lr_end": 1 / 25e4},
            lambda o: lr_scheduler.OneCycleLR(
                o, PEAK, total_steps=NUM_STEPS + 1, pct_start=(0.3 * NUM_STEPS + 1) / (NUM_STEPS + 1)
            ),
        ),
    ],
)
def test_it_equals_torchs_scheduler(settings, scheduler_of):
    assert rates(**settings) == pytest.approx(rates_of(scheduler_of), rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "name", "options"),
    [
        ({"schedule": "constant"}, "constant_with_warmup", {}),
        ({"schedule": "linear"}, "linear", {}),
        ({"schedule": "cosine"}, "cosine", {}),
        ({"schedule": "cosine_restarts", "lr_cycles": 4}, "cosine_with_restarts", {"num_cycles": 4}),
        ({"schedule": "polynomial", "lr_power": 3.0, "lr_end": 1e-7 / PEAK}, "polynomial", {"power": 3.0}),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 9])
def test_it_equals_diffusers_scheduler(settings, name, options, warmup_steps):
    """Theirs begins its warm-up with a step at rate 0, which ours leaves out: theirs is one step longer."""
    shift = int(warmup_steps > 0)

    def scheduler_of(optimizer):
        lengths = {"num_warmup_steps": warmup_steps + shift, "num_training_steps": NUM_STEPS + shift}
        if name == "constant_with_warmup":
            lengths.pop("num_training_steps")
        return (
            diffusers.optimization.get_scheduler(name, optimizer, **lengths)
            if not options
            else getattr(diffusers.optimization, FUNCTIONS[name])(optimizer, **lengths, **options)
        )

    expected = rates_of(scheduler_of, num_steps=NUM_STEPS + shift)[shift:]
    assert rates(warmup_steps=warmup_steps, **settings) == pytest.approx(expected, rel=1e-9)


FUNCTIONS = {
    "cosine_with_restarts": "get_cosine_with_hard_restarts_schedule_with_warmup",
    "polynomial": "get_polynomial_decay_schedule_with_warmup",
}


@pytest.mark.parametrize(("schedule", "name"), [(s.name, n) for s in SCHEDULES.values() for n in s.settings])
def test_each_setting_changes_its_schedules_rates_and_no_others(schedule, name):
    value = {"lr_cycles": 7}.get(name, 0.77)
    own = SETTINGS[schedule]
    assert rates(schedule=schedule, **own) != rates(schedule=schedule, **{**own, name: value})
    for other in SCHEDULES:
        if name in unused_settings(other):
            assert rates(schedule=other, **SETTINGS[other]) == rates(
                **{"schedule": other, **SETTINGS[other], name: value}
            )


def test_the_text_encoder_and_stages_have_every_setting():
    for name in ("schedule", "warmup_steps", *SCHEDULE_SETTINGS):
        assert all(name in section.model_fields for section in (Optimizer, Stage, TextEncoder))
    assert DEFAULTS.keys() == set(SCHEDULE_SETTINGS)
    values = {"lr": PEAK, "schedule": "polynomial", "lr_power": 3.0, "lr_end": 0.2}
    text, optimizer = TextEncoder(**values), Optimizer(**values)
    assert all(learning_rate(text, step, 10) == learning_rate(optimizer, step, 10) for step in range(10))
    stages = [{"epochs": 1}, {"epochs": 1, "schedule": "one_cycle", "lr_rise": 0.6}]
    first, second = parse_config({"optimizer": {"lr_rise": 0.2, "lr_end": 0.3}, "stage": stages}, "here").stages()
    assert (first.lr_rise, second.lr_rise, second.lr_end) == (0.2, 0.6, 0.3)


def test_the_config_offers_every_row_and_shows_its_help():
    for section in (Optimizer, TextEncoder):
        field = section.model_fields["schedule"]
        assert list(get_args(field.annotation)) == list(SCHEDULES)
        assert all(f"{spec.name}: {spec.help}" in field.description for spec in SCHEDULES.values())
    assert max(map(len, help_text().splitlines())) <= 118


def test_a_thinned_curve_keeps_corners_and_jumps():
    """Between the kept steps the rate is smooth: no other neighbours are farther apart than beside a jump."""
    settings = Optimizer(lr=1.0, schedule="cosine_restarts", lr_cycles=3, warmup_steps=10)
    assert corner_steps(settings, 70) == {9, 10, 29, 30, 31, 49, 50, 51}
    found = [learning_rate(settings, step, 70) for step in range(70)]
    jumps = {step for step, (a, b) in enumerate(pairwise(found)) if b - a > 0.5}
    assert jumps == {29, 49}
    assert corner_steps(Optimizer(schedule="one_cycle", lr_rise=0.25), 40) == {0, 9, 10, 11}


@pytest.mark.parametrize(
    "values", [{"lr_rise": 0}, {"lr_rise": 1}, {"lr_start": 0}, {"lr_cycles": 0}, {"lr_end": -0.1}]
)
def test_values_that_give_no_rate_are_refused(values):
    with pytest.raises(ValueError, match=rf"^here: optimizer\.{next(iter(values))} = .*: expected"):
        parse_config({"optimizer": values}, "here")
