"""Resolves every `auto` of a run's settings, and checks what can be checked before hours of encoding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.data.cache import Sample
from safelight.data.decode_memory import available_bytes, swap_bytes
from safelight.errors import UserError
from safelight.kernels.triton.jit import has_triton
from safelight.kernels.unet.attention import allowed_backends
from safelight.trainer.adapters.counting import num_saved_values
from safelight.trainer.checkpoint.changed_settings import epochs_before, from_weights
from safelight.trainer.checkpoint.files import check_files, folder_of, max_bytes_of, read_identity, read_position
from safelight.trainer.checkpoint.identity import PLACES, STAGED, Difference, Identity, identify
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import load_config
from safelight.trainer.distributed.world import ALONE, World
from safelight.trainer.inference.prompt_file import check_prompts
from safelight.trainer.loading.disk_space import check_space
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.resolve_auto import budget, cap, resolve, why_no_cuda_graphs
from safelight.trainer.memory_plan.static_bytes import StaticBytes, static_bytes
from safelight.trainer.models.base import Base, base_of, check_vae, latent_factor, vae_config
from safelight.trainer.models.base_record import UNET, base_record, changed_training, is_same_unet
from safelight.trainer.models.device import PRECISIONS, pick_device, pick_dtype, pick_vae_dtype
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.models.timesteps import timestep_range
from safelight.trainer.models.weights import check_unet
from safelight.trainer.optim.optimizer import check_library, check_package, memory_mode
from safelight.trainer.run_log.boards import import_tensorboard
from safelight.trainer.run_log.environment import BASE, MEMORY_PLAN, recorded
from safelight.trainer.run_log.wandb_board import check_wandb
from safelight.units import GIB


@dataclass(frozen=True)
class ResolvedRun:
    """A run's settings, resolved for its device.

    user_config: the config as the user wrote it. config: the same with `auto` resolved for memory mode, checkpointing
    and fused backward. resume_step: step of the checkpoint to resume from, None for a new run. plan: predicted GPU
    memory, None on a CPU. no_graphs: why steps are not replayed as CUDA graphs, '' if they are.
    """

    user_config: Config
    config: Config
    run_dir: Path
    resume_step: int | None
    device: torch.device
    dtype: torch.dtype
    base: Base
    schedule: NoiseSchedule
    plan: Candidate | None
    no_graphs: str

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return PRECISIONS[self.dtype]

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the checkpoint to resume from, None for a new run."""
        return None if self.resume_step is None else folder_of(self.run_dir, self.resume_step)

    @functools.cached_property
    def base_record(self) -> dict:
        """What is recorded of the base; reads the UNet's files when it is first asked for."""
        config = self.user_config
        return base_record(self.base, config.model.vae, config.run.seed, self.schedule)

    @functools.cached_property
    def static(self) -> StaticBytes:
        """The exact bytes of weights, moments and gradients; builds the UNet without memory when first asked for."""
        return static_bytes(self.config, self.device, self.dtype)

    @property
    def recorded_base(self) -> dict:
        """What was recorded of the base when the run was started; {} if nothing was, or for a new run."""
        before = None if self.resume_step is None else recorded(self.run_dir, BASE)
        return before if before is not None and UNET in before else {}

    def identity(self, samples: Sequence[Sample] = ()) -> Identity:
        """Return the run's identity. samples: the training samples, if known yet."""
        return identify(self.config, self.precision, samples)


def resolve_run(config: Config, run_dir: Path, resume_step: int | None, world: World = ALONE) -> ResolvedRun:
    """Return the run with every `auto` resolved, and apply memory.limit_gib to torch's allocator.

    The main process chooses, and the others do as it does, whatever their GPUs would allow.
    Raises UserError for settings that contradict each other, a base that cannot be trained, or a run too large for the
    GPU.
    """
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.model.precision, device)
    memory_mode(config.optimizer, dtype, device)
    base = base_of(config.model)
    previous, was_fused = None, None
    if resume_step is not None:
        previous, was_fused = recorded(run_dir, MEMORY_PLAN), read_identity(run_dir, resume_step)[0].is_fused
    if world.is_main:
        resolved, plan = resolve(config, device, previous, was_fused, world.size)
    chosen = world.from_main(plan.to_json() if world.is_main and plan is not None else None)
    if not world.is_main:
        resolved, plan = resolve(config, device, chosen, was_fused, world.size)
    vae_dtype = pick_vae_dtype(config.model.vae_precision, device, base.family.vae_allows_fp16)
    resolved = resolved.model_copy(
        update={"model": resolved.model.model_copy(update={"vae_precision": PRECISIONS[vae_dtype]})}
    )
    cap(device, config.memory.limit_gib)
    no_graphs = why_no_cuda_graphs(resolved, device, plan, budget(config, device))
    schedule = base.noise_schedule(config.loss.prediction, config.loss.zero_terminal_snr)
    return ResolvedRun(config, resolved, run_dir, resume_step, device, dtype, base, schedule, plan, no_graphs)


def check_early(run: ResolvedRun) -> str:
    """Return a note about the base, '' if there is nothing to say about it.

    Raises UserError for what loading would otherwise reject only after hours of encoding.
    """
    if run.user_config.log.tensorboard:
        import_tensorboard()
    check_wandb(run.user_config)
    check_library(run.user_config.optimizer)
    if run.config.adapter.quantized_base:
        check_package(f"adapter.base {run.config.adapter.base}", "bitsandbytes", "full")
    check_vae(run.base, run.user_config.model.vae)
    check_unet(run.base)
    for stage in run.user_config.stages():
        timestep_range(stage.config.loss, run.schedule.num_timesteps)
    factor = latent_factor(vae_config(run.base, run.user_config.model.vae))
    check_prompts(run.user_config, factor, run.schedule.zero_terminal_snr)
    allowed_backends(run.device, run.dtype, run.user_config.model.attention)
    if run.device.type == "cuda":
        has_triton()
    note = ""
    if run.resume_step is not None:
        _check_settings(run)
        note = _check_base(run)
        check_files(run.checkpoint, max_bytes=max_bytes_of(num_saved_values(run.config, run.base)))
    _check_host_memory(run)
    check_space(run.run_dir, run.static.checkpoint)
    return note


def _check_settings(run: ResolvedRun) -> None:
    """Raise UserError if the checkpoint to resume from was trained with other settings. The base may have moved."""
    checkpoint, stage = read_identity(run.run_dir, run.resume_step)
    position = read_position(run.run_dir, run.resume_step)
    begun = position.epoch - epochs_before(checkpoint, position, stage) + (position.step_in_epoch > 0)
    difference = run.identity().difference(checkpoint, stage, num_epochs=begun)
    may_have_moved = difference is not None and difference.name in PLACES and bool(run.recorded_base)
    if may_have_moved and is_same_unet(run.recorded_base, run.base_record):
        difference = run.identity().difference(checkpoint, stage, PLACES, begun)
    if difference is not None:
        raise UserError(
            f"checkpoint {run.checkpoint} belongs to other settings: {difference.text}; {_advice(run, difference)}, or "
            f"start a new run with --run.dir{_from_weights(run)}"
        )


def _from_weights(run: ResolvedRun) -> str:
    way = from_weights(run.user_config, run.run_dir, run.resume_step)
    return f"; {way}" if way.startswith("a new run") else ""


def _advice(run: ResolvedRun, difference: Difference) -> str:
    """Return what to do so that a run has the setting of its checkpoint."""
    path = run.run_dir / "config.toml"
    if difference.name in PLACES:
        known = "is not the model that" if run.recorded_base else "cannot be told from another model than"
        return (
            f"what it names now {known} the run was started with: move that one back to {difference.value}"
            + f", or set {difference.name} to where it is" * bool(run.recorded_base)
        )
    try:
        in_file: Identity | None = identify(load_config(path), run.precision)
    except UserError:
        in_file = None
    if in_file is None or in_file.value_of(difference) != run.identity().value_of(difference):
        return f"resume with {path}"
    # that file says so itself: it was edited
    if not difference.value:
        return f"put it back into {path}" if not difference.name else f"resume with the version that wrote {path}"
    if difference.stage is None:
        return f"set {difference.name} = {difference.value} in {path}"
    if run.user_config.stage:
        return f"set {difference.name} = {difference.value} in [[stage]] {difference.stage + 1} of {path}"
    table = next(table for table, names in STAGED.items() if difference.name in names)
    return f"set {table}.{difference.name} = {difference.value} in {path}"


def _check_base(run: ResolvedRun) -> str:
    """Return a note if the base's UNet is not that of the run's start; raise UserError if training would go on
    differently. Runs that recorded nothing of their base are not checked."""
    before = run.recorded_base
    if not before:
        return ""
    spec = run.user_config.model.base
    if changed := changed_training(before, run.base_record):
        raise UserError(
            f"model.base {spec!r} is not the model that the run was started with: {changed}; put that one back, or "
            "start a new run with --run.dir"
        )
    if is_same_unet(before, run.base_record):
        return ""
    return (
        f"the UNet of model.base {spec!r} is not the one that the run was started with: training goes on from the "
        "checkpoint as if it were, but pictures of the base are another model's; put the first one back"
    )


def _check_host_memory(run: ResolvedRun) -> None:
    """Raise UserError if the run needs more host memory than there is, even swapped: the system would kill it."""
    available = available_bytes()
    if available is None:
        return
    available += swap_bytes()
    if run.plan is not None and run.plan.host is not None:
        host = run.plan.host
        # without the checkpoint's copy, which is freed after each save if memory is scarce
        needed = max(host.loading, host.states + host.weights + host.activations + host.autoencoder)
        advice = "or use --optimizer.memory near and --train.checkpointing full, which stream nothing from it"
    elif run.device.type == "cpu":
        # on a CPU nothing is anywhere else
        needed, advice = run.static.total + run.static.paged + run.static.streamed, "or train a smaller model"
    else:
        return
    if needed > available:
        raise UserError(
            f"the run needs {needed / GIB:.1f} GiB of the computer's memory and more for each step, but only "
            f"{available / GIB:.1f} GiB are free, swap included, so the system would kill it; close other programs, "
            f"{advice}"
        )
