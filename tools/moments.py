"""Measure what blockwise moments cost in held-out loss: 4-bit and 8-bit moments compared with fp32 ones.

    python -m tools.moments [--seeds 3] [--epochs 4] [--append FILE]

Fine-tunes the tiny base in fp32 on the demo's faded prints, captioned by what was drawn, on the CPU. The runs of one
seed see the same photographs, noise and timesteps, so that their losses are compared pair by pair with those of fp32
moments (optimizer adamw). Besides the two settings: 4-bit moments in blocks of 128, and with linear codes of v in place
of those of its root. Reported for each: the held-out loss after the last step, and its mean difference from fp32
moments, with the standard error over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from safelight.bench.core.results import append, make_record
from safelight.data.atomic import atomic_write_text
from safelight.data.prepare.ingest import ingest
from safelight.kernels.optim import blockwise_4bit
from safelight.output.show import print_table
from safelight.trainer.config.toml import parse_config
from safelight.trainer.run_log.metrics import held_out_losses
from safelight.trainer.tiny.demo import SEED, draw_photos, photo_name, scene_of
from safelight.trainer.tiny.scenes import LOOK_CAPTION, caption
from safelight.trainer.train import train

LR, BATCH = 3e-4, 2
# fp32 first: the others are compared with it
MOMENTS = {
    "fp32": {"name": "adamw"},
    "8bit": {"moments": "8bit"},
    "4bit": {"moments": "4bit"},
    "4bit, blocks of 128": {"moments": "4bit"},
    "4bit, linear v": {"moments": "4bit"},
}


def _quantize_linear(m: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_4bit` with linear codes of v, scaled to 1/16 .. 1 of the block's largest root all the same."""
    blocks = blockwise_4bit.in_blocks(root)
    largest = blocks.amax(dim=1)
    # what has the code of v as the code of its root
    relative = (blocks / largest[:, None]).square() * largest[:, None]
    return *blockwise_4bit.quantize_4bit(m, relative.view(-1)[: len(m)])[:2], largest


def _linear_values() -> Tensor:
    """`value_table` with linear values of v."""
    m = blockwise_4bit.signed_map()[torch.arange(256) & 15]
    v = ((torch.arange(256) >> blockwise_4bit.ROOT_SHIFT) + 1).float() / 16
    return torch.stack([m, v], dim=1).view(torch.int64).view(-1)


@contextmanager
def _variant(name: str) -> Iterator[None]:
    """Replace the parts of the PyTorch reference that a variant has otherwise."""
    optim, changes = "safelight.kernels.optim", {}
    if name.endswith("128"):
        changes = {"safelight.kernels.moment_blocks.BLOCK_SIZE": 128, f"{optim}.blockwise_8bit.BLOCK_SIZE": 128}
    if name.endswith("linear v"):
        changes = {
            f"{optim}.adamw8bit.quantize_4bit": _quantize_linear,
            f"{optim}.blockwise_4bit.value_table": _linear_values,
        }
    with ExitStack() as stack:
        for target, value in changes.items():
            stack.enter_context(patch(target, value))
        yield


def prepare(folder: Path) -> Path:
    """Draw the prints, each with a caption beside it. Return the dataset's folder."""
    photos = folder / "photos"
    draw_photos(photos)
    for number in range(len(list(photos.glob("*.png")))):
        text = f"{caption(scene_of(number), SEED, number)}, {LOOK_CAPTION}"
        atomic_write_text((photos / photo_name(number)).with_suffix(".txt"), text)
    ingest([photos], folder / "dataset")
    return folder / "dataset"


def final_loss(dataset: Path, run_dir: Path, name: str, seed: int, epochs: int) -> float:
    """Train with one kind of moments and return the held-out loss after the last step."""
    config = parse_config(
        {
            "run": {"dir": str(run_dir), "seed": seed, "device": "cpu"},
            "data": {"path": str(dataset), "resolution": 64, "variants": 2, "caption_dropout": 0.1},
            "model": {"precision": "fp32"},
            "train": {"batch_size": BATCH, "epochs": epochs},
            "optimizer": {"lr": LR, "warmup_steps": 10, **MOMENTS[name]},
            "loss": {"min_snr_gamma": 5.0},
            "validate": {"every_epochs": epochs},
            "sample": {"every_epochs": 0},
            "log": {"tensorboard": False},
        },
        name,
    )
    with _variant(name):
        train(config)
    losses = held_out_losses(run_dir)
    return losses[max(losses)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--epochs", type=int, default=4, help="of each run")
    parser.add_argument("--append", type=Path, help="append the figures to this file of result lines")
    options = parser.parse_args()
    figures: dict[str, dict] = {name: {"held_out_loss": []} for name in MOMENTS}
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepare(Path(folder))
        for seed in range(1, options.seeds + 1):
            for number, name in enumerate(MOMENTS):
                run_dir = Path(folder) / f"run-{seed}-{number}"
                figures[name]["held_out_loss"].append(final_loss(dataset, run_dir, name, seed, options.epochs))
    exact = figures["fp32"]["held_out_loss"]
    for name, line in figures.items():
        if name != "fp32":
            differences = [a - b for a, b in zip(line["held_out_loss"], exact, strict=True)]
            line["difference"] = statistics.fmean(differences)
            line["standard_error"] = statistics.stdev(differences) / len(differences) ** 0.5
    config = {
        "base": "tiny",
        "precision": "fp32",
        "lr": LR,
        "batch_size": BATCH,
        "epochs": options.epochs,
        "seeds": options.seeds,
    }
    if options.append:
        append(options.append, make_record("moments", config, figures, torch.device("cpu")))
    rows = [
        (
            name,
            f"{statistics.fmean(line['held_out_loss']):.5f}",
            *(f"{line[key]:+.5f}" if key in line else "" for key in ("difference", "standard_error")),
        )
        for name, line in figures.items()
    ]
    print_table(f"{options.epochs} epochs at lr {LR:g}", ("moments", "held-out loss", "difference", "error"), rows)


if __name__ == "__main__":
    main()
