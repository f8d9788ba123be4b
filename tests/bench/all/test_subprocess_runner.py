"""Crashes, hangs and CUDA errors stay in the subprocess, and `bench all` continues with the next part."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safelight.bench.all import run_all, short_training_run
from safelight.bench.all.parts import SILENCE_LIMIT_S, BenchContext, Part
from safelight.bench.all.subprocess_runner import SubprocessEnded, run_in_subprocess
from safelight.bench.core.results import read
from safelight.bench.recipes.workload import Workload
from safelight.errors import UserError
from tests.bench import children, parts

WORK = Workload(device="cpu")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Put the repository on sys.path: a spawned process imports tests.bench by name, pytest does not need that."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a zombie (ended, not yet waited for) is not alive
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def number_in(file: Path) -> int:
    """Wait until a file with a process id has been written, and return the id."""
    end = time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return int(file.read_text())


def test_a_silent_process_and_its_children_are_ended(tmp_path):
    results = run_in_subprocess(children.endless, tmp_path / "pid", silence_limit_s=lambda: 60.0 if not pids else 0.5)
    pids: list[int] = []
    pids.append(next(results))
    pids.append(number_in(tmp_path / "pid"))
    assert all(map(is_alive, pids))
    with pytest.raises(SubprocessEnded, match="no result for 0 s; the process was ended"):
        next(results)
    assert not any(map(is_alive, pids))


def test_user_errors_are_passed_on_and_an_exit_is_reported():
    results = run_in_subprocess(children.refused, silence_limit_s=lambda: 60.0)
    assert next(results) == 1
    with pytest.raises(UserError, match="size 3 is not a power of two; use 4"):
        next(results)
    with pytest.raises(SubprocessEnded, match="the process exited with status 3"):
        list(run_in_subprocess(os._exit, 3, silence_limit_s=lambda: 60.0))


def test_closing_the_iterator_ends_the_process(tmp_path):
    results = run_in_subprocess(children.endless, tmp_path / "pid", silence_limit_s=lambda: 60.0)
    pid = next(results)
    assert is_alive(pid)
    results.close()
    assert not is_alive(pid)


def test_ctrl_c_in_the_caller_kills_the_command_it_runs(tmp_path):
    """The command has its own process group, which Ctrl-C does not reach."""
    file = tmp_path / "pid"

    def interrupt() -> None:
        number_in(file)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        short_training_run.call([sys.executable, "-c", children.WRITES_ITS_PID, str(file)], 60, tmp_path / "log")
    assert not is_alive(number_in(file))


class _Crash(BaseException):
    pass


def crash(context: BenchContext) -> Iterator[dict]:
    yield parts.line(context, "crash")
    raise _Crash


def fail(context: BenchContext) -> Iterator[dict]:
    yield parts.line(context, "fail")
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def test_after_a_failed_part_a_new_process_takes_the_rest(tmp_path, monkeypatch):
    started = []

    def in_this_process(work: Callable, *arguments: object, silence_limit_s: Callable[[], float]) -> Iterator:
        """Stand in for run_in_subprocess, which takes seconds to import torch."""
        started.append([part.name for part in arguments[0]])
        try:
            for event in work(*arguments):
                yield event
                waits.append(silence_limit_s())
        except _Crash:
            raise SubprocessEnded("the process was killed by SIGSEGV") from None

    waits: list[float] = []
    chosen = (
        Part("crash", 0, 600, crash),
        Part("good", 0, 600, parts.good, 7.0),
        Part("fail", 0, 600, fail),
        Part("late", 1e9, 1e9, parts.good),
        Part("good", 0, 600, parts.good),
    )
    monkeypatch.setattr(run_all, "PARTS", chosen)
    monkeypatch.setattr(run_all, "run_in_subprocess", in_this_process)
    monkeypatch.setattr(run_all, "pick_device", lambda device: type("Device", (), {"type": "cuda"}))
    monkeypatch.setattr(BenchContext, "is_gpu", True)
    records = list(run_all.run_parts(3, tmp_path, WORK))
    assert [(r["bench"], bool(r["figures"].get("failed")), r.get("note", "")) for r in records] == [
        ("crash", False, ""),
        ("crash", True, "the process was killed by SIGSEGV"),
        ("good", False, ""),
        ("fail", False, ""),
        ("fail", True, "CUDA error: an illegal memory access was encountered"),
        ("late", False, "skipped: not enough time left"),
        ("good", False, ""),
    ]
    assert records == read(tmp_path / "results.jsonl")
    assert started == [["crash", "good", "fail", "late", "good"], ["good", "fail", "late", "good"], ["late", "good"]]
    assert all(r["machine"]["torch"] for r in records)
    # each part has its own limit
    assert 7.0 in waits
    assert max(waits) == SILENCE_LIMIT_S


def test_a_process_that_cannot_start_ends_the_command(tmp_path, monkeypatch):
    def exits(*_: object, **__: object) -> Iterator:
        raise SubprocessEnded("the process exited with status 1")
        yield

    monkeypatch.setattr(run_all, "run_in_subprocess", exits)
    chosen = (Part("good", 0, 600, parts.good),)
    with pytest.raises(RuntimeError, match="the benchmark process could not start: the process exited with status 1"):
        list(run_all._measure_in_subprocesses(chosen, tmp_path, WORK, time.monotonic()))


@pytest.mark.slow
def test_every_part_is_measured_though_others_crash_hang_or_break_the_device(tmp_path, monkeypatch):
    chosen = (
        Part("crash", 0, 600, parts.crash),
        Part("good", 0, 600, parts.good),
        Part("spoil", 0, 600, parts.spoil),
        Part("needs_the_device", 0, 600, parts.needs_the_device),
        Part("hang", 0, 600, parts.hang, silence_limit_s=30),
        Part("late", 1e9, 1e9, parts.good),
    )
    monkeypatch.setattr(run_all, "PARTS", chosen)
    monkeypatch.setattr(run_all, "part_events", parts.as_on_a_gpu)
    monkeypatch.setattr(run_all, "pick_device", lambda device: type("Device", (), {"type": "cuda"}))
    records = list(run_all.run_parts(10, tmp_path, WORK))
    assert [(r["bench"], bool(r["figures"].get("failed")), r.get("note", "")) for r in records] == [
        ("crash", False, ""),
        ("crash", True, "the process was killed by SIGSEGV"),
        ("good", False, ""),
        ("spoil", True, "CUDA error: an illegal memory access was encountered"),
        ("needs_the_device", False, ""),
        ("hang", False, ""),
        ("hang", True, "no result for 30 s; the process was ended"),
        ("late", False, "skipped: not enough time left"),
    ]
    assert records == read(tmp_path / "results.jsonl")
    pids = {r["bench"]: r["figures"]["pid"] for r in records if "pid" in r["figures"]}
    # a new process after each failure, and none of them the caller's
    assert len({*pids.values(), os.getpid()}) == 4
    assert not any(is_alive(pid) for pid in pids.values())
