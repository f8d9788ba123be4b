"""Measure what 16-bit weights lose at a small learning rate: plain bf16 compared with the memory modes.

    python -m tools.rounding [--append FILE]

Two sets of weights, both starting from bf16 values. `SD1.5 shapes`: random tensors with the shapes and the
initialization of SD1.5's layers and artificial gradients, a constant direction plus noise. `tiny`: the tiny base's UNet
with the gradients of its own loss on random latents and texts. Reported for each mode: the fraction of bf16 weights,
and of stored values (weight and remainder together), that change in a step; the distance of the final values from those
of the fp32 masters, relative to how far the masters moved; and the loss after the last step.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from safelight.bench.core.results import append, make_record
from safelight.kernels.ops.noising import Noised
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.output.show import print_table
from safelight.trainer.config.schema import Loss, Model, Optimizer
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.base import base_of
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.step import accumulate, sample_losses

LR, WEIGHT_DECAY = 1e-6, 0.01
NUM_STEPS = {"SD1.5 shapes": 200, "tiny": 40}
# fp32 first: the others are compared with it
MODES = ("fp32", "exact", "near", "rounded", "plain bf16")
SHAPES = ((320, 4, 3, 3), (320, 320), (320, 768), (320, 1280), (64, 320, 3, 3), (320,))
BATCH, NUM_BATCHES, SEED = 4, 4, 1


def _round_plainly(optimizer: AdamW8bit) -> None:
    """Set the masters to the bf16 weights, as in an optimizer without masters that rounds to nearest."""
    for p, master in zip(optimizer.parameters, optimizer.remainders, strict=True):
        master.copy_(p)


class _Watch:
    """Sums, over the steps, the fractions of weights and of stored values that change."""

    def __init__(self, optimizer: AdamW8bit):
        self.optimizer, self.num_steps, self.weights, self.values = optimizer, 0, 0.0, 0.0
        self.begun = self.last = self.now()

    def now(self) -> tuple[Tensor, Tensor]:
        """Return flat copies of all weights and of all stored values."""
        optimizer = self.optimizer
        values = [optimizer.value(i).flatten() for i in range(len(optimizer.parameters))]
        return torch.cat([p.detach().flatten() for p in optimizer.parameters]), torch.cat(values).clone()

    def step(self) -> None:
        now = self.now()
        self.num_steps += 1
        self.weights += float((now[0] != self.last[0]).float().mean())
        self.values += float((now[1] != self.last[1]).float().mean())
        self.last = now

    def figures(self, true: Tensor | None, begun: Tensor) -> dict[str, float]:
        """Return the figures. true: final fp32 masters, None for the masters themselves. begun: initial fp32 values."""
        figures = {"changed_weights": self.weights / self.num_steps, "changed_values": self.values / self.num_steps}
        if true is not None:
            error = (self.last[1].double() - true.double()).norm()
            figures["noise_to_displacement"] = float(error / (true.double() - begun.double()).norm())
        return figures


def shapes(mode: str) -> tuple[_Watch, Tensor]:
    """Train the SD1.5 shapes in one memory mode. Return the watch and the initial fp32 values."""
    generator = torch.Generator().manual_seed(SEED)
    fan_in = [math.prod(shape[1:]) for shape in SHAPES]
    starts = [torch.randn(s, generator=generator) / math.sqrt(n) for s, n in zip(SHAPES, fan_in, strict=True)]
    # start from bf16 values, as a published 16-bit file would, so that the initial rounding does not count
    starts = [w.bfloat16().float() for w in starts]
    means = [torch.randn(shape, generator=generator) for shape in SHAPES]
    weights = [w.bfloat16() for w in starts]
    optimizer = AdamW8bit(weights, memory="fp32" if mode == "plain bf16" else mode, seed=SEED)
    watch = _Watch(optimizer)
    for _ in range(NUM_STEPS["SD1.5 shapes"]):
        gradients = [(0.3 * m + torch.randn(m.shape, generator=generator)).bfloat16() for m in means]
        optimizer.step(gradients, LR, WEIGHT_DECAY)
        if mode == "plain bf16":
            _round_plainly(optimizer)
        watch.step()
    return watch, torch.cat([w.flatten() for w in starts])


def _random_batch(side: int, width: int, generator: torch.Generator) -> tuple[Noised, TextConditioning]:
    # in the order in which the committed figures drew them
    noisy = torch.randn(BATCH, 4, side, side, generator=generator)
    timesteps = torch.randint(0, 1000, (BATCH,), generator=generator)
    target = torch.randn(BATCH, 4, side, side, generator=generator)
    text = torch.randn(BATCH, 48, width, generator=generator)
    return Noised(noisy, target, timesteps), TextConditioning(text)


def tiny(mode: str) -> tuple[_Watch, Tensor, float]:
    """Train the tiny base's UNet in one memory mode. Return the watch, the initial fp32 values and the final loss."""
    base = base_of(Model())
    unet = load_unet(base, SEED).train()
    with torch.no_grad():
        for p in unet.parameters():
            p.copy_(p.bfloat16())
    begun = torch.cat([p.detach().flatten() for p in unet.parameters()])
    schedule = base.noise_schedule()
    memory = "fp32" if mode == "plain bf16" else mode
    optimizer = make_optimizer(unet, Optimizer(lr=LR, memory=memory), torch.bfloat16, SEED)
    generator = torch.Generator().manual_seed(SEED)
    batches = [
        _random_batch(unet.config.sample_size, unet.config.cross_attention_dim, generator) for _ in range(NUM_BATCHES)
    ]
    optimizer.set_hyper(LR, WEIGHT_DECAY, 0.0)
    watch = _Watch(optimizer.kernel)
    for number in range(NUM_STEPS["tiny"]):
        accumulate(unet, *batches[number % NUM_BATCHES], schedule, Loss(), BATCH, optimizer.loss_scale.scale)
        optimizer.step()
        if mode == "plain bf16":
            _round_plainly(optimizer.kernel)
        watch.step()
    with torch.no_grad():
        loss = float(torch.cat([sample_losses(unet, *batch) for batch in batches]).double().mean())
    return watch, begun, loss


def measure(weights: str) -> dict[str, dict[str, float]]:
    """Return each mode's figures for one set of weights: `SD1.5 shapes` or `tiny`."""
    true, figures = None, {}
    for mode in MODES:
        watch, begun, *loss = shapes(mode) if weights == "SD1.5 shapes" else tiny(mode)
        figures[mode] = watch.figures(true, begun) | ({"loss": loss[0]} if loss else {})
        if mode == "fp32":
            true = watch.last[1]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", type=Path, help="append the figures to this file of result lines")
    options = parser.parse_args()
    for weights, num_steps in NUM_STEPS.items():
        figures = measure(weights)
        config = {"weights": weights, "precision": "bf16", "lr": LR, "num_steps": num_steps}
        if options.append:
            append(options.append, make_record("rounding", config, figures, torch.device("cpu")))
        names = ("changed_weights", "changed_values", "noise_to_displacement", "loss")
        rows = [
            (mode, *(f"{line[name]:.4f}" if name in line else "" for name in names)) for mode, line in figures.items()
        ]
        print_table(
            f"{weights}, {num_steps} steps at lr {LR:g}", ("memory", *(n.replace("_", " ") for n in names)), rows
        )


if __name__ == "__main__":
    main()
