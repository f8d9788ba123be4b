"""What tests of faults run: a command in several processes of torch's elastic launcher, some of which get signals.

Store, restarts and signals are torch's; only the start differs, since forking is quicker than starting Python anew.
Several launchers stand for torchrun with --nnodes on several machines.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from safelight import rank
from safelight.__main__ import main, quiet_libraries
from safelight.errors import UserError
from safelight.trainer import train
from safelight.trainer.models.latent_codec import LatentCodec
from tests.trainer.killed_runs import slow_down

# seconds for which a launcher waits for the others
RENDEZVOUS_S = 20


def _raise_at(count: int, kind: str) -> None:
    """Let the count-th step fail: with a bug, a mistake of the user, full memory, a hang (sleep) or NaN weights."""
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


def _encode_slowly(seconds: float) -> None:
    """Let every batch of photographs of this process take longer to encode."""
    original = LatentCodec.encode

    def slow(*arguments, **options):
        time.sleep(seconds)
        return original(*arguments, **options)

    LatentCodec.encode = slow


def _begin() -> None:
    """Make a forked process like one that torchrun has started."""
    torch.set_num_threads(1)
    # torch has forked processes signalled when their launcher ends; torchrun's own processes are not
    torch.multiprocessing._prctl_pr_set_pdeathsig(0)
    # forked processes inherit the launcher's handlers, others begin with Python's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def _end(code: int) -> int:
    """Exit with this code; torch's launcher takes whatever a function returns for success."""
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def _rank(job: dict) -> int:
    """What each process runs."""
    _begin()
    number, restarts = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    Path(job["pids"], f"{number}-{restarts}").write_text(str(os.getpid()))
    if "raises" in job and job["raises"]["rank"] == int(number) and not restarts:
        _raise_at(job["raises"]["count"], job["raises"]["kind"])
    if job.get("step_s"):
        slow_down(job["step_s"])
    if job.get("encode_s"):
        _encode_slowly(job["encode_s"])
    if version := job.get("versions", {}).get(number):
        found = importlib.metadata.version
        importlib.metadata.version = lambda package: version if package == "torch" else found(package)
    if folder := job.get("folders", {}).get(number):
        os.chdir(folder)
    return _end(main(job.get("words_of", {}).get(number, job["words"])))


def _launch(job: dict, number: int, port: int) -> dict[int, int]:
    """Run a launcher's processes in this one, and return the exit codes of those that failed."""
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # the launcher's own lines are not what is tested
    quiet_libraries()
    num_launchers = job.get("num_launchers", 1)
    config = LaunchConfig(
        min_nodes=num_launchers,
        max_nodes=num_launchers,
        nproc_per_node=job.get("num", 2) // num_launchers,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"join_timeout": RENDEZVOUS_S, "is_host": not number} if num_launchers > 1 else {},
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
    except RendezvousError:
        return {-1: 1}
    return {}


def _pid(job: dict, rank: int, launchers: list[int]) -> int:
    if rank < 0:
        return launchers[-1 - rank]
    newest = max(Path(job["pids"]).glob(f"{rank}-*"), key=lambda path: int(path.name.split("-")[1]))
    return int(newest.read_text())


def _disturb(job: dict, launchers: list[int], began: list[float]) -> None:
    for one in job.get("disturb", ()):
        while "once" in one and not os.path.exists(one["once"]):
            time.sleep(0.01)
            if not any(map(_is_alive, launchers)):
                return
        time.sleep(one.get("after_s", 0.0))
        began.append(time.monotonic())
        with suppress(ProcessLookupError, ValueError):
            os.kill(_pid(job, one["rank"], launchers), getattr(signal, one["signal"]))


def run(job: dict) -> dict:
    """Return how a command's processes end: {"codes": rank -> exit code of each that failed last, or minus the signal
    that ended it, -1 for a launcher; "seconds": from the first disturbance to the end; "left": processes that outlived
    the launchers}.

    words               of the command line; words_of: rank -> other words
    num, max_restarts   of processes, of restarts; num_launchers: of machines, over which they are divided evenly
    log, pids           a file for standard error of all; a folder for the processes' numbers
    step_s, encode_s    seconds by which steps are slowed down, and the encoding of a batch of photographs
    raises              rank, count, kind: before a restart, a rank's step fails: bug, user, memory, nan, or sleep
    versions            rank -> the version of torch that it finds; folders: rank -> a folder it works in
    disturb             a list of {once: a path to wait for, after_s, rank, signal}; ranks of -1, -2 are the launchers
    """
    Path(job["log"]).write_bytes(b"")
    port = 0
    if job.get("num_launchers", 1) > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    readers, launchers = [], []
    for number in range(job.get("num_launchers", 1)):
        reading, writing = os.pipe()
        launchers.append(os.fork())
        if launchers[-1] == 0:
            codes = _launch(job, number, port)
            os.write(writing, json.dumps(codes).encode())
            os._exit(0)
        os.close(writing)
        readers.append(reading)
    began: list[float] = []
    threading.Thread(target=_disturb, args=(job, launchers, began), daemon=True).start()
    for launcher in launchers:
        os.waitpid(launcher, 0)
    ended = time.monotonic()
    # the processes of a launcher that was killed end a little later
    for _ in range(200):
        pids = [int(path.read_text()) for path in Path(job["pids"]).glob("*-*") if path.is_file()]
        left = [pid for pid in pids if _is_alive(pid)]
        if not left:
            break
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    codes = {}
    for reading in readers:
        os.set_blocking(reading, False)
        # a launcher that was killed has written nothing
        with suppress(BlockingIOError):
            codes |= json.loads(os.read(reading, 2**16) or b"{}")
        os.close(reading)
    seconds = round(ended - began[0], 2) if began else None
    return {"codes": codes, "seconds": seconds, "left": left}


def run_with_gpus(words: list[str], out: str) -> int:
    """Return the status of a command with --gpus, whose processes are forked. out: a file for what is printed."""
    file = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    original = api.elastic_launch

    def forks(config: LaunchConfig, program: str) -> Callable[..., object]:
        config.start_method, config.monitor_interval = "fork", 0.05
        return lambda flag, module, *words: original(config, _as_rank)(words)

    with mock.patch.object(api, "elastic_launch", forks):
        return main(words)


def _as_rank(words: list[str]) -> int:
    """Be `python -m safelight.rank WORDS`."""
    _begin()
    sys.argv[1:] = words
    return _end(rank.main())


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
