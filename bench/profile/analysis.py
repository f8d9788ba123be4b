"""Analyse a profiling session: time by phase and by class of operator, and each operator against the roofline."""

from __future__ import annotations

import bisect
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch.autograd import DeviceType

from safelight.bench.core.device_timeline import DeviceStep, device_steps
from safelight.bench.counting.costs import Cost, kind_of
from safelight.bench.profile.profiling_session import STEP, ProfileSession

PHASES = ("load", "noise", "forward", "loss", "backward", "optimizer")
# time outside the phases, and its name in result lines, which must stay comparable with older ones
REST, RECORDED_REST = "rest of the loop", "the loop around them"
# time in which no operator runs
IDLE = {"cuda": "idle", "cpu": "Python and dispatch"}
# class by a part of a kernel's name, if nothing else is known of it
_KERNEL_WORDS = {
    "conv": ("conv", "wgrad", "dgrad", "fprop"),
    "linear": ("gemm", "cutlass"),
    "attention": ("flash", "fmha"),
    "norm": ("norm",),
    "optimizer": ("adam", "ema"),
    "copies": ("memcpy", "memset", "copy", "nchw", "nhwc"),
}


@dataclass(frozen=True)
class Operator:
    """An operator, or a kernel that no operator launched: its calls, time and costs per step.

    share: roofline time / measured time; None if its bytes and FLOPs are unknown.
    """

    name: str
    kind: str
    calls: float
    ms: float
    num_bytes: int
    flops: int
    share: float | None


@dataclass(frozen=True)
class Analysis:
    """Figures of one step.

    step_ms: median of the profiled steps. unprofiled_ms: a step without the profiler. phases: ms by phase. kinds: ms by
    class of operator, with the idle time last. launches: kernels, copies and fills of a GPU, or operators of a CPU.
    """

    step_ms: float
    unprofiled_ms: float
    phases: dict[str, float]
    kinds: dict[str, float]
    operators: list[Operator]
    flops: int
    num_bytes: int
    launches: float
    model_flop_use: float


def _all_steps(session: ProfileSession) -> list:
    steps = [e for e in session.events if e.name == STEP and e.device_type == DeviceType.CPU]
    return sorted(steps, key=lambda e: e.time_range.start)


def step_events(session: ProfileSession) -> list:
    """Return the profiler's events of the analysed steps."""
    steps = _all_steps(session)
    return [steps[number] for number in session.chosen]


def gpu_steps(session: ProfileSession) -> list[DeviceStep]:
    """Return the analysed steps on the GPU's timeline; empty on a CPU."""
    steps = device_steps(session.kernels, [e.time_range.start for e in _all_steps(session)])
    return [steps[number] for number in session.chosen if number in steps]


def chosen_events(session: ProfileSession) -> list:
    """Return the profiler's events that began within the analysed steps."""
    spans = [(e.time_range.start, e.time_range.end) for e in step_events(session)]
    starts = [start for start, _ in spans]
    events = []
    for event in session.events:
        number = bisect.bisect_right(starts, event.time_range.start) - 1
        if number >= 0 and event.time_range.start <= spans[number][1]:
            events.append(event)
    return events


def median_step(session: ProfileSession):
    """Return the event of the step of median length."""
    steps = sorted(step_events(session), key=lambda e: e.time_range.elapsed_us())
    return steps[len(steps) // 2]


def above(event) -> Iterator:
    """Yield the events that enclose an event, innermost first."""
    event = event.cpu_parent
    while event is not None:
        yield event
        event = event.cpu_parent


def _phase_times(session: ProfileSession, events: list) -> dict[str, float]:
    """Return the host's ms per step in each phase, and outside all phases."""
    times = dict.fromkeys(PHASES, 0.0)
    for event in events:
        if event.name in times and event.device_type == DeviceType.CPU:
            times[event.name] += event.time_range.elapsed_us() / 1e3 / len(session.chosen)
    whole = statistics.fmean(e.time_range.elapsed_us() for e in step_events(session)) / 1e3
    return {**times, REST: max(0.0, whole - sum(times.values()))}


def _operator_of(event, counted: set[str]) -> tuple[str | None, bool]:
    """Return (outermost counted operator that is or encloses an event, whether the optimizer phase encloses it)."""
    outer = [event.name, *(e.name for e in above(event))]
    named = [name[6:] for name in outer if name.startswith("aten::") and name[6:] in counted]
    return (named[-1] if named else None), "optimizer" in outer


# [calls, ms] over all steps by (called by the optimizer, operator or kernel)
_Times = dict[tuple[bool, str], list[float]]


def _cpu_times(session: ProfileSession, events: list) -> _Times:
    """Return the times of operators on a CPU, each including the operators it calls."""
    counted = {name for _, name in session.costs}
    times: _Times = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type != DeviceType.CPU or not event.name.startswith("aten::") or event.name[6:] not in counted:
            continue
        if any(e.name.startswith("aten::") and e.name[6:] in counted for e in above(event)):
            continue
        _, in_optimizer = _operator_of(event, counted)
        row = times[in_optimizer, event.name[6:]]
        row[0] += 1
        row[1] += event.cpu_time_total / 1e3
    return times


def _gpu_times(session: ProfileSession, steps: list[DeviceStep]) -> _Times:
    """Return the times of kernels on a GPU by the operator that launched them.

    Kernels without an operator, which are ours and those of CUDA graphs, stand under their own names.
    """
    counted = {name for (_, name), cost in session.costs.items() if not cost.is_kernel}
    by_id = {e.id: e for e in session.events if e.device_type == DeviceType.CPU and not e.name.startswith("cu")}
    times: _Times = defaultdict(lambda: [0, 0.0])
    for run in (run for step in steps for run in step.kernels):
        event = by_id.get(run.operator) if run.operator else None
        operator, in_optimizer = (None, False) if event is None else _operator_of(event, counted)
        row = times[in_optimizer, operator or run.name]
        row[0] += 1
        row[1] += (run.end - run.start) / 1e3
    return times


def _cost(session: ProfileSession, in_optimizer: bool, name: str) -> Cost | None:
    """Return the cost of an operator in or outside the optimizer; of our own kernels, wherever they were called."""
    other = session.costs.get((not in_optimizer, name))
    return session.costs.get((in_optimizer, name)) or (other if other is not None and other.is_kernel else None)


def _kind(in_optimizer: bool, name: str, cost: Cost | None, counted: set[str]) -> str:
    if cost is not None:
        return cost.kind
    if in_optimizer or name in counted:
        return kind_of(name, in_optimizer)
    return next((kind for kind, words in _KERNEL_WORDS.items() if any(w in name.lower() for w in words)), "elementwise")


def roofline_share(cost: Cost, ms: float, ceilings: dict) -> float | None:
    """Return roofline time / measured time of an operator's calls; None if either is 0."""
    limit_ms = cost.roofline_ms(ceilings)
    return limit_ms / ms if ms > 0 and limit_ms > 0 else None


def analyse(session: ProfileSession, ceilings: dict) -> Analysis:
    """Return the figures of one step. ceilings: from bench/core/ceilings.py."""
    operators, events, num = [], chosen_events(session), len(session.chosen)
    is_gpu = session.device.type == "cuda"
    on_device = gpu_steps(session) if is_gpu else []
    counted = {name for _, name in session.costs}
    for (in_optimizer, name), (calls, ms) in (
        _gpu_times(session, on_device) if is_gpu else _cpu_times(session, events)
    ).items():
        cost = _cost(session, in_optimizer, name)
        calls, ms = calls / num, ms / num
        share = None if cost is None else roofline_share(cost, ms, ceilings)
        kind = _kind(in_optimizer, name, cost, counted)
        operators.append(
            Operator(name, kind, calls, ms, cost.num_bytes if cost else 0, cost.flops if cost else 0, share)
        )
    operators.sort(key=lambda o: -o.ms)
    kinds: dict[str, float] = Counter()
    for operator in operators:
        kinds[operator.kind] += operator.ms
    kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    lengths = [s.length_us / 1e3 for s in on_device] or [e.time_range.elapsed_us() / 1e3 for e in step_events(session)]
    idle = sum(s.idle_us for s in on_device) / 1e3 / num if is_gpu else statistics.fmean(lengths) - sum(kinds.values())
    kinds[IDLE[session.device.type]] = max(0.0, idle)
    flops = sum(cost.flops for cost in session.costs.values())
    return Analysis(
        statistics.median(lengths),
        session.unprofiled_ms,
        _phase_times(session, events),
        kinds,
        operators,
        flops,
        sum(cost.num_bytes for cost in session.costs.values()),
        sum(o.calls for o in operators),
        flops / (session.unprofiled_ms / 1e3) / (ceilings["matmul_tflops"] * 1e12),
    )


def figures(session: ProfileSession, analysis: Analysis, ceilings: dict) -> dict:
    """Return the analysis as plain values for a result line."""
    mib = 2**20
    return {
        "step_ms": round(analysis.step_ms, 2),
        "unprofiled_step_ms": round(analysis.unprofiled_ms, 2),
        "stretches_ms": {
            RECORDED_REST if name == REST else name: {"ms": round(ms, 3)} for name, ms in analysis.phases.items()
        },
        "classes_ms": {name: {"ms": round(ms, 3)} for name, ms in analysis.kinds.items()},
        "operators": [
            {
                "name": o.name,
                "class": o.kind,
                "calls": round(o.calls, 1),
                "ms": round(o.ms, 3),
                "gb": round(o.num_bytes / 1e9, 4),
                "gflop": round(o.flops / 1e9, 3),
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
    }
