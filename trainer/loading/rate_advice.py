"""What a run's learning rates are, beside what `safelight train --find-lr` proposed for it: a line of the plan."""

from __future__ import annotations

from pathlib import Path

from safelight.trainer.config.schema import Config
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.report.rate_test_record import RateTest
from safelight.trainer.report.records import read_rate_test


def rates_of(config: Config) -> dict:
    """Return plain values: each stage's peak rate and schedule, and the test in its run folder, None without one.

    A test that cannot be read is none, and `problems` says why.
    """
    problems: list[str] = []
    test = read_rate_test(Path(config.run.dir), problems)
    return {
        "stages": [{"lr": stage.lr, "schedule": stage.schedule} for stage in config.stages()],
        "test": test and _values(config, test),
        "problems": problems,
    }


def _values(config: Config, test: RateTest) -> dict:
    stage, proposal = config.stages()[0], test.proposal
    now = (config.optimizer.name, stage.batch_size, stage.accumulate)
    return {
        "proposed": proposal.rate,
        "low": proposal.low,
        "high": proposal.high,
        "sureness": proposal.sureness,
        "options": test.options,
        "of_these_settings": (test.optimizer, test.batch_size, test.accumulate) == now,
    }


def rates_line(config: Config, rates: dict) -> str:
    """Return the line: `Learning rate 1e-06, constant; ...`. rates: what `rates_of` returned."""
    stages = dict.fromkeys(f"{stage['lr']:g} {stage['schedule']}" for stage in rates["stages"])
    spec, test = OPTIMIZERS[config.optimizer.name], rates["test"]
    name = "Factor on the learning rate" if spec.estimates_rate else "Learning rate"
    line = f"{name} {', then '.join(stages)}"
    if spec.estimates_rate:
        return f"{line}; {spec.name} estimates the rate itself."
    if rates["problems"]:
        return f"{line}; {rates['problems'][0]}."
    if test is None:
        return f"{line}; --find-lr of safelight train proposes one."
    if test["proposed"] is None:
        return f"{line}; --find-lr proposed none."
    first = rates["stages"][0]["lr"]
    if test["low"] <= first <= test["high"]:
        verdict = "which is about as good"
    else:
        factor = test["proposed"] / first
        times = f"{max(factor, 1 / factor):.2g} times {'higher' if factor > 1 else 'lower'}"
        verdict = f"which is {times}: {test['options']}"
    of_others = "" if test["of_these_settings"] else ", for another optimizer or batch size"
    sureness = {"guess": "a guess"}.get(test["sureness"], test["sureness"])
    return f"{line}; --find-lr proposed {test['proposed']:g} ({sureness}{of_others}), {verdict}."
