"""A program for test_resume: it imports everything once, then forks a child for each run that its input asks for.

Each line of standard input is JSON: {"settings", "resume", "point", "count"}; each answer is the child's exit code, or
minus the signal that ended it. Imports take ten seconds; a fork does not.
"""

import json
import os
import signal
import sys

import bitsandbytes  # noqa: F401  imported before forking
import torch

from safelight.trainer import checkpoint, log, train
from safelight.trainer.config import parse_config


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
        # weights are written, state.json is not: the middle of a checkpoint
        wrap(checkpoint, "_sync_file", after=False)
    elif point == "before rename":
        wrap(checkpoint, "sync_folder", after=False)
    elif point == "prune":
        wrap(train, "prune", after=False)
    elif point == "half a line":
        original = log.Metrics.write

        def write(self, kind, step, **values):
            left[0] -= 1
            if left[0] == 0:
                self.file.write('{"kind": "train", "ste')
                self.file.flush()
                _die()
            original(self, kind, step, **values)

        log.Metrics.write = write


def _child(settings: dict, resume: bool, point: str, count: int) -> None:
    torch.set_num_threads(1)
    if point:
        _arm(point, count)
    train.train(parse_config(settings, "test"), resume=resume)


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            # standard output is the answer's channel
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            _child(**job)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    serve()
