"""What 16-bit weights lose at a small learning rate: plain bf16 against the memory modes, over equal steps.

    python -m tools.rounding [--append FILE]

Two sets of weights. Tensors of SD1.5's shapes, drawn as its layers are initialised, under made-up gradients: a third of each points
the same way all along, the rest is noise. And the tiny base's UNet under its own loss, on random latents and texts. Both begin at bf16
numbers. Of each mode is told: the share of bf16 weights, and of values held (weight and what stands beside it), that change in a step; how far the
values end from those of the fp32 masters, against the way these went; the loss after the last step.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from safelight.bench.core.results import append, make_record
from safelight.bench.core.show import print_table
from safelight.kernels.ops.noising import Noised
from safelight.kernels.optim.adamw8bit import AdamW8bit
from safelight.trainer.config.toml import Loss, Model, Optimizer
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.base import base_of
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.step import accumulate, sample_losses

LR, WEIGHT_DECAY = 1e-6, 0.01
NUM_STEPS = {"SD1.5 shapes": 200, "tiny": 40}
# fp32 first: the others are measured by it
MODES = ("fp32", "exact", "near", "rounded", "plain bf16")
SHAPES = ((320, 4, 3, 3), (320, 320), (320, 768), (320, 1280), (64, 320, 3, 3), (320,))
BATCH, NUM_BATCHES, SEED = 4, 4, 1


def _round_plainly(optimizer: AdamW8bit) -> None:
    """Let the masters forget what bf16 does not hold: an optimizer without any, rounding to the nearest."""
    for p, master in zip(optimizer.parameters, optimizer.remainders, strict=True):
        master.copy_(p)


class _Watch:
    """Shares of what changes, summed over steps."""

    def __init__(self, optimizer: AdamW8bit):
        self.optimizer, self.num_steps, self.weights, self.values = optimizer, 0, 0.0, 0.0
        self.begun = self.last = self.now()

    def now(self) -> tuple[Tensor, Tensor]:
        """Return copies of all weights and of all values, flat."""
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
        """Return the figures; true: the fp32 masters' end, None for themselves; begun: the fp32 values before."""
        found = {"changed_weights": self.weights / self.num_steps, "changed_values": self.values / self.num_steps}
        if true is not None:
            error = (self.last[1].double() - true.double()).norm()
            found["noise_to_displacement"] = float(error / (true.double() - begun.double()).norm())
        return found


def shapes(mode: str) -> tuple[_Watch, Tensor]:
    """Return how SD1.5's shapes fared, and their fp32 values before."""
    generator = torch.Generator().manual_seed(SEED)
    fan_in = [math.prod(shape[1:]) for shape in SHAPES]
    starts = [torch.randn(s, generator=generator) / math.sqrt(n) for s, n in zip(SHAPES, fan_in, strict=True)]
    # as a published 16-bit file has them: what the first rounding would cost is not what training costs
    starts = [w.bfloat16().float() for w in starts]
    means = [torch.randn(shape, generator=generator) for shape in SHAPES]
    weights = [w.bfloat16() for w in starts]
    optimizer = AdamW8bit(weights, memory="fp32" if mode == "plain bf16" else mode, seed=SEED, values=starts)
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
    """Return how the tiny base's UNet fared, its fp32 values before, and its mean loss after the last step."""
    base = base_of(Model())
    unet = load_unet(base, SEED).train()
    with torch.no_grad():
        for p in unet.parameters():
            p.copy_(p.bfloat16())
    begun = torch.cat([p.detach().flatten() for p in unet.parameters()])
    schedule = make_schedule(base.config_of("scheduler"))
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
    """Return each mode's figures over one set of weights: `SD1.5 shapes` or `tiny`."""
    true, found = None, {}
    for mode in MODES:
        watch, begun, *loss = shapes(mode) if weights == "SD1.5 shapes" else tiny(mode)
        found[mode] = watch.figures(true, begun) | ({"loss": loss[0]} if loss else {})
        if mode == "fp32":
            true = watch.last[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--append", type=Path, help="add the figures to this file of result lines")
    options = parser.parse_args()
    for weights, num_steps in NUM_STEPS.items():
        found = measure(weights)
        config = {"weights": weights, "precision": "bf16", "lr": LR, "num_steps": num_steps}
        if options.append:
            append(options.append, make_record("rounding", config, found, torch.device("cpu")))
        names = ("changed_weights", "changed_values", "noise_to_displacement", "loss")
        rows = [
            (mode, *(f"{line[name]:.4f}" if name in line else "" for name in names)) for mode, line in found.items()
        ]
        print_table(
            f"{weights}, {num_steps} steps at lr {LR:g}", ("memory", *(n.replace("_", " ") for n in names)), rows
        )


if __name__ == "__main__":
    main()
