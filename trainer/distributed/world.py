"""The processes that train one run together, one per GPU, as torchrun starts them.

`World()` is a single process, in which everything here does nothing, so that no caller asks how many there are. What
processes tell each other on the host goes through gloo as JSON and tensors, so nothing that is received can execute.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from safelight.errors import UserError
from safelight.trainer.distributed import meeting, started
from safelight.trainer.distributed.meeting import Peer
from safelight.trainer.distributed.outputs import say_on_terminal
from safelight.trainer.distributed.watch import Watch
from safelight.untrusted import parse_json

# what torchrun sets for each process
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# of torch's exchanges; the watch ends a run that hangs long before
EXCHANGE_TIMEOUT = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """This process and how many there are.

    rank: 0 to size - 1 over all machines; rank 0, the main process, writes the run folder. local_rank: within this
    machine, which is the number of its GPU. host: gloo group for what is exchanged on the host; None for one process.
    pulse: another one, for the thread of `together`. watch: notices what ends the others; None for one process. peers:
    all processes, by rank; none for one process. restarts: how often they have been started again after a fault.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: dist.ProcessGroup | None = field(default=None, repr=False)
    pulse: dist.ProcessGroup | None = field(default=None, repr=False)
    watch: Watch | None = field(default=None, repr=False)
    peers: tuple[Peer, ...] = field(default=(), repr=False)
    restarts: int = 0

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


# a single process
ALONE = World()
# kept until this process ends: its last error is reported (ending.py) where the world is out of reach
_watch: Watch | None = None


def current_watch() -> Watch | None:
    """Return this process's watch over the others, None before they have met and for a single process."""
    return _watch


def join_world(
    device_type: str,
    timeout_s: float,
    settings: dict[str, str] | None = None,
    versions: dict[str, str] | None = None,
    say: Callable[[str], None] = say_on_terminal,
    command: str = "train",
    outlook: Callable[[int], str] = lambda status: "start the command again",
) -> World:
    """Return this process's world, after all of its processes have met; a single process without torchrun.

    device_type: cuda or cpu, where the run trains. timeout_s: after so long without a sign of life from a process, the
    run ends. settings, versions: must be equal in all processes. say, command, outlook: as for Watch.
    Raises UserError if torchrun's variables are incomplete or the processes do not match, EndedByPeer if another
    process tells so, and SystemExit if the run has ended for good and was started again nevertheless.
    """
    global _watch
    if started.world_size() == 1:
        return World(restarts=started.restart_count())
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {started.world_size()}, but {missing[0]} is not set; start the run with torchrun"
        )
    rank, local_rank = started.rank(), int(os.environ["LOCAL_RANK"])
    store = meeting.open_store()
    if (status := meeting.final_status(store)) is not None:
        raise SystemExit(status)
    gpu = _take_gpu(local_rank) if device_type == "cuda" else ""
    met = meeting.meet(store, Peer.here(device_type, gpu, versions or {}, settings or {}), timeout_s)
    _watch = Watch(met.store, met.peers, timeout_s, say, command, outlook, partial(meeting.note_final, store))
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _watch.on_sigterm)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        timeout=EXCHANGE_TIMEOUT,
        store=dist.PrefixStore("groups", met.store),
        rank=rank,
        world_size=started.world_size(),
    )
    host, pulse = (dist.new_group(backend="gloo", timeout=EXCHANGE_TIMEOUT) for _ in range(2))
    restarts = max(peer.restarts for peer in met.peers)
    return World(rank, started.world_size(), local_rank, host, pulse, _watch, met.peers, restarts)


def _take_gpu(local_rank: int) -> str:
    """Make the GPU of a process its current one, and return what identifies it."""
    # a scheduler may show each process its own GPU alone
    torch.cuda.set_device(local_rank if local_rank < torch.cuda.device_count() else 0)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} {getattr(properties, 'uuid', local_rank)}"


@contextmanager
def in_turn(world: World) -> Iterator[None]:
    """Run the block in the main process first, and in the others once it is through."""
    if not world.is_main:
        world.barrier()
    yield
    if world.is_main:
        world.barrier()


def leave_world(world: World, status: int = 0) -> None:
    """Take leave of the other processes at the end of a run. status: that every process exits with."""
    if world.size == 1:
        return
    if world.is_main:
        world.watch.note_final(status)
    world.barrier()
    dist.destroy_process_group()
    world.watch.close(waits_for_main=status != 0)
