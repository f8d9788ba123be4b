"""Whatever ends one process of a run ends all of them, in time, said once by rank and host, with none left behind."""

from __future__ import annotations

import json
import random
import socket

import pytest

from safelight.trainer.checkpoint.files import check_files, folder_of, list_checkpoints
from safelight.trainer.distributed.watch import BEAT_S
from tests.trainer.equal_runs import assert_equal_weights

HOST = socket.gethostname()
LOST = "has ended without a word: it was killed, for example because memory was full, or its machine failed"
# a killed process is noticed at once; the rest is for the others to end on a busy machine
SECONDS = 25.0
# on a busy machine the import of a library alone may keep a process from answering for seconds
TIMEOUT_S = 15.0
NUM_KILLS = 10
# each takes a quarter of a minute and is killed at most twice
MAX_RUNS = 12


def go_on(ranks, line: str) -> str:
    """Return the expected end of a line that says how the run goes on, after checking all checkpoints."""
    steps = [*list_checkpoints(ranks.folder)]
    for step in steps:
        check_files(folder_of(ranks.folder, step))
    # the newest may have been under way when it was said
    said = [f"the newest checkpoint is of step {step}" for step in steps[-2:]] or ["there is no checkpoint yet"]
    if not steps and "nothing is written yet" in line:
        return "nothing is written yet; give the same command again"
    newest = next((one for one in said if one in line), said[-1])
    return f"{newest}; go on with: safelight train {ranks.folder}/config.toml --resume --gpus 2"


def steps_logged(folder) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "train"]


def assert_ended(answer: dict, *codes: int) -> None:
    assert answer["left"] == []
    assert set(answer["codes"].values()) <= set(codes), answer
    assert answer["codes"]


def newest(ranks) -> int:
    step = list_checkpoints(ranks.folder)[-1]
    check_files(folder_of(ranks.folder, step))
    return step


@pytest.mark.slow
def test_a_killed_process_restarts_all_and_the_end_is_that_of_an_unbroken_run(ranks, tmp_path):
    """Also: who was killed is said by rank 0, once, and the lines of rank 1 are in its log."""
    assert ranks()["codes"] == {}
    ranks.folder.rename(tmp_path / "unbroken")
    kill = {"once": ranks.once_saved(4), "rank": 1, "signal": "SIGKILL"}
    answer = ranks(ranks.words(), step_s=0.2, max_restarts=2, disturb=[kill])
    assert answer["codes"] == {}
    assert answer["left"] == []
    lost, again = ranks.said()
    start = f"safelight train: rank 1 on {HOST} {LOST}; all processes start again from step "
    assert lost.startswith(start)
    assert lost.endswith(", the newest checkpoint (restart 1 of 2)")
    assert again == "restart 1 of 2: going on from the newest checkpoint"
    assert_equal_weights(tmp_path / "unbroken", ranks.folder)
    assert steps_logged(ranks.folder) == list(range(1, 9))
    log = (ranks.folder / "logs" / "rank-1.log").read_text()
    assert log.count(f", rank 1 of 2 on {HOST}, process ") == 2
    assert "training 8/8" in log


@pytest.mark.long
def test_an_error_that_the_user_can_mend_is_said_once_as_by_one_process(ranks):
    """And starting again would not help: all processes end with its exit status."""
    answer = ranks(raises={"rank": 1, "count": 3, "kind": "user"}, max_restarts=1)
    assert_ended(answer, 2)
    assert ranks.said() == ["safelight train: what the user can mend"]


@pytest.mark.long
def test_sigterm_at_any_rank_stops_all_after_the_same_step_with_one_save(ranks):
    term = {"once": ranks.once_saved(2), "rank": 1, "signal": "SIGTERM"}
    answer = ranks(step_s=0.3, disturb=[term])
    assert_ended(answer, 130)
    step = newest(ranks)
    assert 2 < step < 8
    assert ranks.said() == [
        f"saved at step {step}; continue with: safelight train {ranks.folder}/config.toml --resume --gpus 2"
    ]
    assert steps_logged(ranks.folder) == list(range(1, step + 1))


@pytest.mark.slow
def test_rank_0_is_killed_and_another_rank_says_so(ranks):
    kill = {"once": ranks.once_saved(4), "rank": 0, "signal": "SIGKILL"}
    answer = ranks(step_s=0.3, disturb=[kill])
    assert_ended(answer, 1, -9)
    assert answer["seconds"] < SECONDS
    assert ranks.said() == [f"safelight train: rank 0 on {HOST} {LOST}; {go_on(ranks, ranks.said()[0])}"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_ended_after_the_timeout(ranks, rank):
    words = ranks.words(distributed={"timeout_s": TIMEOUT_S})
    answer = ranks(words, step_s=0.3, disturb=[{"once": ranks.once_saved(4), "rank": rank, "signal": "SIGSTOP"}])
    assert_ended(answer, 1, -9)
    # it last gave a sign of life up to a beat before it was stopped
    assert TIMEOUT_S - BEAT_S <= answer["seconds"] < TIMEOUT_S + SECONDS
    what = f"gave no sign of life for {TIMEOUT_S:g} s (distributed.timeout_s)"
    assert ranks.said() == [f"safelight train: rank {rank} on {HOST} {what}; {go_on(ranks, ranks.said()[0])}"]


@pytest.mark.slow
def test_a_process_whose_main_thread_hangs_is_ended_after_the_timeout(ranks):
    words = ranks.words(distributed={"timeout_s": TIMEOUT_S})
    answer = ranks(words, raises={"rank": 1, "count": 5, "kind": "sleep"})
    assert_ended(answer, 1, -9)
    what = f"did nothing for {TIMEOUT_S:g} s (distributed.timeout_s)"
    assert ranks.said() == [f"safelight train: rank 1 on {HOST} {what}; {go_on(ranks, ranks.said()[0])}"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bug_is_told_once_with_its_file(ranks, rank):
    assert_ended(ranks(raises={"rank": rank, "count": 5, "kind": "bug"}), 1)
    bug, place = ranks.said()
    assert bug.endswith("this is a bug in Safelight, not a mistake of yours: RuntimeError: made for a test")
    assert place == f"safelight train: that was rank {rank} on {HOST}; {go_on(ranks, place)}"
    (report,) = ranks.folder.glob("error-*.log")
    assert "made for a test" in report.read_text()
    assert any(str(report.name) in line for line in ranks.lines)


@pytest.mark.slow
def test_memory_that_is_full_names_the_process(ranks):
    assert_ended(ranks(raises={"rank": 1, "count": 5, "kind": "memory"}), 2)
    full, place = ranks.said()
    assert full.startswith("safelight train: the computer's memory is full; ")
    assert place == f"safelight train: that was rank 1 on {HOST}; {go_on(ranks, place)}"


@pytest.mark.slow
def test_weights_that_are_not_finite_in_one_process_end_the_run_as_diverged(ranks):
    assert_ended(ranks(raises={"rank": 1, "count": 4, "kind": "nan"}), 3)
    (said,) = ranks.said()
    assert said.startswith("safelight train: step 4: ")
    assert "--resume --gpus 2" in said


@pytest.mark.slow
def test_a_process_killed_while_the_run_loads(ranks):
    kill = {"once": str(ranks.folder / "logs" / "rank-1.log"), "rank": 1, "signal": "SIGKILL"}
    answer = ranks(disturb=[kill])
    assert_ended(answer, 1, -9, -15)
    assert answer["seconds"] < SECONDS
    (said,) = ranks.said()
    assert said == f"safelight train: rank 1 on {HOST} {LOST}; {go_on(ranks, said)}"


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_process(ranks):
    """They stop as if asked to, after the same step, and save."""
    kill = {"once": ranks.once_saved(2), "rank": -1, "signal": "SIGKILL"}
    assert ranks(step_s=0.3, disturb=[kill])["left"] == []
    assert 2 < newest(ranks) < 8
    assert ranks.said()[-1].startswith(f"saved at step {newest(ranks)}; ")


@pytest.mark.slow
def test_ten_moments_of_training(ranks, tmp_path):
    """kill -9 of either process at random moments; restarts lead to the weights of the unbroken run, bit for bit."""
    assert ranks()["codes"] == {}
    ranks.folder.rename(tmp_path / "unbroken")
    rng, num_killed = random.Random("moments of several processes"), 0
    words = [*ranks.words(), "--resume"]
    for number in range(MAX_RUNS):
        # the second one while all start again, or later
        kills = [
            {"once": str(ranks.folder / "config.toml"), "after_s": rng.uniform(*span), "rank": rng.choice([0, 1])}
            for span in ((0, 3), (0.5, 5))
        ]
        answer = ranks(words, step_s=0.3, max_restarts=2, disturb=[{**kill, "signal": "SIGKILL"} for kill in kills])
        assert answer["left"] == []
        assert answer["codes"] == {}, ranks.lines
        num_killed += sum(line.startswith("restart ") for line in ranks.lines)
        assert_equal_weights(tmp_path / "unbroken", ranks.folder)
        assert steps_logged(ranks.folder) == list(range(1, 9))
        ranks.folder.rename(tmp_path / f"done-{number}")
        if num_killed >= NUM_KILLS:
            break
    assert num_killed >= NUM_KILLS
    print(f"\n{num_killed} kills, {number + 1} runs completed and equal")
