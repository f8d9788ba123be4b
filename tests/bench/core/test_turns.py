"""Runs of other processes: they take turns, say what went wrong, and none is left behind."""

import os
import sys
from contextlib import contextmanager

import pytest
import torch

from safelight.bench.core.harness import by_turns
from safelight.bench.core.turns import Prepared, players
from safelight.errors import UserError


@contextmanager
def prepared(folder, name, fails_at=-1):
    if fails_at == -2:
        raise UserError(f"{name} cannot be built")

    def run(number):
        if number == fails_at:
            print("the last words", file=sys.stderr, flush=True)
            os._exit(9)
        with (folder / "turns").open("a") as file:
            file.write(f"{name} {number} {os.getpid()} {torch.get_num_threads()}\n")

    yield Prepared({name: run}, f"notes of {name}")


def test_runs_take_turns_in_processes_of_their_own(tmp_path):
    with players(prepared, {name: (tmp_path, name) for name in "ab"}) as started:
        seconds = by_turns({n: lambda number, n=n: started[n].turn(n, number) for n in "ab"}, repeats=2, warmup=1)
        peaks = [player.end() for player in started.values()]
    assert [player.notes for player in started.values()] == ["notes of a", "notes of b"]
    assert all(0.01 < peak < 10 for peak in peaks)
    assert [len(s) for s in seconds.values()] == [2, 2]
    assert min(map(min, seconds.values())) > 0
    turns = [line.split() for line in (tmp_path / "turns").read_text().splitlines()]
    assert [(name, number) for name, number, *_ in turns] == [(n, str(k)) for k in range(3) for n in "ab"]
    pids = {name: pid for name, _, pid, _ in turns}
    assert len({*pids.values(), str(os.getpid())}) == 3
    assert {threads for *_, threads in turns} == {str(torch.get_num_threads())}


def test_a_run_that_cannot_be_prepared_says_why(tmp_path):
    with (
        pytest.raises(UserError, match=r"^b cannot be built$"),
        players(prepared, {"a": (tmp_path, "a"), "b": (tmp_path, "b", -2)}),
    ):
        pass


def test_a_process_that_dies_is_told(tmp_path):
    with players(prepared, {"a": (tmp_path, "a", 1)}) as started:
        started["a"].turn("a", 0)
        with pytest.raises(UserError, match=r"ended with exit code 9 \(the last words\); is the memory full\?"):
            started["a"].turn("a", 1)
