"""A program for tests: it imports everything once, then forks the processes of a job for each line of its input.

`Processes` starts it and hands it jobs. A job is a function of a test module, which every process calls with the same
arguments, and with torchrun's variables if there are several; what it returns must be JSON. Processes that do not end
in time are killed, with those that they have started.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120.0
# how long the other processes of a job may go on after one has failed
GRACE_S = 2.0


class Processes:
    """Runs functions in one process or in several at once. A context manager."""

    def __enter__(self) -> Processes:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait(30)

    def __call__(self, function: Callable, num: int = 2, timeout_s: float = TIMEOUT_S, **arguments) -> list:
        """Return what each process returned, by rank.

        function: of a module in tests, called with `arguments`, which must be JSON. Raises AssertionError with the
        traceback of the first process that raised, or if one was killed.
        """
        with tempfile.TemporaryDirectory() as answers:
            place = f"{function.__module__}:{function.__qualname__}"
            job = {"place": place, "num": num, "timeout_s": timeout_s, "arguments": arguments, "answers": answers}
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
            codes = json.loads(self._server.stdout.readline())
            failed = {rank: Path(answers, f"{rank}.error") for rank, code in enumerate(codes) if code}
            texts = [f"process {rank}: {path.read_text()}" for rank, path in failed.items() if path.is_file()]
            assert not failed, "\n".join(texts) or f"exit codes {codes}; -9: killed"
            return [json.loads(Path(answers, str(rank)).read_text()) for rank in range(num)]


def _child(job: dict, rank: int, port: int) -> int:
    import torch

    torch.set_num_threads(1)
    if job["num"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["num"], "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()}
    module, _, name = job["place"].partition(":")
    try:
        answer = getattr(importlib.import_module(module), name)(**job["arguments"])
        Path(job["answers"], str(rank)).write_text(json.dumps(answer))
    except BaseException:
        Path(job["answers"], f"{rank}.error").write_text(traceback.format_exc())
        return 1
    return 0


def _run(job: dict) -> list[int]:
    """Return the exit code of each process, or minus the signal that ended it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = {}
    for rank in range(job["num"]):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            # standard output carries the answers
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            os._exit(_child(job, rank, port))
        pids[pid] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + job["timeout_s"]
    try:
        while pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[pids.pop(pid)] = code = os.waitstatus_to_exitcode(status)
                if code:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            elif time.monotonic() > deadline:
                _kill(pids)
                deadline = float("inf")
            else:
                time.sleep(0.005)
    except KeyboardInterrupt:
        _kill(pids)
        raise
    return [codes[rank] for rank in range(job["num"])]


def _kill(pids: dict[int, int]) -> None:
    """Kill processes with what they have started."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def serve() -> None:
    # before forking: they take seconds
    import bitsandbytes  # noqa: F401
    import diffusers
    import torch.distributed.launcher.api  # noqa: F401

    import safelight.trainer.optim.library_optimizer
    import safelight.trainer.report.build
    import safelight.trainer.train  # noqa: F401

    diffusers.utils.logging.set_verbosity_error()
    # frozen objects are not visited by the children's garbage collection, which would copy the memory they share
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
