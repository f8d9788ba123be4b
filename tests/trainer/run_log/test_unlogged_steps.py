"""UnloggedSteps gives the same bits as a plain list of results, with skipped steps, varying sizes and resumes."""

from __future__ import annotations

import math
import random

import pytest
import torch

from safelight.trainer.run_log.unlogged_steps import NUM_ROWS, UnloggedSteps, take_state
from safelight.trainer.step.step import StepResult

CPU = torch.device("cpu")
MAX_SAMPLES = 7


def steps_of(num: int, seed: int = 0, skipped: float = 0.3) -> list[StepResult]:
    """Return steps of one to seven samples; a skipped step has the norm of a non-finite gradient."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for number in range(num):
        is_applied = rng.random() >= skipped
        norm = torch.rand((), generator=generator) if is_applied else torch.tensor(rng.choice([math.nan, math.inf]))
        losses = torch.rand(rng.randint(1, MAX_SAMPLES), generator=generator) * 10 ** rng.randint(-6, 6)
        steps.append(StepResult(losses, norm, is_applied if number % 2 else torch.tensor(is_applied)))
    return steps


def expected_means(steps: list[StepResult]) -> tuple[float | None, float | None]:
    applied = [step for step in steps if step.is_applied]
    if not applied:
        return None, None
    losses, norms = torch.cat([s.losses for s in applied]), torch.stack([s.grad_norm for s in applied])
    return losses.double().mean().item(), norms.double().mean().item()


def fill(log: UnloggedSteps, steps: list[StepResult]) -> UnloggedSteps:
    for step in steps:
        log.add(step)
    return log


@pytest.mark.parametrize("num", [1, 3, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1, 3 * NUM_ROWS + 4])
@pytest.mark.parametrize("skipped", [0.0, 0.3, 1.0])
def test_means_are_those_of_the_applied_steps_bit_for_bit(num, skipped):
    steps = steps_of(num, seed=num, skipped=skipped)
    log = fill(UnloggedSteps(MAX_SAMPLES, CPU), steps)
    assert len(log) == num
    assert log.means() == expected_means(steps)
    assert [step.is_applied for step in log.read()] == [bool(step.is_applied) for step in steps]
    # longer rows from before `clear` leave nothing behind
    log.clear()
    assert len(log) == 0
    assert log.means() == (None, None)
    again = steps_of(5, seed=99)
    assert fill(log, again).means() == expected_means(again)


@pytest.mark.parametrize("cut", [0, 1, 13, NUM_ROWS, NUM_ROWS + 7])
def test_it_goes_on_from_a_checkpoint_as_if_never_saved(cut):
    steps = steps_of(NUM_ROWS + 20, seed=4)
    state = {"exp_avg/conv_in": torch.ones(1), **fill(UnloggedSteps(MAX_SAMPLES, CPU), steps[:cut]).state()}
    resumed = UnloggedSteps(MAX_SAMPLES, CPU, take_state(state))
    assert list(state) == ["exp_avg/conv_in"]
    assert len(resumed) == cut
    whole, resumed = fill(UnloggedSteps(MAX_SAMPLES, CPU), steps), fill(resumed, steps[cut:])
    assert resumed.means() == whole.means() == expected_means(steps)
    one, other = whole.state(), resumed.state()
    assert one.keys() == other.keys()
    # compared as bytes, because a NaN does not equal itself
    assert all(torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)) for key in one)


def test_a_resume_may_bring_larger_steps_than_the_run_now_takes():
    steps = steps_of(6, seed=2, skipped=0)
    state = fill(UnloggedSteps(MAX_SAMPLES, CPU), steps).state()
    small = [StepResult(torch.rand(1), torch.rand(()), True)]
    assert fill(UnloggedSteps(1, CPU, state), small).means() == expected_means(steps + small)


def test_later_changes_of_a_result_do_not_change_the_log():
    """A replay overwrites its results, so a step is copied when it is added, and again when it is read."""
    log, result = UnloggedSteps(MAX_SAMPLES, CPU), StepResult(torch.zeros(3), torch.zeros(()), torch.tensor(True))
    for number in range(4):
        result.losses.fill_(number), result.grad_norm.fill_(number)
        log.add(result)
    read = list(log.read())
    state = log.state()
    log.clear()
    result.losses.fill_(100)
    log.add(result)
    assert [step.losses.tolist() for step in read] == [[n] * 3 for n in range(4)]
    assert state["log/grad_norms"].tolist() == [0, 1, 2, 3]


def test_the_buffer_keeps_its_address_and_is_copied_once(monkeypatch):
    log = UnloggedSteps(MAX_SAMPLES, CPU)
    address, copies = log._rows.data_ptr(), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x, original=torch.Tensor.cpu: copies.append(1) or original(x))
    for _ in range(3):
        fill(log, steps_of(NUM_ROWS, seed=1))
        assert copies == [], "nothing is read while steps are added"
        log.means(), log.read(), log.state()
        assert copies == [1]
        copies.clear(), log.clear()
    assert log._rows.data_ptr() == address
