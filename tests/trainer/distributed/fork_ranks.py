"""A program for tests: it imports everything once, then runs a command in several processes for each job on its input.

The processes are forked by torch's elastic launcher, with its store, restarts and signals; only their start is quick.
Each line of standard input is a job in JSON; each answer is {"codes": rank -> exit code of each process that failed
last, or minus the signal that ended it; "seconds": from the first disturbance to the end; "left": processes that
outlived the launcher}.
    words               of the command line; words_of: rank -> other words
    num, max_restarts   of processes, of restarts
    log, pids           a file for standard error of all; a folder for the processes' numbers
    step_s              seconds by which steps are slowed down
    raises              rank, count, kind: before a restart, a rank's step fails: bug, user, memory, nan, or sleep
    versions            rank -> the version of torch that it finds; folders: rank -> a folder it works in
    disturb             a list of {once: a path to wait for, after_s, rank, signal}; a rank of -1 is the launcher
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

# imported before forking
import bitsandbytes  # noqa: F401
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import safelight.trainer.report.build  # noqa: F401
from safelight.__main__ import main, quiet_libraries
from safelight.errors import UserError
from safelight.trainer import train
from safelight.trainer.optim import library_optimizer  # noqa: F401


def _raise_at(count: int, kind: str) -> None:
    """Let the count-th step fail in some way."""
    original, left = train.train_step, [count]

    def step(context, *arguments, **options):
        left[0] -= 1
        if left[0]:
            return original(context, *arguments, **options)
        if kind == "bug":
            raise RuntimeError("made for a test")
        if kind == "user":
            raise UserError("what the user can mend")
        if kind == "memory":
            raise MemoryError
        if kind == "sleep":
            time.sleep(1000)
        for parameter in context.unet.parameters():
            parameter.data.fill_(torch.nan)
        return original(context, *arguments, **options)

    train.train_step = step


def _slow_down(seconds: float) -> None:
    original = train.train_step

    def slow(*arguments, **options):
        result = original(*arguments, **options)
        time.sleep(seconds)
        return result

    train.train_step = slow


def _rank(job: dict) -> int:
    """What each process runs."""
    torch.set_num_threads(1)
    rank, restarts = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    # torchrun's processes begin with Python's own handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    Path(job["pids"], f"{rank}-{restarts}").write_text(str(os.getpid()))
    if "raises" in job and job["raises"]["rank"] == int(rank) and not restarts:
        _raise_at(job["raises"]["count"], job["raises"]["kind"])
    if job.get("step_s"):
        _slow_down(job["step_s"])
    if version := job.get("versions", {}).get(rank):
        found = importlib.metadata.version
        importlib.metadata.version = lambda package: version if package == "torch" else found(package)
    if folder := job.get("folders", {}).get(rank):
        os.chdir(folder)
    code = main(job.get("words_of", {}).get(rank, job["words"]))
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def _launch(job: dict) -> dict[int, int]:
    """Run the processes in this one, and return the exit codes of those that failed."""
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # the launcher's own lines are not what is tested
    quiet_libraries()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.get("num", 2),
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=job.get("max_restarts", 0),
        start_method="fork",
        monitor_interval=0.05,
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=tempfile.mkdtemp(dir=job["pids"])),
    )
    try:
        elastic_launch(config, _rank)(job)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        return {-1: -error.sigval}
    return {}


def _pid(job: dict, rank: int, launcher: int) -> int:
    if rank < 0:
        return launcher
    newest = max(Path(job["pids"]).glob(f"{rank}-*"), key=lambda path: int(path.name.split("-")[1]))
    return int(newest.read_text())


def _disturb(job: dict, launcher: int, began: list[float]) -> None:
    for one in job.get("disturb", ()):
        while "once" in one and not os.path.exists(one["once"]):
            time.sleep(0.01)
            if not os.path.exists(f"/proc/{launcher}/exe"):
                return
        time.sleep(one.get("after_s", 0.0))
        began.append(time.monotonic())
        with suppress(ProcessLookupError, ValueError):
            os.kill(_pid(job, one["rank"], launcher), getattr(signal, one["signal"]))


def _run(job: dict) -> dict:
    reading, writing = os.pipe()
    began: list[float] = []
    launcher = os.fork()
    if launcher == 0:
        os.close(reading)
        codes = _launch(job)
        os.write(writing, json.dumps(codes).encode())
        os._exit(0)
    os.close(writing)
    thread = threading.Thread(target=_disturb, args=(job, launcher, began), daemon=True)
    thread.start()
    os.waitpid(launcher, 0)
    ended = time.monotonic()
    # of one that was killed itself, its processes end a little later
    for _ in range(200):
        pids = [int(path.read_text()) for path in Path(job["pids"]).glob("*-*") if path.is_file()]
        left = [pid for pid in pids if _is_alive(pid)]
        if not left:
            break
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    os.set_blocking(reading, False)
    try:
        content = os.read(reading, 2**16)
    except BlockingIOError:
        content = b""
    os.close(reading)
    seconds = round(ended - began[0], 2) if began else None
    return {"codes": json.loads(content or b"{}"), "seconds": seconds, "left": left}


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)
