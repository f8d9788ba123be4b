"""Timing that is robust against a noisy machine: warm-up, variants interleaved, percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

PERCENTILES = (0.2, 0.5, 0.8)
NUM_WARMUP = 2
# above every card's second-level cache, and long enough to fill that the host gets ahead of the GPU
FLUSH_BYTES, NUM_FLUSHES = 2**29, 2


def interleave(
    variants: dict[str, Callable[[int], None]], device: torch.device, repeats: int, warmup: int = NUM_WARMUP
) -> dict[str, list[float]]:
    """Return the seconds of each repeat by variant, with the device synchronized before and after each.

    A variant is called with the number of the repeat, so that it can rotate its inputs.
    """

    def time_once(run: Callable[[int], None], number: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return by_turns({name: partial(time_once, run) for name, run in variants.items()}, repeats, warmup)


def by_turns(
    timed: dict[str, Callable[[int], float]], repeats: int, warmup: int = NUM_WARMUP
) -> dict[str, list[float]]:
    """Return the seconds of each repeat by variant. timed: run a variant with the number of the repeat, and return its
    seconds."""
    for number in range(warmup):
        for run in timed.values():
            run(number)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(repeats):
        for name, run in timed.items():
            seconds[name].append(run(warmup + number))
    return seconds


@dataclass(frozen=True)
class Prepared:
    """A timed function with untimed preparation: run(prepare()), of which only `run` is timed."""

    prepare: Callable[[], object]
    run: Callable[[object], object]


def interleave_prepared(variants: dict[str, Prepared], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each repeat of `run` by variant.

    On a GPU this is device time between two events. The L2 cache is flushed before each run; while that takes place the
    host enqueues the run, so that the time of a short kernel is not the time Python takes to launch it.
    """
    is_gpu = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES if is_gpu else 0, dtype=torch.uint8, device=device)

    def time_once(variant: Prepared) -> float | tuple:
        prepared = variant.prepare()
        if not is_gpu:
            began = time.perf_counter()
            variant.run(prepared)
            return time.perf_counter() - began
        for _ in range(NUM_FLUSHES):
            flush.zero_()
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        events[0].record()
        variant.run(prepared)
        events[1].record()
        return events

    for _ in range(NUM_WARMUP):
        for variant in variants.values():
            time_once(variant)
    times: dict[str, list] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            times[name].append(time_once(variant))
        if is_gpu:
            torch.cuda.synchronize(device)
    if is_gpu:
        # pairs of events
        times = {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in times.items()}
    return times


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Return p20, p50, p80."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    return tuple(torch.quantile(ordered, torch.tensor(PERCENTILES, dtype=torch.float64)).tolist())
