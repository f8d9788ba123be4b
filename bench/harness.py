"""Timing that a noisy machine cannot fool much: variants interleaved in one process, warm-up, percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PERCENTILES = (0.2, 0.5, 0.8)


def interleave(
    variants: dict[str, Callable[[int], None]], device: torch.device, repeats: int, warmup: int = 2
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


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Return p20, p50, p80."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    return tuple(torch.quantile(ordered, torch.tensor(PERCENTILES, dtype=torch.float64)).tolist())
