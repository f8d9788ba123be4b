"""What the processes of a run send each other in a step, and how long that takes: the part of `safelight plan --gpus`
that a single GPU does not have.

Bytes are exact: they follow from the shapes of what is trained (tests/trainer/memory_plan/test_communication.py counts
the collectives of a real step). Times, and with them images/s and efficiency, are predictions.

Letters: N processes, P payload bytes of a collective, a link's latency l and its rate R.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

from torch import Tensor

from safelight.errors import UserError
from safelight.trainer.memory_plan.gpus import BACKWARD_SHARE, CARDS, Card
from safelight.trainer.memory_plan.plan_cache import checked_int, checked_table, checked_text
from safelight.trainer.optim.reduction import ALIGNMENT, owners_of

Shard = Literal["none", "states", "full"]
SHARDS: tuple[Shard, ...] = ("none", "states", "full")
LinkName = Literal["nvlink", "pcie3", "pcie4", "pcie5", "10GbE", "25GbE", "100GbE"]

# share of a link's rate that NCCL's rings and sockets reach with large messages; an assumption [not measured]
LINK_EFFICIENCY = 0.8
# data sheets of NVIDIA, in 10^9 bytes/s one way, half of the bidirectional figure that they give
_NVLINK_GB_S = {"rtx3090": 56.25, "a100": 300, "a100-80gb": 300, "h100": 450, "h200": 450}
# PCIe as in gpus.py, 16 lanes; Ethernet: bits to bytes
_GB_S = {
    "pcie3": CARDS["t4"].pcie_gb_s,
    "pcie4": CARDS["a100"].pcie_gb_s,
    "pcie5": CARDS["h100"].pcie_gb_s,
    "10GbE": 1.25,
    "25GbE": 3.125,
    "100GbE": 12.5,
}
# for one hop of a ring: a kernel's copy within a machine, a packet through the kernel and a switch between two;
# assumptions [not measured]
_LATENCY_S = {"nvlink": 5e-6, "pcie3": 10e-6, "pcie4": 10e-6, "pcie5": 10e-6}
_NETWORK_LATENCY_S = 50e-6


@dataclass(frozen=True)
class Link:
    """What each process sends through, at the slowest place of the ring. gb_s: 10^9 bytes/s one way; None: unknown."""

    name: str
    gb_s: float | None
    latency_s: float


@dataclass(frozen=True)
class Ranks:
    """The processes of a planned run, one a GPU. The default is a run on a single one."""

    num: int = 1
    shard: Shard = "none"
    link: Link = Link("", None, 0.0)


ONE_RANK = Ranks()


def largest_share(part_bytes: Mapping, num_ranks: int) -> float:
    """Return the share of the process that owns most. part_bytes: of each part."""
    loads = [0] * num_ranks
    for part, rank in owners_of(part_bytes, num_ranks).items():
        loads[rank] += part_bytes[part]
    return max(loads) / sum(loads)


def find_link(name: str | None, card: Card) -> Link:
    """Return the link of that name; None: the card's own PCIe link. Raises UserError for NVLink on a card without."""
    if name is None:
        return Link("the card's PCIe link", card.pcie_gb_s, _LATENCY_S["pcie4"])
    if name != "nvlink":
        rate, own = _GB_S[name], card.pcie_gb_s
        if name.startswith("pcie") and own is not None:
            # the slower of the slot and the card
            rate = min(rate, own)
        return Link(name, rate, _LATENCY_S.get(name, _NETWORK_LATENCY_S))
    if card.name not in _NVLINK_GB_S and card.tflops is not None:
        raise UserError(f"--link nvlink: {card.name} has none; use pcie4, or {', '.join(_NVLINK_GB_S)} as --gpu")
    return Link(name, _NVLINK_GB_S.get(card.name), _LATENCY_S["nvlink"])


# collective -> (what a process sends, hops one after another), as multiples of (payload, 1), for N processes
_RING = {
    "all_reduce": lambda n: (2 * (n - 1) / n, 2 * (n - 1)),
    "reduce_scatter": lambda n: ((n - 1) / n, n - 1),
    "all_gather": lambda n: ((n - 1) / n, n - 1),
    "reduce": lambda n: ((n - 1) / n, n - 1),
    "broadcast": lambda n: ((n - 1) / n, n - 1),
}


def sent_bytes(collective: str, payload: int, num_ranks: int) -> int:
    """Return the bytes that a process sends in a collective, the average of all processes, rounded up.

    payload: the whole tensor: what is summed or broadcast, or all parts together of what is gathered or scattered.
    A ring sends 2 (N - 1) / N of it to sum, (N - 1) / N to gather or scatter; a chain sends (N - 1) / N to or from
    one of the processes, because all but its end pass the payload on.
    Source: Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002; nccl-tests, doc/PERFORMANCE.md.
    """
    share, _ = _RING[collective](num_ranks)
    # exact for any payload: 2 (N - 1) / N is a rational number
    numerator = round(share * num_ranks)
    return -(-numerator * payload // num_ranks)


@dataclass(frozen=True)
class Exchange:
    """What is exchanged for one purpose in a step.

    payload: bytes, as in `sent_bytes`. calls: into how many messages they are divided. when: in forward or backward,
    where computing goes on meanwhile, or after the step, where nothing does.
    """

    what: str
    collective: str
    payload: int
    calls: int = 1
    when: Literal["forward", "backward", "after"] = "after"

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Return what `asdict` gave. Raises ValueError for anything else."""
        table = checked_table(values, {field.name for field in fields(cls)})
        texts = {"what": None, "collective": tuple(_RING), "when": ("forward", "backward", "after")}
        return cls(**{k: checked_text(x, texts[k]) if k in texts else checked_int(x) for k, x in table.items()})

    def sent(self, num_ranks: int) -> int:
        return sent_bytes(self.collective, self.payload, num_ranks)

    def seconds(self, num_ranks: int, link: Link) -> float:
        """Return the time of these messages if nothing else uses the link: hops x l + sent / R.

        Source: Thakur, Rabenseifner and Gropp 2005, doi:10.1177/1094342005051521, for a ring.
        """
        _, hops = _RING[self.collective](num_ranks)
        return self.calls * hops * link.latency_s + self.sent(num_ranks) / (link.gb_s * 1e9 * LINK_EFFICIENCY)


def aligned_bytes(tensors: Iterable[Tensor], itemsize: int | None = None) -> int:
    """Return the bytes of gradients in buckets, where each begins at a multiple of ALIGNMENT elements.

    itemsize: of what is summed, None: of the tensors.
    """
    return sum(-(-x.numel() // ALIGNMENT) * ALIGNMENT * (itemsize or x.element_size()) for x in tensors)


def sharded_bytes(tensors: Iterable[Tensor], num_ranks: int, itemsize: int | None = None) -> int:
    """Return the bytes of weights that FSDP2 divides over processes, padding included.

    It cuts the first dimension into N equal parts, the last of which it fills up. itemsize: as in `aligned_bytes`.
    Source: FSDPParam._init_sharded_param, torch/distributed/fsdp/_fully_shard/_fsdp_param.py.
    """
    total = 0
    for x in tensors:
        first = x.shape[0] if x.dim() else 1
        rows = -(-first // num_ranks) * num_ranks
        total += rows * (x.numel() // max(1, first)) * (itemsize or x.element_size())
    return total


def num_buckets(part_bytes: Sequence[int], limit: int) -> int:
    """Return how many messages the gradients of parts make, sent as soon as they have `limit` bytes together."""
    num = waiting = 0
    for size in part_bytes:
        waiting += size
        if waiting >= limit:
            num, waiting = num + 1, 0
    return num + (waiting > 0)


@dataclass(frozen=True)
class Speed:
    """A prediction. seconds: of a step; exposed: those in which a process only waits for others. efficiency: images/s
    over those of N single GPUs, idle places of a short step included."""

    seconds: float
    exposed: float
    images_per_s: float
    efficiency: float


def predict_speed(
    exchanges: Sequence[Exchange],
    ranks: Ranks,
    rank_seconds: float,
    num_micro: int,
    images: int,
    single_images_per_s: float,
) -> Speed:
    """Return the predicted speed of a run.

    rank_seconds: what a process computes in a step of num_micro micro-steps; images: of all processes in a step.

    Gradients are exchanged while backward goes on, from the last micro-step's first bucket on, so what does not fit
    that backward pass is waited for, and the last bucket always is: exposed = t / calls + max(0, t (1 - 1 / calls) -
    window), with window = BACKWARD_SHARE x the last micro-step. Weights gathered for forward and backward (shard full)
    hide under the whole step. What is exchanged after the step hides under nothing.
    Source: Li et al. 2020, arXiv:2006.15704 (DistributedDataParallel's overlap); Rajbhandari et al. 2020,
    arXiv:1910.02054 (the volumes of sharded states and weights). The link's rate and latency are assumptions.
    """
    times = dict.fromkeys(("forward", "backward", "after"), 0.0)
    calls = 1
    for exchange in exchanges:
        times[exchange.when] += exchange.seconds(ranks.num, ranks.link)
        if exchange.when == "backward":
            calls = max(calls, exchange.calls)
    last = times["backward"] / calls
    window = BACKWARD_SHARE * rank_seconds / num_micro
    exposed = times["after"] + last + max(0.0, times["backward"] - last - window)
    exposed += max(0.0, times["forward"] - (rank_seconds - window))
    seconds = rank_seconds + exposed
    rate = images / seconds
    return Speed(seconds, exposed, rate, rate / (ranks.num * single_images_per_s))


def idle_note(accumulate: int, num_ranks: int) -> str:
    """Return what idles if a step's micro-batches do not divide over the processes, '' if they do."""
    num_micro = math.ceil(accumulate / num_ranks)
    places = num_micro * num_ranks
    if accumulate == places:
        return ""
    idle = places - accumulate
    below = (num_micro - 1) * num_ranks
    use = f"{below} or {places}" if below else f"{places}"
    return (
        f"train.accumulate is {accumulate}, which {num_ranks} GPUs cannot share evenly: each runs {num_micro} "
        f"micro-batches a step, and {idle} of {places}, {100 * idle / places:.0f} % of the GPUs' time, weigh nothing; "
        f"use {use}"
    )
