"""Launches and times of one real step from torch's profiler, to check what `bench count` models.

On a GPU every kernel counts under the class of the operator that launched it. On a CPU, where nothing is launched, the
innermost operators are counted instead.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from safelight.bench.core.operators import CLASSES, class_of, does_work

# classes whose operators call other operators to do their work
COMPOUND = ("conv", "matmul", "attention", "norm")
# operators that return a view or only call another operator
_COMPOSITE = set(
    "view t transpose permute reshape as_strided expand slice select split chunk unsqueeze squeeze narrow flatten "
    "contiguous to result_type numpy_T mT unflatten expand_as view_as resolve_conj resolve_neg detach_".split()
)
SYNC_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
# class by a part of the kernel's name, for kernels that a library (cuDNN, bitsandbytes) launched outside any operator
_KERNEL_WORDS = {
    "conv": ("cudnn", "conv", "wgrad", "dgrad"),
    "matmul": ("gemm", "cutlass"),
    "optimizer": ("optimizer", "adam"),
}


def profile_step(step: Callable[[], None], device: torch.device) -> dict:
    """Return {classes: {class: {launches, ms}}, launches, host_syncs, device_ms} of one call of `step` after a warm-up.

    On a CPU, launches are the innermost operators that do work.
    """
    # keep the profiler's library from printing when it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        step()
    classes = {kind: {"launches": 0, "ms": 0.0} for kind in CLASSES}
    # the profiler itself synchronizes once at the end
    num_syncs = -1 if device.type == "cuda" else 0
    sync_names = SYNC_CALLS if device.type == "cuda" else ("aten::_local_scalar_dense",)
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            continue
        num_syncs += event.name in sync_names
        if device.type == "cuda":
            for kernel in event.kernels:
                _add(classes, _kernel_class(event, kernel.name), kernel.duration)
        elif (kind := _operator_class(event)) is not None:
            _add(classes, kind, event.cpu_time_total)
    for row in classes.values():
        row["ms"] = round(row["ms"], 3)
    return {
        "classes": {kind: row for kind, row in classes.items() if row["launches"]},
        "launches": sum(row["launches"] for row in classes.values()),
        "host_syncs": num_syncs,
        "device_ms": round(sum(row["ms"] for row in classes.values()), 3),
    }


def _add(classes: dict, kind: str, microseconds: float) -> None:
    classes[kind]["launches"] += 1
    classes[kind]["ms"] += microseconds / 1e3


def _ancestors(event) -> Iterator:
    while event is not None:
        yield event
        event = event.cpu_parent


def _kernel_class(event, kernel: str) -> str:
    """Return a kernel's class: optimizer inside an optimizer step, else its operator's class, else by its own name."""
    if any(e.name.startswith("Optimizer.step#") for e in _ancestors(event)):
        return "optimizer"
    operators = [e.name.partition("::")[2] for e in _ancestors(event) if "::" in e.name and "autograd::" not in e.name]
    if operators:
        # copies and fills inside a compound operator belong to it
        return next((kind for name in operators if (kind := class_of(name)) in COMPOUND), class_of(operators[0]))
    return next(
        (kind for kind, words in _KERNEL_WORDS.items() if any(w in kernel.lower() for w in words)), "elementwise"
    )


def _operator_class(event) -> str | None:
    """Return the class under which a CPU operator counts, None if it does not count.

    Of compound operators the outermost call counts, of others the innermost.
    """
    if not event.name.startswith("aten::"):
        return None
    if any(e.name.startswith("Optimizer.step#") for e in _ancestors(event)):
        return "optimizer" if not event.cpu_children else None
    own = class_of(event.name[6:])
    above = [class_of(e.name[6:]) for e in _ancestors(event.cpu_parent) if e.name.startswith("aten::")]
    if any(kind in COMPOUND for kind in above):
        return None
    if own in COMPOUND:
        return own
    works = [e for e in (event, *event.cpu_children) if does_work(e.name.partition("::")[2], e.name[6:] in _COMPOSITE)]
    return own if works == [event] else None


def allocated_peak(step: Callable[[], None]) -> int:
    """Return the peak rise in bytes of the CPU allocator's live memory during a call of `step`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # events() drops allocations made inside operators; the trace behind it has every allocation and release
    allocations = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(e.nbytes() for e in sorted(allocations, key=lambda e: e.start_ns()))
    return max(live, default=0)
