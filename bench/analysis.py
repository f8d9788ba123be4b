"""What a profiling session says: time by stretch and by class of operator, and each operator against the roofline."""

from __future__ import annotations

import bisect
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch.autograd import DeviceType

from safelight.bench.operators import class_of
from safelight.bench.session import STEP, Cost, Session

STRETCHES = ("load", "noise", "forward", "loss", "backward", "optimizer")
REST = "the loop around them"
# the counter's classes by the words of a roofline
KINDS = {"matmul": "linear", "copy/cast": "copies"}
_KERNEL_WORDS = {"conv": ("conv", "wgrad", "dgrad"), "linear": ("gemm", "cutlass"), "attention": ("flash", "fmha"),
                 "norm": ("norm",), "optimizer": ("adam", "ema"), "copies": ("memcpy", "memset", "copy")}  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """An operator (or a kernel outside all of them) in one step. share: of the roofline, None where nothing is known of it."""

    name: str
    kind: str
    calls: float
    ms: float
    num_bytes: int
    flops: int
    share: float | None


@dataclass(frozen=True)
class Analysis:
    """step_ms: the median profiled step's; plain_ms: one without the profiler. kinds: ms by class, what is left last."""

    step_ms: float
    plain_ms: float
    stretches: dict[str, float]
    kinds: dict[str, float]
    operators: list[Operator]
    flops: int
    num_bytes: int
    launches: float
    model_flop_use: float


def step_events(session: Session) -> list:
    """Return the profiler's events of the steps that are spoken of."""
    steps = [e for e in session.events if e.name == STEP and e.device_type == DeviceType.CPU]
    steps.sort(key=lambda e: e.time_range.start)
    return [steps[number] for number in session.chosen]


def chosen_events(session: Session) -> list:
    """Return the profiler's events that began within those steps."""
    spans = [(e.time_range.start, e.time_range.end) for e in step_events(session)]
    starts = [start for start, _ in spans]
    found = []
    for event in session.events:
        number = bisect.bisect_right(starts, event.time_range.start) - 1
        if number >= 0 and event.time_range.start <= spans[number][1]:
            found.append(event)
    return found


def median_step(session: Session):
    """Return the event of the step of median length."""
    steps = sorted(step_events(session), key=lambda e: e.time_range.elapsed_us())
    return steps[len(steps) // 2]


def above(event) -> Iterator:
    """Yield what an event is within, the nearest first."""
    event = event.cpu_parent
    while event is not None:
        yield event
        event = event.cpu_parent


def _stretches(session: Session, events: list) -> dict[str, float]:
    """Return ms a step of each stretch, and of what is in none."""
    found = dict.fromkeys(STRETCHES, 0.0)
    for event in events:
        if event.name in found and event.device_type == DeviceType.CPU:
            found[event.name] += event.time_range.elapsed_us() / 1e3 / len(session.chosen)
    whole = statistics.fmean(e.time_range.elapsed_us() for e in step_events(session)) / 1e3
    return {**found, REST: max(0.0, whole - sum(found.values()))}


def _kernel_kind(name: str) -> str:
    return next((kind for kind, words in _KERNEL_WORDS.items() if any(w in name.lower() for w in words)), "elementwise")


def _times(session: Session, events: list) -> dict[tuple[bool, str], list[float]]:
    """Return [calls, ms] by (in the optimizer, operator) over all steps: the device's time on a GPU, the operator's on a CPU."""
    is_gpu = session.device.type == "cuda"
    counted = {name for _, name in session.costs}
    times: dict[tuple[bool, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        name = event.name.partition("::")[2]
        if event.device_type != DeviceType.CPU or not event.name.startswith("aten::") or name not in counted:
            continue
        outer = [e.name for e in above(event)]
        # what an operator calls is part of it
        if any(o.startswith("aten::") and o[6:] in counted for o in outer):
            continue
        row = times["optimizer" in outer, name]
        row[0] += 1
        row[1] += (event.device_time_total if is_gpu else event.cpu_time_total) / 1e3
    return times


def _loose_kernels(events: list) -> dict[str, list[float]]:
    """Return (calls, ms) of a GPU's kernels that no operator launched, by name: our own, and what a graph replays."""
    loose: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            loose[event.name][0] += 1
            loose[event.name][1] += event.time_range.elapsed_us() / 1e3
        elif event.name.startswith("aten::"):
            for kernel in event.kernels:
                loose[kernel.name][0] -= 1
                loose[kernel.name][1] -= kernel.duration / 1e3
    return {name: row for name, row in loose.items() if row[0] > 0}


def _busy_ms(events: list) -> float:
    """Return how long a GPU had a kernel running, over all steps."""
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    )
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e3


def roofline_share(cost: Cost, ms: float, ceilings: dict) -> float | None:
    """Return the least time for an operator's bytes and FLOPs at the ceilings, over the time it took."""
    least = max(
        cost.num_bytes / ceilings["copy_gb_per_s"] / 1e9, cost.flops / ceilings["matmul_tflops"] / 1e12
    )  # fmt: skip
    return 1e3 * least / ms if ms > 0 and least > 0 else None


def analyse(session: Session, ceilings: dict) -> Analysis:
    """Return what the session says, by one step. ceilings: of bench/ceilings.py."""
    operators, events, num = [], chosen_events(session), len(session.chosen)
    for (in_optimizer, name), (calls, ms) in _times(session, events).items():
        cost = session.costs.get((in_optimizer, name), Cost())
        calls, ms = calls / num, ms / num
        kind = "optimizer" if in_optimizer else KINDS.get(class_of(name), class_of(name))
        operators.append(
            Operator(name, kind, calls, ms, cost.num_bytes, cost.flops, roofline_share(cost, ms, ceilings))
        )
    for name, (calls, ms) in _loose_kernels(events).items():
        calls, ms = calls / num, ms / num
        operators.append(Operator(name, _kernel_kind(name), calls, ms, 0, 0, None))
    operators.sort(key=lambda o: -o.ms)
    kinds: dict[str, float] = Counter()
    for operator in operators:
        kinds[operator.kind] += operator.ms
    whole = statistics.fmean(e.time_range.elapsed_us() for e in step_events(session)) / 1e3
    is_gpu = session.device.type == "cuda"
    spent = _busy_ms(events) / num if is_gpu else sum(kinds.values())
    kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    kinds["idle" if is_gpu else "Python and dispatch"] = max(0.0, whole - spent)
    flops = sum(cost.flops for cost in session.costs.values())
    return Analysis(
        median_step(session).time_range.elapsed_us() / 1e3, session.plain_ms, _stretches(session, events), kinds, operators, flops,
        sum(cost.num_bytes for cost in session.costs.values()), sum(o.calls for o in operators),
        flops / (session.plain_ms / 1e3) / (ceilings["matmul_tflops"] * 1e12),
    )  # fmt: skip


def figures(session: Session, analysis: Analysis, ceilings: dict) -> dict:
    """Return plain values for a result line."""
    mib = 2**20
    return {
        "step_ms": round(analysis.step_ms, 2),
        "unprofiled_step_ms": round(analysis.plain_ms, 2),
        "stretches_ms": {name: {"ms": round(ms, 3)} for name, ms in analysis.stretches.items()},
        "classes_ms": {name: {"ms": round(ms, 3)} for name, ms in analysis.kinds.items()},
        "operators": [
            {
                "name": o.name, "class": o.kind, "calls": round(o.calls, 1), "ms": round(o.ms, 3),
                "gb": round(o.num_bytes / 1e9, 4), "gflop": round(o.flops / 1e9, 3),
                **({} if o.share is None else {"share_of_limit": round(o.share, 4)}),
            }
            for o in analysis.operators[:30]
        ],
        "launches": round(analysis.launches),
        "step_gflop": round(analysis.flops / 1e9, 3),
        "moved_gb": round(analysis.num_bytes / 1e9, 4),
        "model_flop_use": {"share_of_limit": round(analysis.model_flop_use, 4)},
        "saved_mib": round(max((b for _, b in session.saved.points), default=0) / mib, 2),
        "saved_by_block_mib": {name: {"mib": round(n / mib, 3)} for name, n in session.saved.by_block.items()},
        **ceilings,
    }  # fmt: skip
