"""Stops a run on Ctrl-C or SIGTERM: finish the current step, save, exit."""

from __future__ import annotations

import os
import signal


class Stopped(Exception):
    """Raised inside validation or sampling when a stop is requested; a resumed run starts it again."""


class Stop:
    """Ctrl-C or SIGTERM: finish the step, save, exit. A second Ctrl-C exits at once; checkpoints stay intact.

    A context manager: signals are handled only inside its block, the training loop. Before that there is nothing to
    save, and Ctrl-C ends the process as usual. Calling it returns whether a stop was requested.
    """

    def __init__(self):
        self.requested = False
        self._previous: dict = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> None:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # not print, which is not reentrant: the signal may have interrupted one
        os.write(2, b"\nstopping after this step; press Ctrl-C again to leave at once\n")
