"""What a GPU did and when, by its own timeline: which step a kernel belongs to, how long a step is there, and its gaps.

The host runs ahead of a GPU, so a kernel belongs to the step in which it was launched, whenever it ran. A step lasts from
its first kernel to the next one's first: the gaps in between are idle time, whoever is to blame.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch.autograd import DeviceType

# the CUDA runtime's and driver's calls: cudaLaunchKernel, cuLaunchKernelEx
_RUNTIME = re.compile(r"cu(da)?[A-Z]")


@dataclass(frozen=True)
class KernelRun:
    """A kernel, copy or fill. start, end: microseconds since profiling began; launched: when the host asked for it;
    operator: id of the profiler's event that did, 0 for none."""

    name: str
    start: float
    end: float
    launched: float
    operator: int


def kernel_runs(events: Iterable, began_ns: int) -> list[KernelRun]:
    """Return what a GPU ran, by start. events: the profiler's own (kineto_results.events())."""
    calls, found = {}, []
    for event in events:
        if event.device_type() == DeviceType.CPU and _RUNTIME.match(event.name()):
            calls[event.correlation_id()] = event.start_ns()
        elif event.device_type() == DeviceType.CUDA and not event.is_user_annotation() and event.name() != "[memory]":
            found.append(event)
    runs = [
        KernelRun(
            e.name(),
            (e.start_ns() - began_ns) / 1e3,
            (e.end_ns() - began_ns) / 1e3,
            # a launch before the profiler's first event was not seen
            (calls.get(e.correlation_id(), e.start_ns()) - began_ns) / 1e3,
            e.linked_correlation_id(),
        )
        for e in found
    ]
    return sorted(runs, key=lambda run: run.start)


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long anything ran, of (start, end): what overlaps counts once."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


@dataclass(frozen=True)
class DeviceStep:
    """What a GPU did of a step. length_us: until the next step's first kernel, or its own last."""

    kernels: list[KernelRun]
    length_us: float

    @property
    def idle_us(self) -> float:
        """Time within the step in which nothing ran."""
        return self.length_us - busy_us((k.start, k.end) for k in self.kernels)


def device_steps(runs: list[KernelRun], step_starts: list[float]) -> dict[int, DeviceStep]:
    """Return each step's part of the timeline. step_starts: when the host began each, ascending, microseconds."""
    by_step: dict[int, list[KernelRun]] = defaultdict(list)
    for run in runs:
        number = bisect.bisect_right(step_starts, run.launched) - 1
        if number >= 0:
            by_step[number].append(run)
    found = {}
    for number, kernels in by_step.items():
        following = by_step.get(number + 1)
        end = following[0].start if following else max(k.end for k in kernels)
        found[number] = DeviceStep(kernels, end - kernels[0].start)
    return found
