"""The unlogged steps: the same numbers as of a plain list of results, to the bit, whatever is skipped, varied or resumed."""

from __future__ import annotations

import random

import pytest
import torch

from safelight.trainer.run_log.step_window import NUM_ROWS, StepLog, take_state
from safelight.trainer.step.step import StepResult

CPU = torch.device("cpu")
MOST = 7


def steps_of(num: int, seed: int = 0, skipped: float = 0.3) -> list[StepResult]:
    """Steps of one to seven samples; of a skipped one losses and norm are what a broken gradient leaves."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for number in range(num):
        taken = rng.random() >= skipped
        norm = torch.rand((), generator=generator) if taken else torch.tensor(rng.choice([float("nan"), float("inf")]))
        losses = torch.rand(rng.randint(1, MOST), generator=generator) * 10 ** rng.randint(-6, 6)
        steps.append(StepResult(losses, norm, taken if number % 2 else torch.tensor(taken)))
    return steps


def expected_means(steps: list[StepResult]) -> tuple[float | None, float | None]:
    taken = [step for step in steps if step.taken]
    if not taken:
        return None, None
    losses, norms = torch.cat([s.losses for s in taken]), torch.stack([s.grad_norm for s in taken])
    return losses.double().mean().item(), norms.double().mean().item()


def fill(log: StepLog, steps: list[StepResult]) -> StepLog:
    for step in steps:
        log.add(step)
    return log


@pytest.mark.parametrize("num", [1, 3, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1, 3 * NUM_ROWS + 4])
@pytest.mark.parametrize("skipped", [0.0, 0.3, 1.0])
def test_means_are_those_of_the_steps_taken_to_the_bit(num, skipped):
    steps = steps_of(num, seed=num, skipped=skipped)
    log = fill(StepLog(MOST, CPU), steps)
    assert len(log) == num
    assert log.means() == expected_means(steps)
    assert [step.taken for step in log.read()] == [bool(step.taken) for step in steps]
    # longer rows of the window before leave nothing behind
    log.clear()
    assert len(log) == 0
    assert log.means() == (None, None)
    again = steps_of(5, seed=99)
    assert fill(log, again).means() == expected_means(again)


@pytest.mark.parametrize("cut", [0, 1, 13, NUM_ROWS, NUM_ROWS + 7])
def test_it_goes_on_from_a_checkpoint_as_if_never_saved(cut):
    steps = steps_of(NUM_ROWS + 20, seed=4)
    state = {"exp_avg/conv_in": torch.ones(1), **fill(StepLog(MOST, CPU), steps[:cut]).state()}
    resumed = StepLog(MOST, CPU, take_state(state))
    assert list(state) == ["exp_avg/conv_in"]
    assert len(resumed) == cut
    whole, resumed = fill(StepLog(MOST, CPU), steps), fill(resumed, steps[cut:])
    assert resumed.means() == whole.means() == expected_means(steps)
    one, other = whole.state(), resumed.state()
    assert one.keys() == other.keys()
    # a NaN equals itself here
    assert all(torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)) for key in one)


def test_a_resume_may_bring_larger_steps_than_the_run_now_takes():
    steps = steps_of(6, seed=2, skipped=0)
    state = fill(StepLog(MOST, CPU), steps).state()
    small = [StepResult(torch.rand(1), torch.rand(()), True)]
    assert fill(StepLog(1, CPU, state), small).means() == expected_means(steps + small)


def test_what_was_read_and_what_was_added_do_not_change_with_the_caller():
    """A graph writes its results over and over: a step's numbers are copied when they are added, and again when read."""
    log, result = StepLog(MOST, CPU), StepResult(torch.zeros(3), torch.zeros(()), torch.tensor(True))
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


def test_the_table_stays_where_it_is_and_is_copied_once(monkeypatch):
    log = StepLog(MOST, CPU)
    address, copies = log._rows.data_ptr(), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x, original=torch.Tensor.cpu: copies.append(1) or original(x))
    for _ in range(3):
        fill(log, steps_of(NUM_ROWS, seed=1))
        assert copies == [], "nothing is read while steps are added"
        log.means(), log.read(), log.state()
        assert copies == [1]
        copies.clear(), log.clear()
    assert log._rows.data_ptr() == address
