"""`--gpus`: starts the processes of a command on this machine with torch's elastic launcher.

Unlike torchrun it prints nothing of its own, passes Ctrl-C on once for each time it is pressed, and does not start a
run again that ended as it should (started.FINAL_STATUSES): such a process exits with 0 and leaves its status in a file.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safelight.errors import EXIT_INTERRUPTED, UserError
from safelight.text import counted
from safelight.trainer.distributed import started
from safelight.trainer.distributed.fault import EXIT_FAULT

# after a second Ctrl-C, for the processes to leave
LEAVE_S = 10.0
# processes on the CPU that are allowed even on fewer cores: enough to try out what several GPUs would do
NUM_WITHOUT_CORES = 16
STOPS = ("SIGINT", "SIGTERM", "SIGHUP")


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_cores(num_processes: int) -> None:
    """Raise UserError for more processes on the CPU than can be meant: each loads all libraries and the model."""
    most = max(NUM_WITHOUT_CORES, num_cores())
    if num_processes > most:
        raise UserError(
            f"--gpus {num_processes}: without a GPU the processes run on the CPU, where at most {most} are allowed; it "
            f"has {counted(num_cores(), 'core')} for them, so use --gpus {num_cores()}"
        )


def threads_each(num_processes: int) -> int:
    """Return how many threads each of several processes computes with: OMP_NUM_THREADS, or its share of the cores.

    Raises UserError if OMP_NUM_THREADS is no number above 0.
    """
    # a list such as 4,2 is for nested parallel regions; torch has the outer one
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if text and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"OMP_NUM_THREADS is {text!r} in the environment; give a number of threads, or unset it")
    return int(text or max(1, num_cores() // num_processes))


def launch(
    module: str, words: list[str], num_processes: int, max_restarts: int, say_lost: Callable[[str], None]
) -> int:
    """Run `python -m MODULE WORDS` in so many processes and return the run's exit status.

    say_lost: called with what became of a process if all of them ended without being able to say so.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="safelight-") as name, _passing_on_signals(Path(name)):
        folder = Path(name)
        # the processes inherit them
        os.environ |= {
            started.GPUS: str(num_processes),
            started.LAUNCH_FOLDER: name,
            "OMP_NUM_THREADS": str(threads_each(num_processes)),
        }
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            logs_specs=DefaultLogsSpecs(log_dir=name),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=max_restarts,
            local_addr="127.0.0.1",
            # the others are passed on here
            signals_to_handle="SIGQUIT",
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *words)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if not started.said_file(folder, max_restarts).exists():
                how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else "failed"
                say_lost(f"rank {rank} on {started.host()} {how}")
            return EXIT_FAULT
        finally:
            _end_all(folder)
        statuses = [int(file.read_text()) for rank in range(num_processes) if (file := _status(folder, rank)).exists()]
        return max(statuses, default=EXIT_INTERRUPTED)


def _status(folder: Path, rank: int) -> Path:
    return started.status_file(folder, rank)


def _pids(folder: Path) -> list[int]:
    """Return the numbers of the processes that run."""
    pids = []
    for file in folder.glob("pid-*"):
        with suppress(OSError, ValueError):
            pids.append(int(file.read_text()))
    return pids


def _send(folder: Path, number: int) -> None:
    for pid in _pids(folder):
        with suppress(OSError):
            os.kill(pid, number)


def _end_all(folder: Path) -> None:
    """Leave no process behind, whatever ended the launcher."""
    _send(folder, signal.SIGKILL)


@contextmanager
def _passing_on_signals(folder: Path) -> Iterator[None]:
    """Pass what asks this process to stop on to the processes that it has started."""
    num_interrupts = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal num_interrupts
        started.stop_file(folder).touch()
        _send(folder, number)
        num_interrupts += number == signal.SIGINT
        if num_interrupts == 2:
            timer = threading.Timer(LEAVE_S, _send, (folder, signal.SIGKILL))
            timer.daemon = True
            timer.start()

    numbers = [number for name in STOPS if (number := getattr(signal, name, None)) is not None]
    previous = {number: signal.getsignal(number) for number in numbers}
    for number, handler in previous.items():
        # under nohup, SIGHUP stays ignored
        if handler != signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
