"""The processes that train one run together, one per GPU, as torchrun starts them.

`World()` is a single process, in which everything here does nothing, so that no caller asks how many there are. What
processes tell each other on the host goes through gloo as JSON and tensors, so nothing that is received can execute.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from safelight.errors import UserError
from safelight.trainer.config.schema import Distributed
from safelight.untrusted import parse_json

# what torchrun sets for each process
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# the world that this process is in; torch has one of each process, too
_PRESENT: list[World] = []


@dataclass(frozen=True)
class World:
    """This process and how many there are.

    rank: 0 to size - 1 over all machines; rank 0, the main process, writes the run folder. local_rank: within this
    machine, which is the number of its GPU. host: gloo group for what is exchanged on the host; None for one process.
    pulse: another one, for the thread of `together`.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: dist.ProcessGroup | None = field(default=None, repr=False)
    pulse: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence, rank: int | None = None) -> Sequence:
        """Return a process's part of a list, this one's if rank is None: every size-th item, from the rank's on."""
        return items[self.rank if rank is None else rank :: self.size]

    def merged(self, shares: Sequence[Sequence]) -> list:
        """Return the list whose parts, by rank, are `shares`: the inverse of `share`."""
        longest = max(map(len, shares))
        return [part[i] for i in range(longest) for part in shares if i < len(part)]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier(self.host)

    def gather(self, value: object) -> list:
        """Return what each process gave, by rank, in all of them. value: anything that JSON holds."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [parse_json(bytes(x.tolist())) for x in self._gather_flat(content)]

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return the tensor of each process, by rank, on the CPU; they may differ in length. rows: (N, ...)."""
        if self.size == 1:
            return [rows.detach().cpu()]
        flat = self._gather_flat(rows.detach().cpu().contiguous().flatten())
        return [x.view(-1, *rows.shape[1:]) for x in flat]

    def _gather_flat(self, flat: Tensor) -> list[Tensor]:
        """Return the flat CPU tensor of each process, which may differ in length."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([flat.numel()]), group=self.host)
        longest = max(int(size) for size in sizes)
        mine = flat.new_zeros(longest)
        mine[: flat.numel()] = flat
        parts = [flat.new_zeros(longest) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.host)
        return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]

    def gather_on_device(self, values: Tensor, most: int) -> list[Tensor]:
        """Return the values of each process, by rank, without synchronizing with the device.

        values: (N,) of at most `most`, which is the same in all processes; the results have that length, zeros last.
        """
        if self.size == 1:
            return [values]
        mine = values.new_zeros(most)
        mine[: len(values)] = values
        parts = list(mine.new_empty(self.size, most))
        dist.all_gather(parts, mine)
        return parts

    def from_main(self, value: object) -> object:
        """Return what the main process gave, in all processes. value: anything that JSON holds."""
        return self.gather(value if self.is_main else None)[0]

    def any(self, flag: bool) -> bool:
        """Return whether any process gave True."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Return of each flag whether any process gave True, in one message."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.host)
        return [bool(vote) for vote in votes]


def world_size() -> int:
    """Return how many processes torchrun has started for this run, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the process that writes the run folder, before or after the world is joined."""
    return int(os.environ.get("RANK", "0")) == 0


def join_world(device_type: str, timeout_s: float) -> World:
    """Return this process's world, after all of its processes have met; a single process without torchrun.

    device_type: cuda or cpu, where the run trains. timeout_s: after so long without the others, a process gives up.
    Raises UserError if torchrun's variables are incomplete.
    """
    if world_size() == 1:
        return World()
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {world_size()}, but {missing[0]} is not set; start the run with torchrun")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    host, pulse = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return World(rank, world_size(), local_rank, host, pulse)


@contextmanager
def in_turn(world: World) -> Iterator[None]:
    """Run the block in the main process first, and in the others once it is through."""
    if not world.is_main:
        world.barrier()
    yield
    if world.is_main:
        world.barrier()


@contextmanager
def joined(device_type: str = "", timeout_s: float = Distributed().timeout_s) -> Iterator[World]:
    """Be in this process's world inside the block. Inside another such block it is that one's world.

    device_type: as for `join_world`, by default cuda if there is a GPU.
    """
    if _PRESENT:
        yield _PRESENT[-1]
        return
    world = join_world(device_type or ("cuda" if torch.cuda.is_available() else "cpu"), timeout_s)
    _PRESENT.append(world)
    try:
        yield world
    finally:
        _PRESENT.pop()
        leave_world(world)


def leave_world(world: World) -> None:
    """Take leave of the other processes at the end of a run."""
    if world.size > 1:
        dist.destroy_process_group()
