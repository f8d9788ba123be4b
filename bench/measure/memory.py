"""`safelight bench memory`: memory of a training step by optimizer, memory mode and checkpointing.

On a GPU: peak allocated and reserved memory, and the smallest emulated card that a step fits. A card of n GiB is
emulated by limiting torch's allocator to n GiB minus the CUDA context; a step that does not fit runs out of memory as
it would there. On a CPU: bytes held between steps, and the allocator's peak during a step. Both are compared with the
prediction of `safelight plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import get_args

import torch

from safelight.bench.core.harness import interleave
from safelight.bench.core.results import make_record
from safelight.bench.counting.profiled import allocated_peak
from safelight.bench.measure.optimizers import held_bytes, offered
from safelight.bench.recipes.suite import OURS, build, free
from safelight.bench.recipes.workload import Ours, Workload, config_of, random_batches
from safelight.data.batches import Batch
from safelight.errors import UserError
from safelight.trainer.config.schema import Train
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, FRAGMENTATION, this_card
from safelight.trainer.memory_plan.meta_run import MetaRun, StepTrace
from safelight.trainer.models.base import resolve_base
from safelight.trainer.registry.optimizers import MEMORY_MODES
from safelight.units import GIB, MIB

CARDS_GIB = (4, 6, 8, 12, 16)


def checkpointing_modes() -> tuple[str, ...]:
    """Return the values of train.checkpointing except auto, the one that needs the least memory last."""
    return tuple(value for value in get_args(Train.model_fields["checkpointing"].annotation) if value != "auto")


def context_bytes(device: torch.device) -> int:
    """Return the GPU memory used outside torch's allocator: by the CUDA context, and by other processes."""
    available, total = torch.cuda.mem_get_info(device)
    return max(0, total - available - torch.cuda.memory_reserved(device))


def traced_step(work: Workload) -> StepTrace:
    """Return the memory trace of a step on meta tensors, from which `safelight plan` predicts."""
    run = MetaRun(config_of(work), resolve_base(work.base), torch.device(work.device), work.dtype)
    # the first step creates the optimizer's states
    return [run.step(work.batch_size, work.latent_size, work.latent_size) for _ in range(2)][1]


def streamed_bytes(trainer: Ours, batch: Batch) -> dict:
    """Return the MiB of weights that a step copies to the device and back, in memory mode streamed; else nothing."""
    if (stream := trainer.optimizer.stream) is None:
        return {}
    stream.reset_counts()
    trainer.step(batch)
    return {
        "weights_in_mib": round(stream.bytes_inward / MIB, 2),
        "weights_out_mib": round(stream.bytes_outward / MIB, 2),
    }


def try_step(work: Workload) -> dict | None:
    """Return the peak memory in GiB and the time of a step on a GPU, or None if it runs out of memory."""
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
        **streamed_bytes(trainer, batches[0]),
    }


def step_on_emulated_card(work: Workload, card_gib: int, context: int) -> dict | None:
    """Return try_step's figures on an emulated card. context: bytes of the CUDA context."""
    device = torch.device(work.device)
    total = torch.cuda.get_device_properties(device).total_memory
    # for the current device: this function does not accept a torch.device without an index
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card_gib * GIB - context) / total))
    try:
        return try_step(work)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free(device)


def measure_on_gpu(work: Workload) -> dict:
    """Return the peak memory of a step without a limit, and the smallest emulated card on which it runs."""
    device = torch.device(work.device)
    context = context_bytes(device)
    total = torch.cuda.get_device_properties(device).total_memory
    peaks = try_step(work)
    free(device)
    if peaks is None:
        return {"fits": False}
    traced = traced_step(work)
    allocated, workspace = traced.peak.total, this_card(device).workspace(is_deterministic=False)
    needed = CONTEXT_BYTES + workspace + allocated + FRAGMENTATION * traced.transient
    measured = GIB * peaks["reserved_gib"] + context
    figures = {
        "fits": True,
        **peaks,
        "predicted_allocated_gib": round(allocated / GIB, 3),
        "predicted_needed_gib": round(needed / GIB, 3),
        "allocated_to_predicted": round(GIB * peaks["allocated_gib"] / allocated, 4),
        "needed_to_predicted": round(measured / needed, 4),
        "context_gib": round(context / GIB, 3),
        "smallest_card_gib": None,
    }
    for card in CARDS_GIB:
        # a smaller card cannot hold what is allocated at the peak; it may do with less reserved memory
        if card * GIB > total or card < figures["allocated_gib"] + figures["context_gib"]:
            continue
        if (on_card := step_on_emulated_card(work, card, context)) is not None:
            return {**figures, "smallest_card_gib": card, "step_ms_there": on_card["step_ms"]}
    return figures


def measure_on_cpu(work: Workload) -> dict:
    """Return the MiB held between steps, and what a step adds at its peak according to the allocator."""
    trainer, (batch,) = build(OURS, work), random_batches(1, work)
    # the first step creates the moments
    trainer.step(batch)
    held = held_bytes(trainer.optimizer, trainer.unet)
    peak = allocated_peak(lambda: trainer.step(batch))
    transient = traced_step(work).transient
    return {
        "held_mib": round(held / MIB, 2),
        "step_mib": round(peak / MIB, 2),
        "peak_mib": round((held + peak) / MIB, 2),
        "predicted_step_mib": round(transient / MIB, 2),
        "step_to_predicted": round(peak / transient, 4),
        **streamed_bytes(trainer, batch),
    }


def bench_memory(work: Workload, optimizers: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yield a result line for each optimizer, memory mode and checkpointing mode.

    optimizers: names or memory modes as given to --optimizer; empty: all. A combination that cannot run here yields a
    line with the reason. Raises UserError for an unknown optimizer.
    """
    work = work.resolved()
    names = tuple(offered(work.dtype))
    for pattern in optimizers:
        if not any(pattern in (name, *name.split(", ")) for name in names):
            if work.dtype == torch.float32 and pattern in MEMORY_MODES:
                raise UserError(
                    f"--optimizer {pattern} is a memory mode of 16-bit weights, and these are fp32; add "
                    "--precision bf16"
                )
            known = dict.fromkeys(part for name in names for part in name.split(", "))
            raise UserError(f"unknown optimizer {pattern!r}; use {', '.join(known)}, or both as in '{names[0]}'")
    chosen = [n for n in names if not optimizers or any(pattern in (n, *n.split(", ")) for pattern in optimizers)]
    device = torch.device(work.device)
    for optimizer in chosen:
        for checkpointing in checkpointing_modes():
            one = replace(work, optimizer=optimizer, checkpointing=checkpointing)
            try:
                figures = measure_on_gpu(one) if device.type == "cuda" else measure_on_cpu(one)
            except (UserError, NotImplementedError) as error:
                # a setting that this device does not support, or an operator that a library lacks for it
                figures = {"cannot": str(error).splitlines()[0][:160]}
            free(device)
            yield make_record("memory", {"recipe": OURS, **asdict(one)}, figures, device)


def rows(records: list[dict]) -> list[tuple]:
    """Return rows for the terminal, with the three figures of a GPU or of a CPU."""
    rows = []
    for record in records:
        config, figures = record["config"], record["figures"]
        names = ("allocated_gib", "reserved_gib", "smallest_card_gib", "held_mib", "step_mib", "peak_mib")
        cells = [f"{figures[name]:g}" for name in names if figures.get(name) is not None]
        reason = figures.get("cannot", "" if figures.get("fits", True) else "out of memory")
        rows.append((config["optimizer"], config["checkpointing"], *(cells or [reason, "", ""])))
    return rows
