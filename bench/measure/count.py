"""`safelight bench count`: launches, bytes, FLOPs and syncs of one training step, traced on meta tensors."""

from __future__ import annotations

import time

import torch
from torch import nn

from safelight.bench.core.arguments import Count
from safelight.bench.core.operators import CLASSES
from safelight.bench.counting.counters import MIB, CardOperators, CountedUpdates, Counter, Counts, SavedBytes
from safelight.bench.recipes.workload import LR, MAX_GRAD_NORM, WEIGHT_DECAY, Workload, random_batches
from safelight.errors import UserError
from safelight.kernels.ops.noising import Noised
from safelight.kernels.unet import patch
from safelight.kernels.unet.attention import NUM_TEXT_TOKENS, attention_cases, choose_attention
from safelight.kernels.unet.checkpointing import apply_checkpointing
from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.families.registry import family_of
from safelight.trainer.models.base import Base, resolve_base
from safelight.trainer.models.device import DTYPES
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.models.weights import meta_unet
from safelight.trainer.optim.library_optimizer import BitsandbytesOptimizer
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer
from safelight.trainer.step.step import accumulate

# result lines call bitsandbytes' optimizer adamw8bit: they are older than our kernel of that name
COUNTED = {"adamw8bit": "bnb_adamw8bit", "adamw": "adamw"}


def weight_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the weights: fp32 under autocast."""
    return torch.float32 if precision.startswith("autocast") else DTYPES[precision]


def meta_inputs(unet: nn.Module, batch_size: int, side: int, layout: str) -> tuple[Noised, TextConditioning]:
    """Return a step's noised latents and conditioning on the meta device, with the model's shapes."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    rows = torch.empty(batch_size, unet.config.in_channels, side, side, device="meta").to(memory_format=memory_format)
    noised = Noised(rows, torch.empty_like(rows), torch.empty(batch_size, dtype=torch.int64, device="meta"))
    text = torch.empty(batch_size, NUM_TEXT_TOKENS, unet.config.cross_attention_dim, device="meta")
    return noised, family_of(unet.config).stand_in_conditioning(unet.config, text, (side, side))


def count_step(
    unet: nn.Module,
    noised: Noised,
    conditioning: TextConditioning,
    schedule: NoiseSchedule,
    layout: str,
    autocast: torch.dtype | None = None,
    optimizer: UNetOptimizer | None = None,
) -> Counts:
    """Return the counts of one step: loss and gradients as in training, then the optimizer step if one is given."""
    counter, saved, updates = Counter(layout), SavedBytes(unet.parameters()), CountedUpdates()
    scale = torch.ones((), device=noised.noisy_BCHW.device) if optimizer is None else optimizer.loss_scale.scale
    operators = CardOperators(autocast)
    with operators, counter:
        with saved:
            accumulate(unet, noised, conditioning, schedule, Loss(), len(noised.timesteps_B), scale)
        if optimizer is not None:
            counter.phase = "optimizer"
            optimizer.set_hyper(LR, WEIGHT_DECAY, MAX_GRAD_NORM)
            if isinstance(optimizer, BitsandbytesOptimizer):
                optimizer.on_meta_update = updates
            optimizer.step()
            counter.counts.host_syncs += updates.num_syncs
    counter.counts.saved_bytes = saved.total
    counter.counts.saved_cast_bytes = saved.of(operators.casts.values())
    return counter.counts


def trace(
    base: Base,
    *,
    latent_size: int = 0,
    batch_size: int = 1,
    precision: str = "bf16",
    layout: str = "nchw",
    checkpointing: str = "none",
    optimizer: str = "none",
    patched: bool = False,
) -> Counts:
    """Return the counts of a base's training step, traced on meta tensors.

    precision: fp32 | bf16 | fp16 | autocast-bf16 | autocast-fp16. optimizer: none | adamw | adamw8bit. patched: use our
    kernels, which require channels-last; attention is then assumed to be flash. Raises UserError for a combination that
    cannot be counted.
    """
    unet = meta_unet(base).to(weight_dtype(precision)).train()
    if patched and (layout != "channels_last" or precision.startswith("autocast")):
        raise UserError(f"--patched requires --layout channels_last without autocast, not {layout}, {precision}")
    if checkpointing == "selective" and not patched:
        raise UserError("selective checkpointing can only be counted with --patched; use it, or none or full")
    if layout == "channels_last":
        unet = unet.to(memory_format=torch.channels_last)
    if patched:
        # on meta tensors SDPA saves the same tensors as a GPU's
        choice = choose_attention(torch.device("meta"), weight_dtype(precision), attention_cases(unet), setting="sdpa")
        patch.apply(unet, choice)
    apply_checkpointing(unet, checkpointing)
    autocast = DTYPES[precision.removeprefix("autocast-")] if precision.startswith("autocast") else None
    ours = None
    if optimizer != "none":
        ours = make_optimizer(unet, Optimizer(name=COUNTED[optimizer]))
        # the first step makes the moments; a counter answers for the finite norm that it asks of the device
        for p in unet.parameters():
            p.grad = torch.empty_like(p)
        with Counter(layout):
            ours.set_hyper(LR, WEIGHT_DECAY, MAX_GRAD_NORM)
            ours.step()
    inputs = meta_inputs(unet, batch_size, latent_size or unet.config.sample_size, layout)
    schedule = base.noise_schedule().to(torch.device("meta"))
    return count_step(unet, *inputs, schedule, layout, autocast, ours)


def figures(counts: Counts) -> dict:
    """Return the counts as plain values. launches and memory_bound_gb are totals without the optimizer."""
    rows = {
        kind: {"operators": row.operators, "launches": row.launches, "gb": round(row.bytes_moved / 1e9, 5)}
        for kind in CLASSES
        if (row := counts.rows.get(kind))
    }
    return {
        "launches": counts.total("launches", with_optimizer=False),
        "memory_bound_gb": round(counts.total("bytes_moved", with_optimizer=False) / 1e9, 4),
        "saved_mib": round(counts.saved_bytes / MIB, 1),
        "saved_casts_mib": round(counts.saved_cast_bytes / MIB, 1),
        "forward_gflop": round(counts.flops_forward / 1e9, 3),
        "step_gflop": round(counts.flops_total / 1e9, 3),
        "host_syncs": counts.host_syncs,
        "classes": rows,
    }


def config_of(options: Count) -> dict:
    """Return the config of a result line."""
    return {
        "base": options.base,
        "latent_size": options.latent_size,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "layout": options.layout,
        "checkpointing": options.checkpointing,
        "optimizer": options.optimizer,
        # older lines lack the field, and must stay comparable
        **({"patched": True} if options.patched else {}),
    }


def count(options: Count) -> tuple[dict, float]:
    """Return (figures, seconds that counting took)."""
    began = time.perf_counter()
    config = config_of(options)
    counts = trace(resolve_base(config.pop("base")), **config)
    return figures(counts), time.perf_counter() - began


def profile_count(options: Count) -> dict:
    """Run the same step on this machine and return the profiler's figures; see counting/profiled.py."""
    from safelight.bench.counting.profiled import profile_step
    from safelight.bench.recipes.suite import OURS, build

    is_autocast = options.precision.startswith("autocast-")
    if options.layout != "nchw" or options.optimizer == "none":
        raise UserError(
            "--profile runs the real training step, which needs --layout nchw and an optimizer, "
            f"not {options.layout}, {options.optimizer}"
        )
    work = Workload(
        options.base,
        options.latent_size,
        options.batch_size,
        options.precision.removeprefix("autocast-"),
        options.optimizer,
        options.checkpointing,
    ).resolved()
    trainer = build("diffusers" if is_autocast else OURS, work)
    (batch,) = random_batches(1, work)
    return profile_step(lambda: trainer.step(batch), torch.device(work.device))


def table_rows(figures: dict, profiled: dict | None = None) -> tuple[tuple[str, ...], list[tuple]]:
    """Return (columns, rows) for the terminal: the counted figures, and the profiler's next to them if given."""
    columns = ("class", "operators", "launches", "GB moved")
    if profiled:
        columns += ("profiled launches", "profiled ms")
    rows = []
    for kind, row in figures["classes"].items():
        cells = (kind, f"{row['operators']:,}", f"{row['launches']:,}", f"{row['gb']:.3f}")
        if profiled:
            measured = profiled["classes"].get(kind, {"launches": 0, "ms": 0.0})
            cells += (f"{measured['launches']:,}", f"{measured['ms']:.2f}")
        rows.append(cells)
    blank = ("", "") if profiled else ()
    rows.append(("sum without optimizer", "", f"{figures['launches']:,}", f"{figures['memory_bound_gb']:.3f}", *blank))
    if profiled:
        # the profiler counts the optimizer's elementwise kernels as elementwise, so it has no sum without them
        rows.append(("sum with optimizer", "", "", "", f"{profiled['launches']:,}", f"{profiled['device_ms']:.2f}"))
    return columns, rows
