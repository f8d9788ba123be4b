"""Asking a run to stop: finish the step in flight, save, leave."""

from __future__ import annotations

import os
import signal


class Stopped(Exception):
    """Raised inside long work between steps, once a stop is asked for: it is done again on resume."""


class Stop:
    """Ctrl-C or SIGTERM once: finish the step, save, leave. Ctrl-C twice: leave at once; checkpoints are safe.

    As a context it is in force for the training loop alone: before that there is nothing to save, and Ctrl-C just leaves.
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
        # not print: the signal may have come in the middle of one
        os.write(2, b"\nstopping after this step; press Ctrl-C again to leave at once\n")
