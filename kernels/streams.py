"""CUDA streams by name, and their stand-in on devices without streams.

A stream runs what is enqueued on it in order. An event marks what has been enqueued so far, and another stream can wait
for it on the device. The host waits only in `synchronize`.
"""

from __future__ import annotations

import contextlib

import torch

# the stream that is current when it is used
COMPUTE = "compute"


class NoStreams:
    """Stand-in for a device without streams, where everything runs in program order."""

    def record(self, stream: str) -> object:
        """Return an event that marks what has been enqueued on a stream so far."""

    def wait(self, stream: str, event: object) -> None:
        """Make a stream wait for an event before it runs what is enqueued from now on."""

    def on(self, stream: str) -> contextlib.AbstractContextManager:
        """Enqueue what is done inside the block on a stream."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Block the host until all streams have finished."""


class CudaStreams(NoStreams):
    """Streams of a CUDA device: one new stream per name, in addition to COMPUTE."""

    def __init__(self, device: torch.device, *names: str):
        self._device = device
        self._own = {name: torch.cuda.Stream(device) for name in names}

    def _stream(self, name: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if name == COMPUTE else self._own[name]

    def record(self, stream: str) -> torch.cuda.Event:
        return self._stream(stream).record_event()

    def wait(self, stream: str, event: torch.cuda.Event) -> None:
        self._stream(stream).wait_event(event)

    def on(self, stream: str) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self._stream(stream))

    def synchronize(self) -> None:
        # the whole device: a replayed graph ran on a stream that is not known here
        torch.cuda.synchronize(self._device)


def streams_for(device: torch.device, *names: str) -> NoStreams:
    """Return streams with these names on a device, in addition to COMPUTE."""
    return CudaStreams(device, *names) if device.type == "cuda" else NoStreams()
