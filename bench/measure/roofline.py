"""`safelight bench roofline`: how close a training step comes to the device's ceilings, by class of operator.

FLOPs and bytes are counted by tracing the step on meta tensors. The ceilings are measured on this device. The time of
the step is measured without a profiler, and the time of each class of operators with one. For a card that is not here,
the ceilings come from its data sheet and nothing is measured.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from safelight.bench.core.ceilings import ceilings
from safelight.bench.core.harness import interleave, percentiles
from safelight.bench.core.results import make_record
from safelight.bench.counting.costs import Cost, Costs, step_costs
from safelight.bench.profile.analysis import IDLE, Analysis, analyse
from safelight.bench.profile.profiling_session import profile_loop
from safelight.bench.recipes.suite import OURS, build, free
from safelight.bench.recipes.workload import NUM_ROTATED, Workload, config_of, random_batches
from safelight.errors import UserError
from safelight.trainer.memory_plan.gpus import Card
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.device import PRECISIONS

CLASSES = ("conv", "linear", "attention", "norm", "elementwise", "optimizer", "copies")
# bases whose step takes only seconds on a CPU; others are not measured there
CPU_BASES = ("tiny",)


def _traced(work: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Costs, int]:
    """Return (costs of a step on a device, FLOPs of the model without recomputation by checkpointing)."""
    run = MetaRun(config_of(work), resolve_base(work.base), device, dtype)
    costs = step_costs(run, work.batch_size, work.latent_size, work.latent_size)
    model_flops = sum(cost.flops for cost in costs.values())
    if work.checkpointing != "none":
        run.checkpoint("none")
        without_recompute = step_costs(run, work.batch_size, work.latent_size, work.latent_size)
        model_flops = sum(cost.flops for cost in without_recompute.values())
    return costs, model_flops


def _measured(work: Workload, repeats: int, num_steps: int, limits: dict, costs: Costs) -> tuple[list[float], Analysis]:
    """Return (seconds of each step without a profiler, analysis of further steps under the profiler)."""
    device = torch.device(work.device)
    trainer, batches = build(OURS, work), random_batches(NUM_ROTATED, work)
    seconds = interleave({"": lambda n: trainer.step(batches[n % NUM_ROTATED])}, device, repeats)[""]

    def loop(after_step: Callable[[], bool]) -> None:
        for batch in itertools.cycle(batches):
            trainer.step(batch)
            after_step()

    with tempfile.TemporaryDirectory(prefix="safelight-roofline-") as folder:
        session = profile_loop(loop, num_steps, device, Path(folder))
    # use the costs traced on meta tensors, which include our kernels
    analysis = analyse(replace(session, costs=costs, unprofiled_ms=1e3 * percentiles(seconds)[1]), limits)
    return seconds, analysis


def _by_class(costs: Costs, limits: dict, analysis: Analysis | None) -> dict[str, dict]:
    """Return the figures of each class: calls, FLOPs, bytes, roofline time and, if measured, its time and idle time."""
    classes = {}
    for kind in CLASSES:
        of_kind = [cost for cost in costs.values() if cost.kind == kind]
        total = Cost(kind, sizes=sum((cost.sizes for cost in of_kind), Cost().sizes))
        row = {
            "calls": total.calls,
            "gflop": round(total.flops / 1e9, 3),
            "gb": round(total.num_bytes / 1e9, 4),
            "least_ms": round(total.roofline_ms(limits), 4),
        }
        if analysis is not None:
            ms = analysis.kinds.get(kind, 0.0)
            row |= {"ms": round(ms, 4), "share_of_limit": round(total.roofline_ms(limits) / ms, 4) if ms else None}
        classes[kind] = row
    if analysis is not None:
        idle = IDLE["cuda" if "idle" in analysis.kinds else "cpu"]
        classes[idle] = {"ms": round(analysis.kinds[idle], 4)}
    return classes


def _card_limits(card: Card) -> dict:
    if card.tflops is None or card.bandwidth_gb_s is None:
        raise UserError(
            f"the compute rate and bandwidth of {card.name} are unknown; use a card by name: t4, rtx3060, rtx4090, a100"
        )
    return {"matmul_tflops": card.tflops, "copy_gb_per_s": card.bandwidth_gb_s}


def roofline(work: Workload, repeats: int = 20, num_steps: int = 5, card: Card | None = None) -> dict:
    """Return the result line. card: a card that is not here, to predict for instead of measuring.

    Raises UserError for a card whose rates are unknown, or below 1 repeat or step.
    """
    if min(repeats, num_steps, work.batch_size) < 1:
        raise UserError(f"batch size {work.batch_size}, repeats {repeats} and steps {num_steps} must be 1 or more")
    if card is not None:
        dtype, limits = card.dtype, _card_limits(card)
        side = work.latent_size or resolve_base(work.base).config_of("unet")["sample_size"]
        work = replace(work, latent_size=side, precision=PRECISIONS[dtype], device="cuda")
    else:
        work = work.resolved()
        dtype = work.dtype
        limits = ceilings(torch.device(work.device), dtype, small=work.device == "cpu")
    costs, model_flops = _traced(work, torch.device(work.device), dtype)
    flops = sum(cost.flops for cost in costs.values())
    figures = {
        **limits,
        "step_gflop": round(flops / 1e9, 3),
        "model_gflop": round(model_flops / 1e9, 3),
        "moved_gb": round(sum(cost.num_bytes for cost in costs.values()) / 1e9, 4),
        "least_ms": round(sum(cost.roofline_ms(limits) for cost in costs.values()), 4),
    }
    analysis = None
    config = {**asdict(work), "ceilings": "measured" if card is None else f"{card.name}'s data sheet"}
    if card is None and (work.device == "cuda" or work.base in CPU_BASES):
        config |= {"repeats": repeats, "steps": num_steps}
        try:
            seconds, analysis = _measured(work, repeats, num_steps, limits, costs)
        except torch.cuda.OutOfMemoryError as error:
            figures |= {"fits": False, "why": str(error).splitlines()[0][:120]}
        free(torch.device(work.device))
    if analysis is not None:
        step_ms = [1e3 * s for s in percentiles(seconds)]
        figures |= {
            "step_ms": [round(ms, 3) for ms in step_ms],
            "profiled_step_ms": round(analysis.step_ms, 3),
            "images_per_s": round(1e3 * work.batch_size / step_ms[1], 3),
            "launches": round(analysis.launches),
            # the model's FLOPs, and all FLOPs including recomputation
            "model_flop_use": {"share_of_limit": round(model_flops / step_ms[1] / limits["matmul_tflops"] / 1e9, 4)},
            "flop_use": {"share_of_limit": round(flops / step_ms[1] / limits["matmul_tflops"] / 1e9, 4)},
        }
    figures["classes"] = _by_class(costs, limits, analysis)
    return make_record(
        "roofline", config, figures, torch.device("cpu") if card is not None else torch.device(work.device)
    )


def table_rows(figures: dict) -> tuple[tuple[str, ...], list[tuple]]:
    """Return (columns, rows) for the terminal."""
    columns = ("class", "calls", "GFLOP", "GB", "roofline ms")
    measured = "step_ms" in figures
    if measured:
        columns += ("measured ms", "of the step", "of the roofline")
    step_ms = sum(row.get("ms", 0.0) for row in figures["classes"].values())
    rows = []
    for kind, row in figures["classes"].items():
        counted = (
            (f"{row['calls']:,}", f"{row['gflop']:,.1f}", f"{row['gb']:.2f}", f"{row['least_ms']:.2f}")
            if "calls" in row
            else ("",) * 4
        )
        timed = ()
        if measured:
            share = row.get("share_of_limit")
            timed = (
                f"{row['ms']:.2f}",
                f"{100 * row['ms'] / step_ms:.0f} %",
                "" if share is None else f"{100 * share:.0f} %",
            )
        rows.append((kind, *counted, *timed))
    total = ("", f"{figures['step_gflop']:,.1f}", f"{figures['moved_gb']:.2f}", f"{figures['least_ms']:.2f}")
    return columns, [*rows, ("whole step", *total, *((f"{step_ms:.2f}", "", "") if measured else ()))]
