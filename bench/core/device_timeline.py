"""The GPU's timeline from a profile: which step each kernel belongs to, how long steps take, and the idle gaps.

The host runs ahead of the GPU, so a kernel belongs to the step that launched it, whenever it ran. A step lasts from its
first kernel to the first kernel of the next step; gaps in between are idle time, whatever caused them.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch.autograd import DeviceType

# calls of the CUDA runtime and driver: cudaLaunchKernel, cuLaunchKernelEx
_RUNTIME = re.compile(r"cu(da)?[A-Z]")


@dataclass(frozen=True)
class KernelRun:
    """A kernel, copy or fill on the GPU.

    start, end, launched: microseconds since profiling began; launched is the time of the host's call. operator: id of
    the profiler event that launched it, 0 if none.
    """

    name: str
    start: float
    end: float
    launched: float
    operator: int


def kernel_runs(events: Iterable, began_ns: int) -> list[KernelRun]:
    """Return the kernels of a profile in order of their start. events: kineto_results.events()."""
    calls, on_gpu = {}, []
    for event in events:
        if event.device_type() == DeviceType.CPU and _RUNTIME.match(event.name()):
            calls[event.correlation_id()] = event.start_ns()
        elif event.device_type() == DeviceType.CUDA and not event.is_user_annotation() and event.name() != "[memory]":
            on_gpu.append(event)
    runs = [
        KernelRun(
            e.name(),
            (e.start_ns() - began_ns) / 1e3,
            (e.end_ns() - began_ns) / 1e3,
            # without a recorded launch call, take the start of the kernel
            (calls.get(e.correlation_id(), e.start_ns()) - began_ns) / 1e3,
            e.linked_correlation_id(),
        )
        for e in on_gpu
    ]
    return sorted(runs, key=lambda run: run.start)


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Return the total time covered by (start, end) spans, counting overlaps once."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


@dataclass(frozen=True)
class DeviceStep:
    """The kernels of one step. length_us: from the first kernel to the next step's first, or else to its own end."""

    kernels: list[KernelRun]
    length_us: float

    @property
    def idle_us(self) -> float:
        """Microseconds of the step in which nothing ran."""
        return self.length_us - busy_us((k.start, k.end) for k in self.kernels)


def device_steps(runs: list[KernelRun], step_starts: list[float]) -> dict[int, DeviceStep]:
    """Return the kernels of each step by its number. step_starts: host times, ascending, in microseconds."""
    by_step: dict[int, list[KernelRun]] = defaultdict(list)
    for run in runs:
        number = bisect.bisect_right(step_starts, run.launched) - 1
        if number >= 0:
            by_step[number].append(run)
    steps = {}
    for number, kernels in by_step.items():
        following = by_step.get(number + 1)
        end = following[0].start if following else max(k.end for k in kernels)
        steps[number] = DeviceStep(kernels, end - kernels[0].start)
    return steps
