"""Run a generator in a subprocess and receive its results one by one; a crash or hang there leaves the caller intact.

After a CUDA error such as an illegal memory access no later CUDA call succeeds in the process, and a process that
crashed or hangs cannot continue either. Measurements that may fail this way run here, and the caller makes no CUDA
call.
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

# seconds that a terminated process has to end its own children
GRACE_S = 5.0


class SubprocessEnded(Exception):
    """The subprocess ended, or was ended for being silent, before its work was done; the message says how."""


def run_in_subprocess(
    work: Callable[..., Iterator], *arguments: object, silence_limit_s: Callable[[], float]
) -> Iterator:
    """Yield what `work(*arguments)` yields in a new process. work, arguments and results must be picklable.

    silence_limit_s: called before each wait for a result; a process that sends nothing for that long is ended. Raises
    SubprocessEnded, and passes on a UserError that work raises. Closing the iterator ends the process.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_results, args=(sending, work, arguments), name=f"safelight-{work.__name__}")
    process.start()
    # now only the subprocess holds the sending end, so its death closes the pipe
    sending.close()
    try:
        while (message := _receive(receiving, process, silence_limit_s())) is not None:
            kind, value = message
            if kind == "error":
                raise value
            yield value
    finally:
        _terminate(process)
        receiving.close()


def _send_results(sending: Connection, work: Callable, arguments: tuple) -> None:
    """Run the work in the subprocess. Sends ("result", value) or ("error", exception), and None at the end."""
    # Ctrl-C reaches both processes; the caller ends this one. SIGTERM unwinds the stack, so that children end too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for result in work(*arguments):
            sending.send(("result", result))
    except UserError as error:
        sending.send(("error", error))
    except BrokenPipeError:
        # the caller has gone
        return
    sending.send(None)


def _receive(receiving: Connection, process: BaseProcess, silence_limit_s: float) -> tuple[str, object] | None:
    """Return the subprocess's next message. Raises SubprocessEnded if it died or sends none in time."""
    if not receiving.poll(silence_limit_s):
        raise SubprocessEnded(f"no result for {silence_limit_s:.0f} s; the process was ended")
    try:
        return receiving.recv()
    except EOFError:
        process.join()
    code = process.exitcode
    with contextlib.suppress(ValueError):
        if code < 0:
            raise SubprocessEnded(f"the process was killed by {signal.Signals(-code).name}")
    raise SubprocessEnded(f"the process exited with status {code}")


def _terminate(process: BaseProcess) -> None:
    for stop in (process.terminate, process.kill):
        if process.is_alive():
            stop()
            process.join(GRACE_S)
