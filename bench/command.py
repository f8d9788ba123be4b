"""The arguments of `safelight bench`; torch is imported when a measurement runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from safelight.arguments import parse


@dataclass
class Step:
    """Time the training step on this machine."""

    base: Annotated[str, arg(help="as model.base: tiny, random:sd15, a diffusers folder")] = "tiny"
    latent_size: Annotated[int, arg(help="side of the square latents; 64 is SD1.5 at 512 px; 0: the model's own")] = 0
    batch_size: Annotated[tuple[int, ...], arg(help="one variant each, interleaved")] = (1, 4)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    checkpointing: Literal["none", "full"] = "none"
    repeats: Annotated[int, arg(help="timed steps a variant")] = 10
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: Annotated[bool, arg(help="print one JSON line a variant")] = False


def main(argv: list[str]) -> int:
    """Run `safelight bench ...` and return its exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: safelight bench step [OPTIONS]\n\n  step      images/s and peak memory of the training step\n\n`safelight bench step --help` lists the options."
        )
        return 0 if argv else 2
    if argv[0] != "step":
        raise ValueError(f"bench {argv[0]!r} is unknown; use step")
    options = parse(Step, argv[1:], "bench step", "images/s and peak memory of the training step on this machine")
    from safelight.bench.suite import bench_step

    for record in bench_step(options):
        if options.json:
            print(json.dumps(record))
        else:
            low, middle, high = record["images_per_s_p20_p50_p80"]
            print(
                f"{record['base']} batch {record['batch_size']}: {middle:.2f} images/s (p20 {low:.2f}, p80 {high:.2f}) on {record['device']}, {record['precision']}"
            )
    return 0
