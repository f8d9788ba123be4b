"""What tests of single processes run: training and commands that are killed or signalled at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from safelight.__main__ import main
from safelight.trainer import train
from safelight.trainer.checkpoint import files as checkpoint
from safelight.trainer.checkpoint import saver
from safelight.trainer.config.toml import parse_config
from safelight.trainer.run_log import metrics as log


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(point: str, count: int) -> None:
    """Kill this process the count-th time it reaches a point."""
    left = [count]

    def wrap(module, name: str, *, after: bool):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and not after:
                _die()
            result = original(*args, **kwargs)
            if left[0] == 0 and after:
                _die()
            return result

        setattr(module, name, wrapped)

    if point == "step":
        wrap(train, "train_step", after=True)
    elif point == "checkpoint file":
        # in the middle of a checkpoint: the weights are written, state.json is not
        wrap(checkpoint, "_sync_file", after=False)
    elif point == "before rename":
        wrap(checkpoint, "sync_folder", after=False)
    elif point == "prune":
        wrap(saver, "prune", after=False)
    elif point == "half a line":
        original = log.Metrics.write

        def write(self, kind, step, **values):
            left[0] -= 1
            if left[0] == 0:
                self.file.write(b'{"kind": "train", "ste')
                self.file.flush()
                _die()
            original(self, kind, step, **values)

        log.Metrics.write = write


def slow_down(seconds: float) -> None:
    """Let every training step of this process take longer."""
    original = train.train_step

    def slow(*args, **options):
        result = original(*args, **options)
        time.sleep(seconds)
        return result

    train.train_step = slow


def _child(job: dict) -> int:
    torch.set_num_threads(1)
    if job.get("point"):
        _arm(job["point"], job["count"])
    if job.get("step_s"):
        slow_down(job["step_s"])
    if "words" in job:
        with open(job["log"], "w", buffering=1) as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            return main(job["words"])
    train.train(parse_config(job["settings"], "test"), resume=job.get("resume", False))
    return 0


def _disturb(pid: int, job: dict) -> None:
    """Send a child the job's signals, and return when all are sent. A child that has ended gets none."""
    while "once" in job and not os.path.exists(job["once"]) and os.path.exists(f"/proc/{pid}/exe"):
        time.sleep(0.01)
    for name in job.get("signals", ()):
        os.kill(pid, getattr(signal, name))
        # two signals at the same moment would be delivered as one
        time.sleep(0.1)
    if "kill_after_s" in job:
        time.sleep(job["kill_after_s"])
        os.kill(pid, signal.SIGKILL)


def run(**job) -> int:
    """Return the exit code of a child that does a job, or minus the signal that ended it.

    settings, resume    train with these settings in the child
    words, log          or call the command line with these words, with standard error written to the file `log`
    point, count        the child kills itself the count-th time it reaches a point
    step_s              seconds by which the child's steps are slowed down
    signals             names of signals that are sent to it as soon as the path `once` exists
    kill_after_s        seconds after which it is killed
    """
    pid = os.fork()
    if pid == 0:
        os._exit(_child(job))
    _disturb(pid, job)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
