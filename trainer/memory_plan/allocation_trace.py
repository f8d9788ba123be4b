"""What a trace saw of memory, in the order it happened, and from two batch sizes' the one of a third without a trace.

The operators of a step do not depend on how many images are in it (but for one: pieces of a single row need no copy), and a
storage's bytes are then a + b n for n images. So two traces of the same order give every storage's bytes at any n, and
going through the events again with those gives the peak that a trace would have found, to the byte.
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
    """What is computed: floating-point operations of matrix work, bytes read and written by the rest, launches."""

    flops: int = 0
    bytes_moved: int = 0
    launches: int = 0


@dataclass
class Peak:
    """The most that was alive at once. kinds: bytes by kind at that moment; during: forward, backward or another phase."""

    total: int = 0
    during: str = ""
    kinds: dict[str, int] = field(default_factory=dict)


class AllocationTrace:
    """Events: storages that appear, become another kind and vanish, each with its bytes before rounding.

    An entry is a list whose first three items are bytes, kind and its place here, which `appear` sets.
    """

    def __init__(self):
        self._sizes: list[int] = []
        # place, kind before, kind after; what the event is during
        self._events: list[tuple[int, int, int]] = []
        self._during: list[str] = []
        # not rounded: what an operator takes and gives back within itself
        self._scratch: list[int] = []

    def _add(self, place: int, before: int, after: int, during: str = "") -> None:
        self._events.append((place, before, after))
        self._during.append(during)

    def appear(self, entry: list, during: str = "forward") -> None:
        entry[2] = len(self._sizes)
        self._sizes.append(entry[0])
        self._add(entry[2], NOTHING, _INDEX[entry[1]], during)

    def change(self, entry: list, before: str) -> None:
        """Note that a storage is of another kind than before."""
        self._add(entry[2], _INDEX[before], _INDEX[entry[1]])

    def vanish(self, entry: list) -> None:
        self._add(entry[2], _INDEX[entry[1]], NOTHING)

    def flash(self, num_bytes: int, during: str) -> None:
        """Note bytes that an operator has for itself while it works."""
        self._scratch.append(len(self._sizes))
        entry = [num_bytes, TEMPORARY, NOTHING]
        self.appear(entry, during)
        self.vanish(entry)

    def between(self, n: int, other: Self, m: int, wanted: int) -> Self | None:
        """Return the trace of `wanted` images from this one of n and another of m; None where their orders differ."""
        if self._events != other._events or self._scratch != other._scratch:
            return None
        one, two = (np.array(r._sizes, dtype=np.int64) for r in (self, other))
        slope, rest = np.divmod(two - one, m - n)
        if rest.any():
            return None
        found = AllocationTrace()
        found._sizes = (one + (wanted - n) * slope).tolist()
        found._events, found._during, found._scratch = self._events, self._during, self._scratch
        return found

    def peak(self, rounding: int) -> Peak:
        """Return the most that is alive at once, every allocation rounded up."""
        sizes = np.array(self._sizes, dtype=np.int64)
        rounded = -(-sizes // rounding) * rounding
        rounded[self._scratch] = sizes[self._scratch]
        places, before, after = np.array(self._events, dtype=np.int64).T
        sizes = rounded[places]
        total = np.cumsum(np.where(after >= 0, sizes, 0) - np.where(before >= 0, sizes, 0))
        top = int(total.argmax())
        upto = slice(0, top + 1)
        kinds = {
            kind: int(sizes[upto][after[upto] == index].sum() - sizes[upto][before[upto] == index].sum())
            for kind, index in _INDEX.items()
        }
        return Peak(int(total[top]), self._during[top], kinds)


def work_between(one: Work, n: int, two: Work, m: int, wanted: int) -> Work:
    """Return the work of `wanted` images from that of n and of m. Exact for FLOPs; kernels' partial sums grow by steps."""

    def at(a: int, b: int) -> int:
        return a + (b - a) * (wanted - n) // (m - n)

    return Work(*(at(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))
