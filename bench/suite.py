"""`safelight bench step`: images/s of one optimizer step, without files: model, random rows, noise, backward, AdamW."""

from __future__ import annotations

import torch

from safelight.bench.command import Step
from safelight.bench.harness import interleave, percentiles
from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.kernels.attention import apply_attention, attention_modules, choose_attention, head_dim_of
from safelight.trainer.config import Loss, Optimizer
from safelight.trainer.diffusion import make_schedule
from safelight.trainer.environment import describe
from safelight.trainer.log import peak_memory_gib
from safelight.trainer.models import load_unet, pick_device, pick_dtype, resolve_base
from safelight.trainer.optim import UNetOptimizer
from safelight.trainer.step import train_step

NUM_ROTATED = 4
SEED = 1


def random_batches(num: int, batch_size: int, channels: int, side: int, num_tokens: int, width: int) -> list[Batch]:
    """Return batches of random rows of the true shapes, to be rotated."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        Batch(
            draw(batch_size, channels, side, side),
            draw(batch_size, channels, side, side) - 4,
            draw(batch_size, num_tokens, width),
            tuple(range(n * batch_size, (n + 1) * batch_size)),
            (0,) * batch_size,
            Bucket(side * 8, side * 8),
        )
        for n in range(num)
    ]


def bench_step(options: Step) -> list[dict]:
    """Return a record for each batch size: images/s (p20, p50, p80) and peak memory."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.precision, device)
    base = resolve_base(options.base)
    unet = load_unet(base, SEED, dtype).to(device).train()
    if options.checkpointing == "full":
        unet.enable_gradient_checkpointing()
    attention = choose_attention(device, dtype, {head_dim_of(m) for m in attention_modules(unet)})
    apply_attention(unet, attention)
    optimizer = UNetOptimizer(unet, Optimizer(name=options.optimizer))
    schedule = make_schedule(base.config_of("scheduler")).to(device)
    side = options.latent_size or unet.config.sample_size
    batches = {
        size: random_batches(NUM_ROTATED, size, unet.config.in_channels, side, 77, unet.config.cross_attention_dim)
        for size in options.batch_size
    }

    def step_of(size: int):
        def run(number: int) -> None:
            train_step(
                unet, optimizer, [batches[size][number % NUM_ROTATED]], schedule, 1.0, Loss(),
                seed=SEED, epoch=0, num_samples=size, lr=1e-6, weight_decay=0.01, max_grad_norm=1.0,
            )  # fmt: skip

        return run

    seconds = interleave({str(size): step_of(size) for size in options.batch_size}, device, options.repeats)
    records = []
    for size in options.batch_size:
        slow_to_fast = [size / s for s in percentiles(seconds[str(size)])[::-1]]
        records.append(
            {
                "bench": "step", "base": options.base, "batch_size": size, "latent_size": side,
                "precision": str(dtype).removeprefix("torch."), "optimizer": options.optimizer,
                "checkpointing": options.checkpointing, "repeats": options.repeats,
                "images_per_s_p20_p50_p80": [round(v, 3) for v in slow_to_fast],
                "peak_gib_of_all": round(peak_memory_gib(device), 3), "attention": str(attention), **describe(device),
            }
        )  # fmt: skip
    return records
