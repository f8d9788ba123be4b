"""Sums the gradients of a step over the processes of a run, a part of the module at a time, while backward goes on.

Why not DistributedDataParallel: it keeps all gradients in buckets for the whole run, 2 bytes a parameter, which the
step inside backward exists to avoid. Here a bucket lives from the arrival of its gradients until its weights are
updated (docs/decisions.md). As in FSDP2, all processes must run the same backward pass: buckets are exchanged in the
order in which they become complete.

With distributed.shard = states each part has an owner, which alone gets its sums, keeps its state and steps it, and
then sends the others its new weights (ZeRO stage 1). Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
    to: int | None
    work: Work


class _Waiting(NamedTuple):
    """Parts that are not complete to a bucket yet."""

    parts: list[Part]
    num_bytes: int


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
        # by the process that gets the sums, None: all of them
        self._waiting: dict[int | None, _Waiting] = {}
        self._in_flight: deque[_Bucket] = deque()
        self.num_bytes = 0

    def push(self, part: str, gradients: list[Tensor]) -> Iterator[Part]:
        to = self._to(part)
        waiting = self._waiting.setdefault(to, _Waiting([], 0))
        num_bytes = waiting.num_bytes + sum(gradient.numel() * gradient.element_size() for gradient in gradients)
        self._waiting[to] = _Waiting([*waiting.parts, (part, gradients)], num_bytes)
        if self._is_immediate:
            yield from self.drain()
        elif num_bytes >= BUCKET_BYTES:
            self._send(to)
            while len(self._in_flight) > MAX_IN_FLIGHT:
                yield from self._receive()

    def drain(self) -> Iterator[Part]:
        for to in list(self._waiting):
            self._send(to)
        while self._in_flight:
            yield from self._receive()

    def _to(self, part: str) -> int | None:
        return None

    def _exchange(self, flat: Tensor, to: int | None) -> Work:
        return dist.all_reduce(flat, group=self._group, async_op=True)

    def _has_sums(self, to: int | None) -> bool:
        return True

    def _send(self, to: int | None) -> None:
        parts = self._waiting.pop(to).parts
        gradients = [gradient for _, part in parts for gradient in part]
        flat, sums = flat_like(gradients, self._dtype)
        torch._foreach_copy_(sums, gradients)
        self.num_bytes += flat.numel() * flat.element_size()
        work = self._exchange(flat, to)
        remaining = iter(sums)
        self._in_flight.append(_Bucket([(name, list(islice(remaining, len(part)))) for name, part in parts], to, work))

    def _receive(self) -> Iterator[Part]:
        bucket = self._in_flight.popleft()
        bucket.work.wait()
        if self._has_sums(bucket.to):
            yield from bucket.parts


class ReduceToOwners(AllReduce):
    """A Reduction after which only the process that owns a part has its sums; the others are never given that part.

    owner_of: the rank of each part's owner. rank: this process's. Buckets are per owner.
    """

    def __init__(
        self,
        owner_of: Mapping[str, int],
        rank: int,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group, dtype)
        self._owner_of, self._rank = owner_of, rank

    def _to(self, part: str) -> int:
        return self._owner_of[part]

    def _exchange(self, flat: Tensor, to: int) -> Work:
        return dist.reduce(flat, to, group=self._group, async_op=True)

    def _has_sums(self, to: int) -> bool:
        return to == self._rank


def flat_like(tensors: list[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return a flat buffer of zeros, and views of it in the tensors' shapes and memory orders, each aligned.

    dtype: the first tensor's if None.
    """
    ends = list(accumulate(-(-x.numel() // ALIGNMENT) * ALIGNMENT for x in tensors))
    # zeros, so that what lies between two gradients stays finite
    flat = tensors[0].new_zeros(ends[-1], dtype=dtype)
    starts = zip(tensors, (0, *ends), strict=False)
    return flat, [flat.as_strided(x.shape, x.stride(), start) for x, start in starts]


def owners_of(num_bytes: Mapping[str, int], num_processes: int) -> dict[str, int]:
    """Return the rank of each part's owner: the largest part first, each to the process with the fewest bytes so far.

    num_bytes: of each part. The same in every process.
    """
    loads, owner_of = [0] * num_processes, {}
    # sorting is stable: among equal parts the first comes first
    for part in sorted(num_bytes, key=lambda part: -num_bytes[part]):
        owner_of[part] = rank = loads.index(min(loads))
        loads[rank] += num_bytes[part]
    return {part: owner_of[part] for part in num_bytes}


@torch.no_grad()
def publish(owned: Sequence[tuple[int, Tensor]], rank: int, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite tensors by those of the processes that own them, a bucket at a time. All processes must call it.

    owned: (rank of the owner, tensor), the same list in every process but for the values. rank: this process's.
    """
    in_flight: deque[tuple[dist.Work, Tensor, list[Tensor], list[Tensor]]] = deque()

    def receive() -> None:
        work, _, received, tensors = in_flight.popleft()
        work.wait()
        if received:
            torch._foreach_copy_(tensors, received)

    for owner, tensors in _buckets(owned):
        flat, views = flat_like(tensors)
        if owner == rank:
            torch._foreach_copy_(views, tensors)
        work = dist.broadcast(flat, owner, group=group, async_op=True)
        in_flight.append((work, flat, [] if owner == rank else views, tensors))
        if len(in_flight) > MAX_IN_FLIGHT:
            receive()
    while in_flight:
        receive()


def _buckets(owned: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (owner, tensors of one dtype) in buckets."""
    waiting: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for owner, x in owned:
        bucket = waiting.setdefault((owner, x.dtype), [])
        bucket.append(x.detach())
        if sum(y.numel() * y.element_size() for y in bucket) >= BUCKET_BYTES:
            yield owner, waiting.pop((owner, x.dtype))
    for (owner, _), bucket in waiting.items():
        yield owner, bucket
