"""Sums the gradients of a step over the processes of a run, a part of the module at a time, while backward goes on.

Why not DistributedDataParallel: it keeps all gradients in buckets for the whole run, 2 bytes a parameter, which the
step inside backward exists to avoid. Here a bucket lives from the arrival of its gradients until its weights are
updated (docs/decisions.md). As in FSDP2, all processes must run the same backward pass: buckets are exchanged in the
order in which they become complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import accumulate, islice
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# parts are exchanged together until they have so many bytes: below that, latency costs more than bytes do
BUCKET_BYTES = 16 * 2**20
# buckets under way at a time; a further one waits for the first
MAX_IN_FLIGHT = 2
# elements that each gradient begins at a multiple of, so that kernels can read it 16 bytes at a time
ALIGNMENT = 8

Part = tuple[str, list[Tensor]]


class Reduction(Protocol):
    """Sums gradients over processes. Gradients are in their weights' memory order."""

    def push(self, part: str, gradients: list[Tensor]) -> Iterator[Part]:
        """Take a part's complete gradients; yield the parts whose sums have arrived, in the order they were pushed."""
        ...

    def drain(self) -> Iterator[Part]:
        """Yield all parts that were pushed and not yielded yet, at the end of backward."""
        ...


class OneProcess:
    """The Reduction of a single process, whose gradients are the sums already."""

    def push(self, part: str, gradients: list[Tensor]) -> Iterator[Part]:
        yield part, gradients

    def drain(self) -> Iterator[Part]:
        yield from ()


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


class _Bucket(NamedTuple):
    parts: list[Part]
    work: Work


class AllReduce:
    """A Reduction after which every process has the sums.

    group: the processes; None: all. dtype: to sum in, None: the gradients' own. is_immediate: wait for each part as
    it is pushed, for weights that leave the device with their block (optimizer.memory streamed).
    num_bytes: of the buckets that were summed so far.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, dtype: torch.dtype | None = None, is_immediate: bool = False
    ):
        self._group, self._dtype, self._is_immediate = group, dtype, is_immediate
        self._waiting: list[Part] = []
        self._waiting_bytes = 0
        self._in_flight: deque[_Bucket] = deque()
        self.num_bytes = 0

    def push(self, part: str, gradients: list[Tensor]) -> Iterator[Part]:
        self._waiting.append((part, gradients))
        self._waiting_bytes += sum(gradient.numel() * gradient.element_size() for gradient in gradients)
        if self._is_immediate:
            yield from self.drain()
        elif self._waiting_bytes >= BUCKET_BYTES:
            self._send()
            while len(self._in_flight) > MAX_IN_FLIGHT:
                yield from self._receive()

    def drain(self) -> Iterator[Part]:
        if self._waiting:
            self._send()
        while self._in_flight:
            yield from self._receive()

    def _send(self) -> None:
        parts, self._waiting, self._waiting_bytes = self._waiting, [], 0
        gradients = [gradient for _, part in parts for gradient in part]
        ends = list(accumulate(-(-gradient.numel() // ALIGNMENT) * ALIGNMENT for gradient in gradients))
        # zeros, so that what lies between two gradients stays finite
        flat = gradients[0].new_zeros(ends[-1], dtype=self._dtype)
        sums = [
            flat.as_strided(gradient.shape, gradient.stride(), start)
            for gradient, start in zip(gradients, (0, *ends), strict=False)
        ]
        torch._foreach_copy_(sums, gradients)
        self.num_bytes += flat.numel() * flat.element_size()
        work = self._exchange(flat)
        remaining = iter(sums)
        self._in_flight.append(_Bucket([(name, list(islice(remaining, len(part)))) for name, part in parts], work))

    def _exchange(self, flat: Tensor) -> Work:
        """Begin to sum a bucket over the processes, in place."""
        return dist.all_reduce(flat, group=self._group, async_op=True)

    def _receive(self) -> Iterator[Part]:
        bucket = self._in_flight.popleft()
        bucket.work.wait()
        yield from bucket.parts
