"""Timing that a noisy machine cannot fool much: variants interleaved in one process, warm-up, percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

PERCENTILES = (0.2, 0.5, 0.8)
NUM_WARMUP = 2
# above every card's second-level cache, and long enough to fill that the host gets ahead of the GPU
FLUSH_BYTES, NUM_FLUSHES = 2**29, 2


def interleave(
    variants: dict[str, Callable[[int], None]], device: torch.device, repeats: int, warmup: int = NUM_WARMUP
) -> dict[str, list[float]]:
    """Return seconds of each repeat by variant. A variant takes the repeat's number, so that its inputs can rotate."""

    def once(run: Callable[[int], None], number: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for number in range(warmup):
        for run in variants.values():
            once(run, number)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        for name, run in variants.items():
            seconds[name].append(once(run, warmup + number))
    return seconds


@dataclass(frozen=True)
class Prepared:
    """A run in two parts: what prepare returns is made outside the time and given to run."""

    prepare: Callable[[], object]
    run: Callable[[object], object]


def interleave_prepared(variants: dict[str, Prepared], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Return seconds of each repeat by variant, of `run` alone.

    On a GPU it is the device's own time by events, the second-level cache emptied before each run; while it is, the
    host queues the run, so that a short kernel is not timed by how fast Python launches it.
    """
    is_gpu = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES if is_gpu else 0, dtype=torch.uint8, device=device)

    def once(variant: Prepared) -> float | tuple:
        made = variant.prepare()
        if not is_gpu:
            began = time.perf_counter()
            variant.run(made)
            return time.perf_counter() - began
        for _ in range(NUM_FLUSHES):
            flush.zero_()
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        events[0].record()
        variant.run(made)
        events[1].record()
        return events

    for _ in range(NUM_WARMUP):
        for variant in variants.values():
            once(variant)
    found: dict[str, list] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            found[name].append(once(variant))
        if is_gpu:
            torch.cuda.synchronize(device)
    if is_gpu:
        found = {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in found.items()}
    return found


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Return p20, p50, p80."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    return tuple(torch.quantile(ordered, torch.tensor(PERCENTILES, dtype=torch.float64)).tolist())
