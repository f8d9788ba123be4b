"""Work in a process of its own, told line by line: what ends or blocks that process leaves the caller whole.

A CUDA error such as an illegal address stays with a process: no later call succeeds in it. Nor does a crash or a hang leave one
that could go on. So what may meet them runs here, and the caller never touches the device.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from safelight.errors import UserError

# for a process that is told to end to end those it has begun
GRACE_S = 5.0


class Ended(Exception):
    """The process ended, or was ended, before its work did; the message says how."""


def apart(work: Callable[..., Iterator], *arguments: object, patience_s: Callable[[], float]) -> Iterator:
    """Yield what `work(*arguments)` yields in a new process. work, arguments and what it yields: picklable.

    patience_s: asked before each wait; a process that is silent for so long is ended. Raises Ended, and a UserError of the
    work's as it is. Closing the iterator ends the process.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(sending, work, arguments), name=f"safelight-{work.__name__}")
    process.start()
    # the process holds the only other end, so that its end is seen
    sending.close()
    try:
        while (told := _next(receiving, process, patience_s())) is not None:
            kind, value = told
            if kind == "error":
                raise value
            yield value
    finally:
        _end(process)
        receiving.close()


def _tell(sending: Connection, work: Callable, arguments: tuple) -> None:
    # Ctrl-C reaches both; the caller ends this one. SIGTERM unwinds, so that what this one has begun ends with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for found in work(*arguments):
            sending.send(("found", found))
    except UserError as error:
        sending.send(("error", error))
    except BrokenPipeError:
        # the caller is gone
        return
    sending.send(None)


def _next(receiving: Connection, process: BaseProcess, patience_s: float) -> tuple[str, object] | None:
    if not receiving.poll(patience_s):
        raise Ended(f"nothing was heard for {patience_s:.0f} s")
    try:
        return receiving.recv()
    except EOFError:
        process.join()
    code = process.exitcode
    with contextlib.suppress(ValueError):
        if code < 0:
            raise Ended(f"the process was ended by {signal.Signals(-code).name}")
    raise Ended(f"the process ended with status {code}")


def _end(process: BaseProcess) -> None:
    for end in (process.terminate, process.kill):
        if process.is_alive():
            end()
            process.join(GRACE_S)
