"""How a process of several ends: what it has to say is said once for all of them, by rank 0 where that still lives."""

from __future__ import annotations

import sys
from contextlib import suppress

from safelight.text import printable_lines
from safelight.trainer.distributed import outputs, started
from safelight.trainer.distributed.fault import EndedByPeer, Fault
from safelight.trainer.distributed.meeting import note_final, open_store, tell_before_meeting
from safelight.trainer.distributed.world import current_watch


def tell(text: str, status: int, command: str = "") -> int:
    """Say how this process ends, unless another one's end has been said, and return the exit status of all.

    command: its name; if given, add a line with this process's rank and host and how to go on.
    """
    rank, watch = started.rank(), current_watch()
    if command:
        going_on = "" if watch is None else f"; {watch.outlook(status)}"
        text += f"\nsafelight {command}: that was rank {rank} on {started.host()}{going_on}"
    if not started.is_main_process():
        _log(text)
    fault = Fault(rank, text, status)
    if watch is not None and not watch.is_closed:
        watch.report(fault)
        return watch.fault.status
    if rank and tell_before_meeting(fault):
        return status
    started.note_that_said()
    outputs.say_on_terminal(text)
    if not rank and watch is None:
        # the others wait for this process
        with suppress(RuntimeError, KeyError):
            note_final(open_store(), status)
    return status


def status_of_other(error: BaseException) -> int | None:
    """Return the exit status if another process's end is why `error` was raised; None if it is this process's own."""
    watch = current_watch()
    fault = error.fault if isinstance(error, EndedByPeer) else watch.learn(error) if watch is not None else None
    if fault is None:
        return None
    if isinstance(error, EndedByPeer) and started.is_main_process():
        # it was told to rank 0, which is to say it
        started.note_that_said()
        outputs.say_on_terminal(fault.text)
    elif not started.is_main_process():
        _log(f"ended with the run: {fault.text}")
    return fault.status


def _log(text: str) -> None:
    """Print to this process's log."""
    with suppress(OSError):
        print(printable_lines(text), file=sys.stderr, flush=True)
