"""`safelight bench quick`: ours against the diffusers recipe on this machine in under three minutes, for everybody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from safelight.bench.core.ceilings import ceilings
from safelight.bench.core.results import make_record
from safelight.bench.measure.count import trace
from safelight.bench.recipes.suite import OURS, measure, variants
from safelight.bench.recipes.workload import Workload
from safelight.trainer.models.base import resolve_base
from safelight.units import GIB

BUDGET_S = 150
# SD1.5's step with an fp32 master, 8-bit moments and a full fp32 gradient, and activations beside it
SD15_GIB = 14


def choose_work(device: str) -> tuple[Workload, tuple[int, ...]]:
    """Return what to train here, and at which batch sizes: SD1.5 where a GPU holds it, else the tiny base."""
    work = Workload(device=device).resolved()
    if work.device != "cuda":
        return work, (1, 4)
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    if total < SD15_GIB:
        return work, (1, 8)
    full = "none" if total > 30 else "full"
    return replace(work, base="random:sd15", latent_size=64, checkpointing=full), (1, 4)


def limit_images_per_s(work: Workload, tflops: float) -> float:
    """Return the images/s at which every FLOP of the step runs at the machine's own matrix rate."""
    counts = trace(
        resolve_base(work.base),
        latent_size=work.latent_size,
        precision=work.precision,
        checkpointing=work.checkpointing,
    )
    return tflops * 1e12 / counts.flops_total


def quick(device: str = "auto", budget_s: float = BUDGET_S, repeats: int = 10) -> Iterator[dict]:
    """Yield result lines: the ceilings, then steps of ours and of the recipe, interleaved while the time lasts."""
    began = time.monotonic()
    work, batch_sizes = choose_work(device)
    is_cpu = work.device == "cpu"
    found = ceilings(torch.device(work.device), work.dtype, small=is_cpu)
    found["limit_images_per_s"] = round(limit_images_per_s(work, found["matmul_tflops"]), 3)
    config = {"base": work.base, "latent_size": work.latent_size, "precision": work.precision}
    yield make_record("ceilings", config, found, torch.device(work.device))
    for size in batch_sizes:
        if time.monotonic() - began > budget_s * 0.6:
            return
        works = variants((OURS, "diffusers"), (size,), work)
        # a GPU holds one of them at a time for certain
        for record in measure(works, repeats if is_cpu else 2 * repeats, together=is_cpu):
            if "images_per_s" in record["figures"]:
                rate = record["figures"]["images_per_s"][1]
                record["figures"]["share_of_limit"] = round(rate / found["limit_images_per_s"], 4)
            yield {**record, "bench": "quick"}
