"""Allocations and frees of a traced step in order, and extrapolation to batch sizes that were not traced.

A step runs the same operators whatever the batch size (except that single-row slices need no copy at batch size 1),
so each storage takes a + b * n bytes for n images. Two traces with the same sequence of events therefore give every
storage's size at any n, and replaying the events with those sizes gives the same peak, to the byte, as a trace at
that batch size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

WEIGHTS, MASTER, OPTIMIZER, AVERAGE = "weights", "master", "optimizer state", "moving average"
GRADIENTS, ACTIVATIONS, TEMPORARY = "gradients", "activations", "backward and step"
KINDS = (WEIGHTS, MASTER, OPTIMIZER, AVERAGE, GRADIENTS, ACTIVATIONS, TEMPORARY)
_INDEX = {kind: index for index, kind in enumerate(KINDS)}
NOTHING = -1


@dataclass
class Work:
    """The work of a step: FLOPs of matrix products, bytes read and written by all other operators, kernel launches."""

    flops: int = 0
    bytes_moved: int = 0
    launches: int = 0


@dataclass
class Peak:
    """Peak memory. kinds: bytes by kind at that moment; during: the phase it occurs in (forward, backward, ...)."""

    total: int = 0
    during: str = ""
    kinds: dict[str, int] = field(default_factory=dict)


class AllocationTrace:
    """A sequence of events: a storage is allocated, changes its kind, or is freed. Sizes are kept unrounded.

    A storage is passed as a list whose first three items are its bytes, its kind and its index in this trace;
    `allocate` sets the index.
    """

    def __init__(self):
        self._sizes: list[int] = []
        # (storage index, kind before, kind after), and the phase of each event
        self._events: list[tuple[int, int, int]] = []
        self._during: list[str] = []
        # indices of scratch buffers inside an operator, which are not rounded up
        self._scratch: list[int] = []

    def _add(self, index: int, before: int, after: int, during: str = "") -> None:
        self._events.append((index, before, after))
        self._during.append(during)

    def allocate(self, storage: list, during: str = "forward") -> None:
        storage[2] = len(self._sizes)
        self._sizes.append(storage[0])
        self._add(storage[2], NOTHING, _INDEX[storage[1]], during)

    def reclassify(self, storage: list, before: str) -> None:
        """Record that a storage of kind `before` now has another kind."""
        self._add(storage[2], _INDEX[before], _INDEX[storage[1]])

    def free(self, storage: list) -> None:
        self._add(storage[2], _INDEX[storage[1]], NOTHING)

    def scratch(self, num_bytes: int, during: str) -> None:
        """Record a buffer that an operator allocates and frees internally."""
        self._scratch.append(len(self._sizes))
        storage = [num_bytes, TEMPORARY, NOTHING]
        self.allocate(storage, during)
        self.free(storage)

    def extrapolate(self, n: int, other: Self, m: int, batch_size: int) -> Self | None:
        """Return the trace at `batch_size`, given this one at n and another at m; None if their events differ."""
        if self._events != other._events or self._scratch != other._scratch:
            return None
        sizes_n, sizes_m = (np.array(trace._sizes, dtype=np.int64) for trace in (self, other))
        slope, remainder = np.divmod(sizes_m - sizes_n, m - n)
        if remainder.any():
            return None
        trace = AllocationTrace()
        trace._sizes = (sizes_n + (batch_size - n) * slope).tolist()
        trace._events, trace._during, trace._scratch = self._events, self._during, self._scratch
        return trace

    def peak(self, rounding: int) -> Peak:
        """Return the peak, with every allocation rounded up to a multiple of `rounding` bytes."""
        sizes = np.array(self._sizes, dtype=np.int64)
        rounded = -(-sizes // rounding) * rounding
        rounded[self._scratch] = sizes[self._scratch]
        indices, before, after = np.array(self._events, dtype=np.int64).T
        sizes = rounded[indices]
        total = np.cumsum(np.where(after >= 0, sizes, 0) - np.where(before >= 0, sizes, 0))
        top = int(total.argmax())
        upto = slice(0, top + 1)
        kinds = {
            kind: int(sizes[upto][after[upto] == index].sum() - sizes[upto][before[upto] == index].sum())
            for kind, index in _INDEX.items()
        }
        return Peak(int(total[top]), self._during[top], kinds)


def extrapolate_work(work_n: Work, n: int, work_m: Work, m: int, batch_size: int) -> Work:
    """Return the work at `batch_size`, given that at n and at m.

    Exact for FLOPs, approximate for bytes: the partial sums of some kernels grow in steps.
    """

    def at_batch_size(a: int, b: int) -> int:
        return a + (b - a) * (batch_size - n) // (m - n)

    return Work(*(at_batch_size(a, b) for a, b in zip(vars(work_n).values(), vars(work_m).values(), strict=True)))
