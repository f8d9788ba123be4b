"""A run's memory on its GPU: resolves `auto` settings, caps torch's memory, compares prediction and measurement, and
explains an out-of-memory error."""

from __future__ import annotations

from dataclasses import replace

import torch

from safelight.data.buckets import Bucket
from safelight.errors import UserError
from safelight.kernels.triton.jit import has_triton
from safelight.kernels.unet.checkpointing import MODES
from safelight.trainer.config.schema import Config
from safelight.trainer.memory_plan.candidate import Candidate, EvalBatching, why_no_graphs
from safelight.trainer.memory_plan.communication import ONE_RANK, Ranks
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, Card, this_card
from safelight.trainer.memory_plan.planner import Planner, modes_for
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.units import GIB

# after an out-of-memory error, suggest a plan whose torch allocations are this share smaller: more than predictions
# are off
MARGIN = 0.1


def resolve(
    config: Config,
    device: torch.device,
    recorded: dict | None,
    was_fused: bool | None = None,
    num_processes: int = 1,
) -> tuple[Config, Candidate | None]:
    """Return the config with optimizer.memory, fused_backward and train.checkpointing resolved, and the candidate.

    recorded: the plan that the run to resume wrote (Candidate.to_json), was_fused: how its checkpoint was trained;
    None for a new run. `auto` keeps what they say. num_processes: how many train the run together. On a CPU only
    fused_backward is resolved, and there is no candidate.
    Raises UserError, saying what would fit, if the run does not fit the GPU.
    """
    if device.type != "cuda":
        return _with_fused_as_trained(config, was_fused), None
    ranks = ONE_RANK if num_processes == 1 else Ranks(num_processes, config.distributed.shard)
    return resolve_for(config, this_card(device), recorded, was_fused, ranks)


def resolve_for(
    config: Config,
    card: Card,
    recorded: dict | None = None,
    was_fused: bool | None = None,
    ranks: Ranks = ONE_RANK,
) -> tuple[Config, Candidate]:
    """Like `resolve`, for a given card."""
    config = _with_fused_as_trained(config, was_fused)
    recorded = recorded or {}
    if config.optimizer.memory == "auto" and recorded.get("memory") in _planned_modes(config):
        config.optimizer.memory = recorded["memory"]
    if config.train.checkpointing == "auto" and recorded.get("checkpointing") in MODES:
        config.train.checkpointing = recorded["checkpointing"]
    planner = Planner(config, card, ranks)
    candidate = planner.choose()
    if candidate is None:
        raise UserError(planner.refusal(is_resumed=was_fused is not None))
    candidate = _with_recorded_batching(candidate, recorded.get("between"), planner)
    return filled_in(config, candidate.to_json()), candidate


def filled_in(config: Config, chosen: dict) -> Config:
    """Return a copy of a config with the settings of a chosen candidate (Candidate.to_json)."""
    filled = config.model_copy(deep=True)
    if chosen["memory"] in _planned_modes(config):
        filled.optimizer.memory = chosen["memory"]
    filled.optimizer.fused_backward, filled.train.checkpointing = chosen["fused_backward"], chosen["checkpointing"]
    return filled


def budget(config: Config, device: torch.device) -> int:
    """Return the bytes that a run may use on a GPU; 0 on a CPU."""
    return Planner(config, this_card(device)).budget if device.type == "cuda" else 0


def cap(device: torch.device, limit_gib: float) -> None:
    """Limit torch's allocator to limit_gib minus the CUDA context; 0: no limit. Raises UserError if nothing remains."""
    if not limit_gib or device.type != "cuda":
        return
    allowed = limit_gib * GIB - CONTEXT_BYTES
    if allowed <= 0:
        raise UserError(f"memory.limit_gib {limit_gib:g} is no more than the CUDA context takes; use 4 or more")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def why_no_cuda_graphs(config: Config, device: torch.device, candidate: Candidate | None, budget: int) -> str:
    """Return why a run's steps are not captured as CUDA graphs, '' if they are.

    config: with optimizer.memory and train.checkpointing resolved. budget: bytes that the run may use. Raises
    UserError if train.cuda_graphs is on and graphs are impossible.
    """
    if config.train.cuda_graphs == "off":
        return "train.cuda_graphs is off"
    if candidate is None or device.type != "cuda":
        reason = "graphs need a CUDA device"
    else:
        reason = why_no_graphs(config, candidate, budget) or ("" if has_triton() else "triton is not installed")
    if config.train.cuda_graphs == "on" and reason:
        raise UserError(f"train.cuda_graphs is on, but {reason}; set it to auto")
    return reason


def describe(candidate: Candidate) -> str:
    """Return the line that announces a run's plan."""
    batching = candidate.eval_batching.describe()
    return (
        f"plan: {candidate.needed_bytes / GIB:.2f} GiB of GPU memory, memory mode {candidate.memory}, "
        f"checkpointing {candidate.checkpointing}"
        + (", optimizer step inside backward" if candidate.fused_backward else "")
        + (f", about {candidate.images_per_s:.3g} images/s" if candidate.images_per_s else "")
        + (f"; to fit between steps it {batching}" if batching else "")
    )


def compare(candidate: Candidate, allocated: int, reserved: int) -> str:
    """Return a line with a step's predicted and measured peak. allocated, reserved: bytes of torch's allocator."""
    predicted = candidate.held_bytes + candidate.step_bytes
    return (
        f"peak of a step: predicted {predicted / GIB:.3f} GiB, measured {allocated / GIB:.3f} "
        f"({allocated / predicted - 1:+.1%}); with CUDA context and reserved memory: "
        f"predicted {candidate.needed_bytes / GIB:.3f}, measured {(reserved + CONTEXT_BYTES) / GIB:.3f}"
    )


def out_of_memory(
    config: Config,
    card: Card | None,
    candidate: Candidate | None,
    bucket: Bucket,
    batch_size: int,
    step: int,
    saved_step: int,
) -> str:
    """Return the message that ends a run after an out-of-memory error: where, what is saved, and what to run instead.

    step: 1-based, the one that failed. saved_step: of the last checkpoint, -1 without one.
    """
    saved = f"the checkpoint of step {saved_step} is whole" if saved_step >= 0 else "nothing was saved yet"
    fix = 'lower train.batch_size and raise train.accumulate, or set train.checkpointing = "full"'
    if card is not None and candidate is not None:
        smaller = candidate.needed_bytes - MARGIN * (candidate.held_bytes + candidate.step_bytes)
        planner = Planner(filled_in(config, candidate.to_json()), replace(card, usable_gib=smaller / GIB))
        if fitting := planner.what_would_fit(is_resumed=saved_step >= 0):
            fix = f"the plan needs {fitting.needed_bytes / GIB:.2f} GiB with {fitting.options()}"
        elif fitting := planner.what_would_fit():
            fix = (
                "this run cannot resume with less memory; a new run needs "
                f"{fitting.needed_bytes / GIB:.2f} GiB with {fitting.options()}"
            )
    return (
        f"the GPU's memory was full in step {step}, bucket {bucket.width} x {bucket.height}, batch size {batch_size}; "
        f"{saved}; {fix}"
    )


def _planned_modes(config: Config) -> tuple[str, ...]:
    """Return the values of optimizer.memory that a plan chooses among."""
    return modes_for(config, OPTIMIZERS[config.optimizer.name].planned_modes)


def _with_fused_as_trained(config: Config, was_fused: bool | None) -> Config:
    """Return a copy of a config with optimizer.fused_backward auto resolved to a checkpoint's; None: no checkpoint."""
    copy = config.model_copy(deep=True)
    if was_fused in config.optimizer.fused_choices():
        copy.optimizer.fused_backward = was_fused
    return copy


def _with_recorded_batching(candidate: Candidate, recorded: object, planner: Planner) -> Candidate:
    """Return a candidate that validates and samples as the run to resume did, if that still fits.

    recorded: EvalBatching.to_json, or anything if environment.json is damaged.
    """
    try:
        batching = EvalBatching.from_json(recorded)
        if batching == candidate.eval_batching:
            # without the traces of validation and sampling
            return candidate
        peak_bytes = planner.estimator.eval_peak(candidate.held_bytes, batching)
    except (TypeError, ValueError):
        return candidate
    if peak_bytes > planner.budget:
        return candidate
    return replace(candidate, eval_batching=replace(batching, peak_bytes=peak_bytes))
