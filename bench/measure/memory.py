"""`safelight bench memory`: what a training step needs, by optimizer, memory mode and checkpointing.

On a GPU: allocated and reserved at the peak, and the smallest emulated card it fits. A card of n GiB is emulated by a cap
on torch's allocator of n less what the CUDA context holds; a step that does not fit fails as it would there. On a CPU:
the allocator's own record of a step, and the bytes held between steps. Beside either stands what the plan's trace says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from safelight.bench.core.harness import interleave
from safelight.bench.core.results import make_record
from safelight.bench.counting.profiled import allocated_peak
from safelight.bench.measure.optimizers import held_bytes, offered
from safelight.bench.recipes.suite import OURS, build, free
from safelight.bench.recipes.workload import Workload, optimizer_config, random_batches
from safelight.errors import UserError
from safelight.trainer.config.toml import Config
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, FRAGMENTATION, this_card
from safelight.trainer.memory_plan.meta_run import MetaRun, Traced
from safelight.trainer.models.base import resolve_base
from safelight.units import GIB, MIB

CARDS_GIB = (4, 6, 8, 12, 16)


def kinds() -> tuple[str, ...]:
    """Return the ways of checkpointing that a config can name, auto left out, the least memory last."""
    from typing import get_args

    from safelight.trainer.config.toml import Train

    return tuple(value for value in get_args(Train.model_fields["checkpointing"].annotation) if value != "auto")


def context_bytes(device: torch.device) -> int:
    """Return what is taken of a GPU beside torch's allocator: the CUDA context, and whatever else runs there."""
    available, total = torch.cuda.mem_get_info(device)
    return max(0, total - available - torch.cuda.memory_reserved(device))


def predicted(work: Workload) -> Traced:
    """Return the plan's trace of a step, as `safelight plan` makes it."""
    config = Config(
        model={"base": work.base, "precision": work.precision},
        optimizer=optimizer_config(work.optimizer),
        train={"checkpointing": work.checkpointing},
    )
    run = MetaRun(config, resolve_base(work.base), torch.device(work.device), work.dtype)
    # the first step makes what the optimizer keeps
    return [run.step(work.batch_size, work.latent_size, work.latent_size) for _ in range(2)][1]


def try_step(work: Workload) -> dict | None:
    """Return the peaks (GiB) and time of a step on a GPU, or None if it does not fit."""
    device = torch.device(work.device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        trainer, batches = build(OURS, work), random_batches(3, work)
        seconds = interleave({"": lambda n: trainer.step(batches[n % 3])}, device, repeats=2, warmup=1)[""]
    except torch.cuda.OutOfMemoryError:
        return None
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 3),
        "step_ms": round(1e3 * min(seconds), 2),
    }


def on_a_card(work: Workload, card_gib: int, context: int) -> dict | None:
    """Return try_step's figures on an emulated card."""
    device = torch.device(work.device)
    total = torch.cuda.get_device_properties(device).total_memory
    # of the current device: torch refuses here, and nowhere else, a device without its number
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card_gib * GIB - context) / total))
    try:
        return try_step(work)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free(device)


def of_a_gpu(work: Workload) -> dict:
    """Return the peaks without a cap, and the smallest card a step fits, tried from the first that could hold it."""
    device = torch.device(work.device)
    context = context_bytes(device)
    total = torch.cuda.get_device_properties(device).total_memory
    found = try_step(work)
    free(device)
    if found is None:
        return {"fits": False}
    traced = predicted(work)
    allocated, workspace = traced.peak.total, this_card(device).workspace(is_deterministic=False)
    needed = CONTEXT_BYTES + workspace + allocated + FRAGMENTATION * traced.transient
    measured = GIB * found["reserved_gib"] + context
    found |= {
        "predicted_allocated_gib": round(allocated / GIB, 3),
        "predicted_needed_gib": round(needed / GIB, 3),
        "allocated_to_predicted": round(GIB * found["allocated_gib"] / allocated, 4),
        "needed_to_predicted": round(measured / needed, 4),
    }
    found = {"fits": True, **found, "context_gib": round(context / GIB, 3), "smallest_card_gib": None}
    for card in CARDS_GIB:
        # what is allocated at once cannot shrink; what is merely reserved can
        if card * GIB > total or card < found["allocated_gib"] + found["context_gib"]:
            continue
        if (there := on_a_card(work, card, context)) is not None:
            return {**found, "smallest_card_gib": card, "step_ms_there": there["step_ms"]}
    return found


def of_a_cpu(work: Workload) -> dict:
    """Return the bytes held between steps and what a step adds at its peak, MiB, by the allocator's record."""
    trainer, (batch,) = build(OURS, work), random_batches(1, work)
    # the first step makes the moments
    trainer.step(batch)
    held = held_bytes(trainer.optimizer, trainer.unet)
    peak = allocated_peak(lambda: trainer.step(batch))
    transient = predicted(work).transient
    return {
        "held_mib": round(held / MIB, 2),
        "step_mib": round(peak / MIB, 2),
        "peak_mib": round((held + peak) / MIB, 2),
        "predicted_step_mib": round(transient / MIB, 2),
        "step_to_predicted": round(peak / transient, 4),
    }


def bench_memory(work: Workload, optimizers: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yield a result line for each optimizer, memory mode and way of checkpointing; all that are offered if none is named.

    A combination that cannot run leaves its reason. Raises ValueError for an unknown optimizer.
    """
    work = work.resolved()
    names = tuple(offered(work.dtype))
    for wanted in optimizers:
        if not any(wanted in (name, *name.split(", ")) for name in names):
            known = dict.fromkeys(part for name in names for part in name.split(", "))
            raise UserError(f"optimizer {wanted!r} is unknown; use {', '.join(known)}, or both as in '{names[0]}'")
    chosen = [n for n in names if not optimizers or any(wanted in (n, *n.split(", ")) for wanted in optimizers)]
    device = torch.device(work.device)
    for optimizer in chosen:
        for checkpointing in kinds():
            one = replace(work, optimizer=optimizer, checkpointing=checkpointing)
            try:
                found = of_a_gpu(one) if device.type == "cuda" else of_a_cpu(one)
            except (ValueError, NotImplementedError) as error:
                # a setting this device refuses, an operator a library lacks for it: told in the line; any other fault is raised
                found = {"cannot": str(error).splitlines()[0][:160]}
            free(device)
            yield make_record("memory", {"recipe": OURS, **asdict(one)}, found, device)


def rows(records: list[dict]) -> list[tuple]:
    """Return rows for the terminal: of a GPU's peaks or of a CPU's."""
    table = []
    for record in records:
        config, found = record["config"], record["figures"]
        names = ("allocated_gib", "reserved_gib", "smallest_card_gib", "held_mib", "step_mib", "peak_mib")
        cells = [f"{found[name]:g}" for name in names if found.get(name) is not None]
        why = found.get("cannot", "" if found.get("fits", True) else "does not fit")
        table.append((config["optimizer"], config["checkpointing"], *(cells or [why, "", ""])))
    return table
