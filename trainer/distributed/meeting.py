"""The processes of a run meet: each says what it is through torch's store, and rank 0 refuses those that do not match.

The store outlives a restart of the processes and may hold what earlier ones wrote. So each process has an id of its
own, and rank 0 answers with the ids that it has seen; whoever finds its id there belongs to the present meeting.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from safelight.errors import UserError
from safelight.trainer.distributed import started
from safelight.trainer.distributed.fault import EndedByPeer, Fault
from safelight.untrusted import parse_json

POLL_S = 0.1
# imports take longer on one machine than on another
MIN_TIMEOUT_S = 120.0
# how long a process that failed before it met the others waits until rank 0 has told it
HEARD_TIMEOUT_S = 60.0
HELLO, ANSWER, FINAL = "safelight/hello", "safelight/answer", "safelight/final"


@dataclass(frozen=True)
class Peer:
    """One process of a run. place: its machine and process numbers' namespace, in which `pid` is valid.

    device: cuda | cpu. gpu: the GPU's identity, '' on a CPU. restarts: of its machine's processes so far.
    """

    host: str
    pid: int
    place: str
    local_rank: int
    restarts: int
    device: str
    gpu: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, device: str, gpu: str, versions: dict[str, str], settings: dict[str, str]) -> Peer:
        """Return this process."""
        return cls(
            started.host(),
            os.getpid(),
            _place(),
            int(os.environ["LOCAL_RANK"]),
            started.restart_count(),
            device,
            gpu,
            versions,
            settings,
        )


@dataclass(frozen=True)
class Met:
    """store: for this meeting alone. peers: all processes, by rank."""

    store: dist.Store
    peers: tuple[Peer, ...]


def _place() -> str:
    parts = [started.host()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "/".join(parts)


def open_store() -> dist.Store:
    """Return torch's store, which torchrun has opened, or else rank 0 opens."""
    is_server = started.is_main_process() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_server,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=MIN_TIMEOUT_S),
    )


def final_status(store: dist.Store) -> int | None:
    """Return the status with which the run has ended for good; None if it has not."""
    return int(store.get(FINAL)) if store.check([FINAL]) else None


def note_final(store: dist.Store, status: int) -> None:
    """Note it if a status ends the run for good: a process that comes late, or is started again, ends at once."""
    if status in started.FINAL_STATUSES:
        store.set(FINAL, str(status))


def meet(store: dist.Store, me: Peer, timeout_s: float) -> Met:
    """Return the processes of the run once all are there.

    Raises UserError in rank 0, and EndedByPeer in the others, if one does not come or they do not match; and
    EndedByPeer if one of them has failed before.
    """
    own = secrets.token_hex(8)
    store.set(f"{HELLO}/{started.rank()}", json.dumps({"id": own, "peer": asdict(me)}))
    ends_at = time.monotonic() + max(timeout_s, MIN_TIMEOUT_S)
    return _invite(store, own, ends_at) if started.is_main_process() else _accept(store, own, ends_at)


def _invite(store: dist.Store, own: str, ends_at: float) -> Met:
    """Return the meeting, in rank 0."""
    size = started.world_size()
    answered: list[str] = []
    while True:
        hellos = {rank: _read(store, f"{HELLO}/{rank}") for rank in range(size) if store.check([f"{HELLO}/{rank}"])}
        for rank, hello in [*hellos.items()]:
            heard = f"{HELLO}/heard/{rank}"
            if store.check([heard]) and store.get(heard).decode() == hello["id"]:
                # of processes before a restart
                del hellos[rank]
            elif "fault" in hello:
                store.set(heard, hello["id"])
                raise EndedByPeer(Fault.from_json(hello["fault"]))
        if len(hellos) == size:
            ids = [hellos[rank]["id"] for rank in range(size)]
            if ids != answered:
                peers = [hellos[rank]["peer"] for rank in range(size)]
                refusal = refuse([Peer(**peer) for peer in peers])
                store.set(ANSWER, json.dumps({"id": own, "ids": ids, "peers": peers, "refusal": refusal}))
                if refusal:
                    raise UserError(refusal)
                answered = ids
            prefix = f"safelight/{own}"
            keys = [f"{prefix}/here/{rank}" for rank in range(1, size)]
            if store.check(keys) and [store.get(key).decode() for key in keys] == ids[1:]:
                return Met(dist.PrefixStore(prefix, store), tuple(Peer(**peer) for peer in peers))
        if time.monotonic() > ends_at:
            missing = ", ".join(str(rank) for rank in range(size) if rank not in hellos) or "another rank"
            raise UserError(f"rank {missing} of {size} has not come; look at the machine that it runs on")
        time.sleep(POLL_S)


def _accept(store: dist.Store, own: str, ends_at: float) -> Met:
    """Return the meeting, in another rank, once rank 0 has answered."""
    rank = started.rank()
    while time.monotonic() < ends_at:
        if (status := final_status(store)) is not None:
            raise EndedByPeer(Fault(0, "rank 0 has ended the run", status))
        answer = _read(store, ANSWER) if store.check([ANSWER]) else None
        if answer is not None and own in answer["ids"]:
            if answer["refusal"]:
                raise EndedByPeer(Fault(0, answer["refusal"], status=2))
            prefix = f"safelight/{answer['id']}"
            store.set(f"{prefix}/here/{rank}", own)
            return Met(dist.PrefixStore(prefix, store), tuple(Peer(**peer) for peer in answer["peers"]))
        time.sleep(POLL_S)
    raise UserError("rank 0 has not come; look at the machine that it runs on")


def tell_before_meeting(fault: Fault) -> bool:
    """Tell rank 0 of a fault of this process, which has not met the others; return whether it has heard."""
    try:
        store, own = open_store(), secrets.token_hex(8)
        store.set(f"{HELLO}/{fault.rank}", json.dumps({"id": own, "fault": fault.to_json()}))
        key, ends_at = f"{HELLO}/heard/{fault.rank}", time.monotonic() + HEARD_TIMEOUT_S
        while time.monotonic() < ends_at:
            is_heard = store.check([key]) and store.get(key).decode() == own
            if is_heard or final_status(store) is not None:
                return True
            time.sleep(POLL_S)
    except RuntimeError:
        # the store's machine does not answer
        return False
    return False


def _read(store: dist.Store, key: str) -> dict:
    return parse_json(store.get(key))


def refuse(peers: Sequence[Peer]) -> str:
    """Return which process differs from rank 0, and in what; '' if they can train together."""
    return next(filter(None, (check(peers) for check in (_versions, _devices, _settings, _gpus))), "")


def name(peers: Sequence[Peer], rank: int) -> str:
    return f"rank {rank} on {peers[rank].host}"


def _first_other(peers: Sequence[Peer], value: Callable[[Peer], object]) -> int | None:
    """Return the first rank whose value is not rank 0's."""
    return next((rank for rank, peer in enumerate(peers) if value(peer) != value(peers[0])), None)


def _versions(peers: Sequence[Peer]) -> str:
    rank = _first_other(peers, lambda peer: peer.versions)
    if rank is None:
        return ""
    ours, theirs = peers[0].versions, peers[rank].versions
    what = next(package for package in ours if theirs.get(package) != ours[package])
    return (
        f"{name(peers, rank)} has {what} {theirs.get(what)}, but {name(peers, 0)} has {ours[what]}; install the same "
        "version on all machines"
    )


def _devices(peers: Sequence[Peer]) -> str:
    rank = _first_other(peers, lambda peer: peer.device)
    if rank is None:
        return ""
    shown = {"cpu": "a CPU", "cuda": "a GPU"}
    return (
        f"{name(peers, rank)} trains on {shown[peers[rank].device]}, but {name(peers, 0)} on {shown[peers[0].device]}; "
        "all must train on the same: see run.device"
    )


def _settings(peers: Sequence[Peer]) -> str:
    rank = _first_other(peers, lambda peer: peer.settings)
    if rank is None:
        return ""
    ours, theirs = peers[0].settings, peers[rank].settings
    what = next(setting for setting in [*ours, *theirs] if ours.get(setting) != theirs.get(setting))
    return (
        f"{what} is {theirs.get(what)} in {name(peers, rank)}, but {ours.get(what)} in {name(peers, 0)}; give all "
        "processes the same settings"
    )


def _gpus(peers: Sequence[Peer]) -> str:
    first: dict[str, int] = {}
    for rank, peer in enumerate(peers):
        if peer.gpu and (other := first.setdefault(f"{peer.host} {peer.gpu}", rank)) != rank:
            return (
                f"ranks {other} and {rank} on {peer.host} are on one GPU, {peer.gpu}; start no more processes there "
                "than it has GPUs"
            )
    return ""
