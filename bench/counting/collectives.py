"""Counts the bytes that processes exchange: every collective passes torch's dispatcher, whoever calls it.

It sees DistributedDataParallel's reducer and FSDP2, which call their process group from C++ and Python, as well as our
own calls. Backends are not changed, and what is counted is exact; what each process sends of it follows from
`communication.sent_bytes`.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.trainer.memory_plan.communication import sent_bytes

# operator of torch.ops.c10d -> (our name for the collective, the argument that is the whole payload)
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
}
_WITHOUT_PAYLOAD = ("barrier", "monitored_barrier_", "check_for_nan")


class Call(NamedTuple):
    """A collective. payload: bytes, as in `communication.sent_bytes`. dtype: of its tensors."""

    collective: str
    payload: int
    dtype: torch.dtype


class CountCollectives(TorchDispatchMode):
    """Counts the collectives of this process inside the block, those of its backward passes too.

    Raises ValueError for one that it does not know, rather than leaving it out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in _WITHOUT_PAYLOAD:
            return
        if name not in _OPERATORS:
            raise ValueError(f"the bytes of {name} are not known; add it to _OPERATORS")
        collective, place = _OPERATORS[name]
        tensors = [x for x in tree_leaves(args[place]) if isinstance(x, Tensor)]
        payload = sum(x.numel() * x.element_size() for x in tensors)
        self.calls.append(Call(collective, payload, tensors[0].dtype))

    def payloads(self) -> dict[str, int]:
        """Return the bytes of each collective, all calls together."""
        total: Counter[str] = Counter()
        for call in self.calls:
            total[call.collective] += call.payload
        return dict(total)

    def sent_bytes(self, num_ranks: int) -> int:
        """Return the bytes that a process sends in all calls, by rings."""
        return sum(sent_bytes(call.collective, call.payload, num_ranks) for call in self.calls)
