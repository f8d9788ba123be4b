"""Batches on their way to a GPU: copied on a stream of their own while the steps before run.

The loader's thread pins a batch and starts its copy; the stream of the steps waits for that copy on the device, and the
host never waits. Pinned memory comes from torch's own cache, which reuses a block only after the event of the copy out
of it; so it is a ring buffer without a fixed size.
"""

from __future__ import annotations

import torch

from safelight.data.batches import Batch


class SideStream:
    """A CUDA stream that batches are copied on. `send` and `receive` may be called by different threads."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Begin to copy a batch; return the batch on the device and the event that says when it is there."""
        with torch.cuda.stream(self._stream):
            sent = batch.map(lambda x: x.pin_memory().to(self._device, non_blocking=True))
        return sent, self._stream.record_event()

    def receive(self, sent: Batch, arrived: torch.cuda.Event) -> Batch:
        """Return a batch that was sent, for use on the current stream."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)
        # its memory belongs to the side stream, which must not take it back before the current one is done with it
        for x in sent.tensors():
            x.record_stream(current)
        return sent
