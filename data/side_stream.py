"""Copies batches to a GPU on a stream of their own, while earlier steps still run.

The loader's thread pins a batch and enqueues its copy; the stream of the steps waits for that copy on the device, never
the host. torch caches pinned memory and reuses a block only after the copy out of it has finished, which it checks by
an event; the cache thereby serves as a ring buffer.
"""

from __future__ import annotations

import torch

from safelight.data.batches import Batch
from safelight.kernels.streams import COMPUTE, CudaStreams

COPY = "copy"


class SideStream:
    """A CUDA stream that batches are copied on. `send` and `receive` may be called from different threads."""

    def __init__(self, device: torch.device):
        self._device = device
        self._streams = CudaStreams(device, COPY)

    def send(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Start copying a batch; return the batch on the device and the event that marks the end of the copy."""
        with self._streams.on(COPY):
            sent = batch.map(lambda x: x.pin_memory().to(self._device, non_blocking=True))
        return sent, self._streams.record(COPY)

    def receive(self, sent: Batch, arrived: torch.cuda.Event) -> Batch:
        """Return a sent batch for use on the current stream."""
        self._streams.wait(COMPUTE, arrived)
        # the memory belongs to the side stream, which must not reuse it before the current stream has finished with it
        for x in sent.tensors():
            x.record_stream(torch.cuda.current_stream(self._device))
        return sent
