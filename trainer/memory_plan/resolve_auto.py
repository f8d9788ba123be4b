"""A run's memory on the GPU it runs on: what `auto` comes to there, the cap, prediction beside measurement, and what to do
when the memory is full."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from safelight.data.buckets import Bucket
from safelight.errors import UserError
from safelight.kernels.triton.jit import has_triton
from safelight.kernels.unet.checkpointing import MODES
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.candidate import Between, Need, graphs_against
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, Card, this_card
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.units import GIB

# a plan to fall back on allocates so much less than the one that failed: more than what a plan may be off
MARGIN = 0.1


def settle(
    config: Config, device: torch.device, previous: dict | None, was_fused: bool | None = None
) -> tuple[Config, Need | None]:
    """Return the config with `auto` of optimizer.memory, fused_backward and train.checkpointing filled in, and what that needs.

    previous: what the run that goes on has recorded, was_fused: how its checkpoint was trained; both are kept. On a CPU
    nothing else is filled in. Raises UserError, with what would fit, where the GPU cannot hold the run.
    """
    if device.type != "cuda":
        return _as_trained(config, was_fused), None
    return settle_on(config, this_card(device), previous, was_fused)


def settle_on(
    config: Config, card: Card, previous: dict | None = None, was_fused: bool | None = None
) -> tuple[Config, Need]:
    """As settle, for a card."""
    settled = _as_trained(config, was_fused)
    before = previous or {}
    if settled.optimizer.memory == "auto" and before.get("memory") in _planned_modes(config):
        settled.optimizer.memory = before["memory"]
    if settled.train.checkpointing == "auto" and before.get("checkpointing") in MODES:
        settled.train.checkpointing = before["checkpointing"]
    planner = Planner(settled, card)
    need = planner.choose()
    if need is None:
        raise UserError(planner.refusal(is_resumed=was_fused is not None))
    need = _as_before(need, before.get("between"), planner)
    return filled_in(settled, record(need)), need


def filled_in(config: Config, taken: dict) -> Config:
    """Return a config whose `auto` of optimizer.memory, fused_backward and train.checkpointing is what a plan takes (record)."""
    filled = config.model_copy(deep=True)
    if taken["memory"] in _planned_modes(config):
        filled.optimizer.memory = taken["memory"]
    filled.optimizer.fused_backward, filled.train.checkpointing = taken["fused_backward"], taken["checkpointing"]
    return filled


def _planned_modes(config: Config) -> tuple[str, ...]:
    """Return the values of optimizer.memory among which a plan chooses."""
    return OPTIMIZERS[config.optimizer.name].planned_modes


def _as_trained(config: Config, was_fused: bool | None) -> Config:
    """Return a copy of a config whose `auto` of optimizer.fused_backward is as a checkpoint was trained; None: without one."""
    copy = config.model_copy(deep=True)
    if was_fused in config.optimizer.fused_choices():
        copy.optimizer.fused_backward = was_fused
    return copy


def budget(config: Config, device: torch.device) -> int:
    """Return the bytes that a run may take of a GPU; 0 for a CPU."""
    return Planner(config, this_card(device)).budget if device.type == "cuda" else 0


def record(need: Need) -> dict:
    """Return a plan as plain values, for environment.json and for `previous` of settle."""
    return asdict(need)


def describe(need: Need) -> str:
    """Return a line about the plan that a run is started with."""
    return (
        f"plan: {need.needed / GIB:.2f} GiB of the GPU, memory mode {need.memory}, checkpointing {need.checkpointing}"
        + (", stepped inside backward" if need.fused_backward else "")
        + (f", about {need.images_per_s:.3g} images/s" if need.images_per_s else "")
        + (f"; between steps it has room for no more and {told}" if (told := need.between.describe()) else "")
    )


def cap(device: torch.device, limit_gib: float) -> None:
    """Let torch take no more of a GPU than a limit (GiB) less the CUDA context; 0: no limit. Raises UserError below that."""
    if not limit_gib or device.type != "cuda":
        return
    allowed = limit_gib * GIB - CONTEXT_BYTES
    if allowed <= 0:
        raise UserError(f"memory.limit_gib {limit_gib:g} is no more than the CUDA context takes; use 4 or more")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def compare(need: Need, allocated: int, reserved: int) -> str:
    """Return the predicted peak of a step beside the measured one (bytes, of torch's allocator)."""
    predicted = need.held + need.step
    return (
        f"a step's peak: predicted {predicted / GIB:.3f} GiB, measured {allocated / GIB:.3f} ({allocated / predicted - 1:+.1%}); "
        f"with context and reserve: predicted {need.needed / GIB:.3f}, measured {(reserved + CONTEXT_BYTES) / GIB:.3f}"
    )


def out_of_memory(
    config: Config, card: Card | None, need: Need | None, bucket: Bucket, batch_size: int, step: int, saved_step: int
) -> str:
    """Return the line that ends a run whose step (1-based) did not fit: where, what is kept, what to go on with."""
    kept = f"the checkpoint of step {saved_step} is whole" if saved_step >= 0 else "nothing was saved yet"
    fix = 'lower train.batch_size and raise train.accumulate, or set train.checkpointing = "full"'
    if card is not None and need is not None:
        budget = need.needed - MARGIN * (need.held + need.step)
        planner = Planner(filled_in(config, record(need)), replace(card, usable_gib=budget / GIB))
        found = planner.what_would_fit(is_resumed=saved_step >= 0)
        if found is not None:
            fix = f"{found.needed / GIB:.2f} GiB are planned with {found.settings()}"
        elif (found := planner.what_would_fit()) is not None:
            fix = f"this run cannot go on in less; a new one is planned at {found.needed / GIB:.2f} GiB with {found.settings()}"
    return f"the GPU's memory was full in step {step}, bucket {bucket.width} x {bucket.height}, batch size {batch_size}; {kept}; {fix}"


def _as_before(need: Need, recorded: object, planner: Planner) -> Need:
    """Return a need whose validation and drawing are done as a run has recorded them, where that still fits."""
    try:
        kept = Between(**recorded)
        most = planner.most_between(need.held, kept)
    except (TypeError, ValueError):
        return need
    return replace(need, between=replace(kept, most=most)) if most <= planner.budget else need


def reason_against(config: Config, device: torch.device, need: Need | None, budget: int) -> str:
    """Return why a run's steps are not recorded as CUDA graphs, '' where they are.

    config: with `auto` of optimizer.memory and train.checkpointing settled. need: what is planned of the GPU; budget: bytes
    that the run may take of it. Raises UserError where train.cuda_graphs is on and cannot be.
    """
    if config.train.cuda_graphs == "off":
        return "train.cuda_graphs is off"
    if need is None or device.type != "cuda":
        reason = "they need a CUDA device"
    else:
        reason = graphs_against(config, need, budget) or ("" if has_triton() else "triton is not installed")
    if config.train.cuda_graphs == "on" and reason:
        raise UserError(f"train.cuda_graphs is on, but {reason}; set it to auto")
    return reason
