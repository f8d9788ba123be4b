"""Stops a run on Ctrl-C, SIGTERM or a closed terminal: finish the current step, save, exit."""

from __future__ import annotations

import contextlib
import os
import signal

from safelight.trainer.distributed.started import world_size


class Stop:
    """Ctrl-C, SIGTERM or SIGHUP: finish the step, save, exit. A second Ctrl-C exits at once; checkpoints stay intact.

    SIGHUP is sent when the terminal is closed or its ssh connection is lost. Under nohup it is ignored, and stays so.

    A context manager: signals are handled only inside its block, the training loop. Before that there is nothing to
    save, and Ctrl-C ends the process as usual. Calling it returns whether a stop was requested.
    unit: what is finished first, in the message.
    """

    def __init__(self, unit: str = "this step"):
        self.requested = False
        self._message = f"\nstopping after {unit}; press Ctrl-C again to leave at once\n".encode()
        self._previous: dict = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> None:
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP
        if (hang_up := getattr(signal, "SIGHUP", None)) and signal.getsignal(hang_up) != signal.SIG_IGN:
            numbers.append(hang_up)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if number == signal.SIGTERM and world_size() > 1:
            # torchrun sends it, too, to end the processes that are left after a fault
            return
        # not print, which is not reentrant: the signal may have interrupted one
        with contextlib.suppress(OSError):
            os.write(2, self._message)
