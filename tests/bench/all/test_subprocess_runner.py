"""What ends, blocks or spoils a process leaves the caller whole, and `bench all` goes on with the next part."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safelight.bench.all import run_all as everything
from safelight.bench.all import short_training_run as short_run
from safelight.bench.all.run_all import Part, Session
from safelight.bench.all.subprocess_runner import Ended, apart
from safelight.bench.core.results import read
from safelight.bench.recipes.workload import Workload
from tests.bench import children, parts

WORK = Workload(device="cpu")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """A new process imports what it is given by name; pytest itself imports tests without their root on the path."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # one that ended and was not waited for is none
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def number_in(file: Path) -> int:
    """Return the process number in a file that is about to be written."""
    end = time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return int(file.read_text())


def test_a_silent_process_is_ended_with_what_it_has_begun(tmp_path):
    told = apart(children.endless, tmp_path / "pid", patience_s=lambda: 60.0 if not pids else 0.5)
    pids: list[int] = []
    pids.append(next(told))
    pids.append(number_in(tmp_path / "pid"))
    assert all(map(is_alive, pids))
    with pytest.raises(Ended, match="nothing was heard for 0 s"):
        next(told)
    assert not any(map(is_alive, pids))


def test_who_closes_it_ends_the_process():
    told = apart(children.refused, patience_s=lambda: 60.0)
    assert next(told) == 1
    told.close()
    told = apart(children.refused, patience_s=lambda: 60.0)
    assert next(told) == 1
    with pytest.raises(ValueError, match="size 3 is no power of two; use 4"):
        next(told)
    with pytest.raises(Ended, match="the process ended with status 3"):
        list(apart(os._exit, 3, patience_s=lambda: 60.0))


def test_a_command_ends_with_whoever_called_it(tmp_path, monkeypatch):
    """Its group is its own, so Ctrl-C does not reach it."""
    file = tmp_path / "pid"

    def interrupt() -> None:
        number_in(file)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        short_run.call([sys.executable, "-c", children.TELLS_ITS_PID, str(file)], 60, tmp_path / "log")
    assert not is_alive(number_in(file))


class _Crash(BaseException):
    pass


def crash(session: Session) -> Iterator[dict]:
    yield parts.line(session, "crash")
    raise _Crash


def fail(session: Session) -> Iterator[dict]:
    yield parts.line(session, "fail")
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def test_after_a_part_that_failed_a_new_process_takes_the_rest(tmp_path, monkeypatch):
    begun = []

    def stand_in(work: Callable, *arguments: object, patience_s: Callable[[], float]) -> Iterator:
        begun.append([part.name for part in arguments[0]])
        try:
            for found in work(*arguments):
                yield found
                waits.append(patience_s())
        except _Crash:
            raise Ended("the process was ended by SIGSEGV") from None

    waits: list[float] = []
    chosen = (
        Part("crash", 0, crash),
        Part("good", 0, parts.good, 7.0),
        Part("fail", 0, fail),
        Part("late", 1e9, parts.good),
        Part("good", 0, parts.good),
    )
    monkeypatch.setattr(everything, "PARTS", chosen)
    monkeypatch.setattr(everything, "apart", stand_in)
    monkeypatch.setattr(everything, "pick_device", lambda device: type("Device", (), {"type": "cuda"}))
    monkeypatch.setattr(Session, "is_gpu", True)
    records = list(everything.run_all(3, tmp_path, WORK))
    assert [(r["bench"], bool(r["figures"].get("failed")), r.get("note", "")) for r in records] == [
        ("crash", False, ""),
        ("crash", True, "the process was ended by SIGSEGV"),
        ("good", False, ""),
        ("fail", False, ""),
        ("fail", True, "CUDA error: an illegal memory access was encountered"),
        ("late", False, "left out: the time was up"),
        ("good", False, ""),
    ]
    assert records == read(tmp_path / "results.jsonl")
    assert begun == [["crash", "good", "fail", "late", "good"], ["good", "fail", "late", "good"], ["late", "good"]]
    assert all(r["machine"]["torch"] for r in records)
    # each part has its own patience, and none much more than the time that is left
    assert 7.0 in waits
    assert max(waits) == everything.PATIENCE_S
    monkeypatch.setattr(everything, "apart", lambda *_, **__: apart(os._exit, 1, patience_s=lambda: 60.0))
    with pytest.raises(RuntimeError, match="nothing can be measured here: the process ended with status 1"):
        list(everything._without_end(chosen[:1], tmp_path, WORK, time.monotonic()))


@pytest.mark.slow
def test_every_part_is_measured_though_one_crashes_one_hangs_and_one_spoils_the_device(tmp_path, monkeypatch):
    chosen = (
        Part("crash", 0, parts.crash),
        Part("good", 0, parts.good),
        Part("spoil", 0, parts.spoil),
        Part("needs_the_device", 0, parts.needs_the_device),
        Part("hang", 0, parts.hang, patience_s=30),
        Part("late", 1e9, parts.good),
    )
    monkeypatch.setattr(everything, "PARTS", chosen)
    monkeypatch.setattr(everything, "told", parts.as_on_a_gpu)
    monkeypatch.setattr(everything, "pick_device", lambda device: type("Device", (), {"type": "cuda"}))
    records = list(everything.run_all(10, tmp_path, WORK))
    found = [(r["bench"], bool(r["figures"].get("failed")), r.get("note", "")) for r in records]
    assert found == [
        ("crash", False, ""),
        ("crash", True, "the process was ended by SIGSEGV"),
        ("good", False, ""),
        ("spoil", True, "CUDA error: an illegal memory access was encountered"),
        ("needs_the_device", False, ""),
        ("hang", False, ""),
        ("hang", True, "nothing was heard for 30 s"),
        ("late", False, "left out: the time was up"),
    ]
    assert records == read(tmp_path / "results.jsonl")
    pids = {r["bench"]: r["figures"]["pid"] for r in records if "pid" in r["figures"]}
    # a new process after each that was lost, and never the caller's
    assert len({*pids.values(), os.getpid()}) == 4
    assert not any(is_alive(pid) for pid in pids.values())
