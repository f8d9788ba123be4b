"""`safelight bench step` and `bench baseline`: images/s and peak memory of one optimizer step, ours and the baselines."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch

from safelight.bench.baselines import RECIPES, Baseline
from safelight.bench.harness import interleave, percentiles
from safelight.bench.results import make_record
from safelight.bench.workload import NUM_ROTATED, Ours, Workload, cached_batches, random_batches
from safelight.trainer.log import peak_memory_gib, reset_peak_memory

OURS = "safelight"
NUM_CACHED_BATCHES = 8


def build(recipe: str, work: Workload) -> Ours | Baseline:
    """Return ours or a baseline, ready to step. Raises ValueError for an unknown one."""
    if recipe == OURS:
        return Ours(work)
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is unknown; use {OURS}, {', '.join(RECIPES)}")
    return Baseline(recipe, work)


def peak_alone(recipe: str, work: Workload) -> float:
    """Return the peak GiB of two steps with nothing else on the GPU; on a CPU, of the process so far."""
    device = torch.device(work.device)
    reset_peak_memory(device)
    trainer = build(recipe, work)
    for batch in random_batches(2, work):
        trainer.step(batch)
    peak = peak_memory_gib(device)
    del trainer
    free(device)
    return peak


def free(device: torch.device) -> None:
    """Give back what no variable holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def runner(trainer: Ours | Baseline, work: Workload, loader: bool, stack: ExitStack) -> Callable[[int], None]:
    """Return a function that takes a step: of rotated batches in memory, or of batches read from a cache."""
    if loader:
        from_cache = stack.enter_context(cached_batches(work, NUM_CACHED_BATCHES * work.batch_size))
        return lambda number: trainer.step(next(from_cache))
    batches = random_batches(NUM_ROTATED, work)
    return lambda number: trainer.step(batches[number % NUM_ROTATED])


def measure(
    works: dict[str, tuple[str, Workload]], repeats: int, loader: bool = False, together: bool = True
) -> Iterator[dict]:
    """Yield a result line for each variant: name -> (recipe, workload).

    together: all are built at once and their steps interleaved, which a noisy machine fools least; else one after
    another, which needs the memory of one. A GPU's peak is taken of each alone, before.
    """
    for group in [list(works)] if together else [[name] for name in works]:
        device = torch.device(works[group[0]][1].device)
        peaks = {name: peak_alone(*works[name]) for name in group} if device.type == "cuda" else {}
        seconds, notes = _time({name: works[name] for name in group}, repeats, loader)
        free(device)
        for name in group:
            recipe, work = works[name]
            low, middle, high = percentiles(seconds[name])
            found = {
                "images_per_s": [round(work.batch_size / s, 4) for s in (high, middle, low)],
                "step_ms": [round(1e3 * s, 3) for s in (low, middle, high)],
                "peak_gib": round(peaks[name], 3) if name in peaks else None,
                # on a CPU the resident peak of everything measured so far: it cannot be taken of one variant
                "peak_gib_of_process": round(peak_memory_gib(device), 3),
            }
            config = {"recipe": recipe, **asdict(work), "loader": loader, "repeats": repeats}
            yield {**make_record("step", config, found, device), "attention": notes[name]}


def _time(
    works: dict[str, tuple[str, Workload]], repeats: int, loader: bool
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return (seconds of each repeat, what attention ran) by variant. One model serves all batch sizes of a recipe."""
    trainers: dict[tuple, Ours | Baseline] = {}
    runs, notes = {}, {}
    with ExitStack() as stack:
        for name, (recipe, work) in works.items():
            key = (recipe, replace(work, batch_size=1))
            if key not in trainers:
                trainers[key] = build(recipe, work)
            notes[name] = trainers[key].notes
            runs[name] = runner(trainers[key], work, loader, stack)
        return interleave(runs, torch.device(next(iter(works.values()))[1].device), repeats), notes


def variants(recipes: tuple[str, ...], batch_sizes: tuple[int, ...], work: Workload) -> dict[str, tuple[str, Workload]]:
    """Return every recipe at every batch size, by a name."""
    work = work.resolved()
    return {
        f"{recipe}, batch {size}": (recipe, replace(work, batch_size=size))
        for size in batch_sizes
        for recipe in recipes
    }
