"""`safelight bench quick`: our step against the diffusers recipe on this machine, in under three minutes."""

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
REPEATS = 10
# memory of SD1.5's step with fp32 master weights, 8-bit moments, fp32 gradients and activations
SD15_GIB = 14


def choose_work(device: str) -> tuple[Workload, tuple[int, ...]]:
    """Return (workload, batch sizes) for this machine: SD1.5 if a GPU has the memory for it, else the tiny base."""
    work = Workload(device=device).resolved()
    if work.device != "cuda":
        return work, (1, 4)
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    if total < SD15_GIB:
        return work, (1, 8)
    checkpointing = "none" if total > 30 else "full"
    return replace(work, base="random:sd15", latent_size=64, checkpointing=checkpointing), (1, 4)


def limit_images_per_s(work: Workload, tflops: float) -> float:
    """Return the images/s if all FLOPs of the step ran at the machine's matrix multiplication rate."""
    counts = trace(
        resolve_base(work.base),
        latent_size=work.latent_size,
        precision=work.precision,
        checkpointing=work.checkpointing,
    )
    return tflops * 1e12 / counts.flops_total


def quick(device: str) -> Iterator[dict]:
    """Yield result lines: the ceilings, then our step and the recipe's at each batch size, until the time is up."""
    began = time.monotonic()
    work, batch_sizes = choose_work(device)
    is_cpu = work.device == "cpu"
    limits = ceilings(torch.device(work.device), work.dtype, small=is_cpu)
    limits["limit_images_per_s"] = round(limit_images_per_s(work, limits["matmul_tflops"]), 3)
    config = {"base": work.base, "latent_size": work.latent_size, "precision": work.precision}
    yield make_record("ceilings", config, limits, torch.device(work.device))
    for size in batch_sizes:
        if time.monotonic() - began > BUDGET_S * 0.6:
            return
        workloads = variants((OURS, "diffusers"), (size,), work)
        # on a GPU only one of them is certain to fit at a time
        for record in measure(workloads, REPEATS if is_cpu else 2 * REPEATS, together=is_cpu):
            if "images_per_s" in record["figures"]:
                rate = record["figures"]["images_per_s"][1]
                record["figures"]["share_of_limit"] = round(rate / limits["limit_images_per_s"], 4)
            yield {**record, "bench": "quick"}
