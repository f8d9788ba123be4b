"""Images/s and peak memory of training steps, ours and the baselines': `safelight bench step` and `bench baseline`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial

import torch

from safelight.bench.core.harness import by_turns, interleave, percentiles
from safelight.bench.core.results import make_record
from safelight.bench.core.turns import Prepared, players
from safelight.bench.recipes.baselines import Baseline
from safelight.bench.recipes.other_trainers import ALL_RECIPES, make_baseline
from safelight.bench.recipes.workload import NUM_ROTATED, Ours, Workload, cached_batches, config_of, random_batches
from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.run_log.metrics import peak_memory_gib, reset_peak_memory
from safelight.trainer.step.cuda_graphs import CudaRecorder

OURS = "safelight"
UNPATCHED = "safelight-unpatched"
# ours with one technique added or removed, or what is trained changed; its effect is the ratio to ours in the same run
VARIANTS: dict[str, dict] = {
    OURS: {},
    UNPATCHED: {"kernels": "off"},
    "safelight-fused": {"fused": True},
    "safelight-graphs": {"graphs": True},
    "safelight-fused-graphs": {"fused": True, "graphs": True},
    "safelight-cudnn-benchmark": {"cudnn_benchmark": True},
    "safelight-lora": {"adapter": {"kind": "lora"}},
    "safelight-lora-nf4": {"adapter": {"kind": "lora", "base": "nf4"}},
}
NUM_CACHED_BATCHES = 8


def build(recipe: str, work: Workload) -> Ours | Baseline:
    """Return the training step of ours or of a baseline. Raises UserError for an unknown recipe."""
    if recipe in VARIANTS:
        options = dict(VARIANTS[recipe])
        device, recorder = torch.device(work.device), None
        if options.pop("graphs", False):
            if device.type != "cuda":
                raise UserError(f"recipe {recipe} replays CUDA graphs and needs a CUDA device; leave it out")
            recorder = CudaRecorder(device)
        return Ours(work, recorder=recorder, **options)
    check_recipe(recipe)
    return make_baseline(recipe, work)


def check_recipe(recipe: str) -> None:
    """Raise UserError for an unknown recipe."""
    if recipe not in VARIANTS and recipe not in ALL_RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; use {', '.join([*VARIANTS, *ALL_RECIPES])}")


def recipe_config(recipe: str, work: Workload) -> Config:
    """Return the config of a run that takes the steps of one of VARIANTS."""
    options = VARIANTS[recipe]
    config = config_of(work, options.get("kernels", "auto"), options.get("fused", False), options.get("adapter"))
    config.train.cuda_graphs = "on" if options.get("graphs") else "off"
    return config


def peak_alone(recipe: str, work: Workload) -> float:
    """Return the peak memory in GiB of two steps, with no other variant on the GPU; on a CPU, of the process so far."""
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
    """Collect garbage and release cached GPU memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def runner(trainer: Ours | Baseline, work: Workload, loader: bool, stack: ExitStack) -> Callable[[int], None]:
    """Return a function that takes one step. loader: read batches from a cache instead of rotating those in memory."""
    if loader:
        from_cache = stack.enter_context(cached_batches(work, NUM_CACHED_BATCHES * work.batch_size))
        return lambda number: trainer.step(next(from_cache))
    batches = random_batches(NUM_ROTATED, work)
    return lambda number: trainer.step(batches[number % NUM_ROTATED])


Variants = dict[str, tuple[str, Workload]]


def measure(workloads: Variants, repeats: int, loader: bool = False, together: bool = True) -> Iterator[dict]:
    """Yield a result line for each variant. workloads: name -> (recipe, workload).

    together: build all variants and interleave their steps, which is most robust against noise; on a GPU each peak is
    measured beforehand with that variant alone, on a CPU each recipe has a process of its own. Otherwise time one after
    another, with the memory of one; a variant that runs out of GPU memory yields a line with fits: false.
    """
    device = torch.device(next(iter(workloads.values()))[1].device)
    if not together:
        yield from _measure_separately(workloads, repeats, loader)
    elif device.type == "cuda":
        yield from _measure_together(workloads, repeats, loader, device)
    else:
        yield from _measure_by_turns(workloads, repeats, loader)


def _by_model(workloads: Variants) -> dict[tuple, Variants]:
    """Return the variants of each model: one is used for all batch sizes of a recipe."""
    by_model: dict[tuple, Variants] = {}
    for name, (recipe, work) in workloads.items():
        by_model.setdefault((recipe, replace(work, batch_size=1)), {})[name] = (recipe, work)
    return by_model


def _measure_together(workloads: Variants, repeats: int, loader: bool, device: torch.device) -> Iterator[dict]:
    peaks = {name: peak_alone(*workloads[name]) for name in workloads}
    runs, notes = {}, {}
    with ExitStack() as stack:
        for ours in _by_model(workloads).values():
            prepared = stack.enter_context(_prepared(ours, loader))
            runs |= prepared.runs
            notes |= dict.fromkeys(ours, prepared.notes)
        seconds = interleave(runs, device, repeats)
    for name, (recipe, work) in workloads.items():
        yield _make_result(recipe, work, loader, repeats, notes[name], seconds[name], peaks[name])


@contextmanager
def _prepared(workloads: Variants, loader: bool) -> Iterator[Prepared]:
    """The steps of the variants of one model."""
    trainer = build(*next(iter(workloads.values())))
    with ExitStack() as stack:
        yield Prepared(
            {name: runner(trainer, work, loader, stack) for name, (_, work) in workloads.items()}, trainer.notes
        )


def _measure_by_turns(workloads: Variants, repeats: int, loader: bool) -> Iterator[dict]:
    by_model = {next(iter(ours)): ours for ours in _by_model(workloads).values()}
    for recipe, _ in workloads.values():
        check_recipe(recipe)
    with players(_prepared, {name: (ours, loader) for name, ours in by_model.items()}) as started:
        first_of = {name: first for first, ours in by_model.items() for name in ours}
        seconds = by_turns({name: partial(started[first].turn, name) for name, first in first_of.items()}, repeats)
        peaks = {first: player.end() for first, player in started.items()}
    for name, (recipe, work) in workloads.items():
        first = first_of[name]
        yield _make_result(recipe, work, loader, repeats, started[first].notes, seconds[name], None, peaks[first])


def _measure_separately(workloads: Variants, repeats: int, loader: bool) -> Iterator[dict]:
    built, trainer = None, None
    for recipe, work in workloads.values():
        device, key = torch.device(work.device), (recipe, replace(work, batch_size=1))
        try:
            if key != built:
                # free the previous model before building the next
                built = trainer = None
                free(device)
                reset_peak_memory(device)
                trainer, built = build(recipe, work), key
            else:
                reset_peak_memory(device)
            with ExitStack() as stack:
                seconds = interleave({"": runner(trainer, work, loader, stack)}, device, repeats)[""]
            peak = peak_memory_gib(device) if device.type == "cuda" else None
            yield _make_result(recipe, work, loader, repeats, trainer.notes, seconds, peak)
        except torch.cuda.OutOfMemoryError as error:
            # the interrupted step leaves gradients behind: build the model again
            built = trainer = None
            config = {"recipe": recipe, **asdict(work), "loader": loader, "repeats": repeats}
            yield make_record("step", config, {"fits": False}, device, str(error).splitlines()[0][:120])
        free(device)


def _make_result(
    recipe: str,
    work: Workload,
    loader: bool,
    repeats: int,
    notes: str,
    seconds: list[float],
    peak: float | None,
    of_process: float | None = None,
) -> dict:
    """Return the result line of a timed variant.

    peak: GiB of this variant alone, None on a CPU. of_process: GiB of the process that measured it, and perhaps others;
    None: of this one.
    """
    low, middle, high = percentiles(seconds)
    device = torch.device(work.device)
    figures = {
        "images_per_s": [round(work.batch_size / s, 4) for s in (high, middle, low)],
        "step_ms": [round(1e3 * s, 3) for s in (low, middle, high)],
        "peak_gib": None if peak is None else round(peak, 3),
        "peak_gib_of_process": round(peak_memory_gib(device) if of_process is None else of_process, 3),
    }
    config = {"recipe": recipe, **asdict(work), "loader": loader, "repeats": repeats}
    return {**make_record("step", config, figures, device), "attention": notes}


def variants(recipes: tuple[str, ...], batch_sizes: tuple[int, ...], work: Workload) -> Variants:
    """Return the variants of every recipe at every batch size, by name."""
    work = work.resolved()
    return {
        f"{recipe}, batch {size}": (recipe, replace(work, batch_size=size))
        for recipe in recipes
        for size in batch_sizes
    }
