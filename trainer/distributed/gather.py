"""Brings what processes hold parts of together in the main process, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from safelight.kernels.optim.blockwise_8bit import in_memory_order
from safelight.trainer.distributed.world import World

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}


class _Form(NamedTuple):
    """What a process says of one of its tensors: the owner's rank, shape, strides and dtype."""

    rank: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    def empty(self, device: str) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=DTYPES[self.dtype], device=device)


def _forms(world: World, tensors: Mapping[str, Tensor]) -> dict[str, _Form]:
    """Return the forms of the tensors of all processes, by name. A name that several have is that of the first."""
    own = []
    for name, x in tensors.items():
        # of the memory order alone: a tensor with gaps is sent without them
        strides = torch.empty_like(x, device="meta").stride()
        own.append([name, list(x.shape), list(strides), str(x.dtype).removeprefix("torch.")])
    forms: dict[str, _Form] = {}
    for rank, theirs in enumerate(world.gather(own)):
        for name, shape, strides, dtype in theirs:
            forms.setdefault(name, _Form(rank, tuple(shape), tuple(strides), dtype))
    return forms


def forms_of_all(world: World, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return meta tensors like those of all processes, by name. tensors: this process's. All must call it."""
    if world.size == 1:
        return {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
    return {name: form.empty("meta") for name, form in _forms(world, tensors).items()}


def gathered(world: World, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of what all processes hold, in the main process; nothing in the others, which send theirs.

    tensors: this process's, in any order. What comes from another process is on the CPU, and one tensor at a time, in
    its memory order. All processes must call it and exhaust it.
    """
    if world.size == 1:
        yield from tensors.items()
        return
    for name, form in _forms(world, tensors).items():
        if form.rank == 0:
            if world.is_main:
                yield name, tensors[name]
        elif world.is_main:
            received = form.empty("cpu")
            dist.recv(_bytes_of(received), form.rank, group=world.host)
            yield name, received
        elif form.rank == world.rank:
            dist.send(_bytes_of(torch.empty_like(tensors[name], device="cpu").copy_(tensors[name])), 0, world.host)


def _bytes_of(x: Tensor) -> Tensor:
    """Return the memory of a dense tensor as bytes."""
    return in_memory_order(x).reshape(-1).view(torch.uint8)
