"""Take one training step of a full-size SDXL UNet with random weights, on a CPU.

    python -m tools.sdxl_step --out DIR/full_size.jsonl

2,567,463,684 parameters in bf16, `optimizer.memory = rounded`, stepped inside backward with full checkpointing, one
image of 512 px with random latents and text. Needs up to 24 GB of memory. Appends a JSON line with the loss, the
gradient's norm, the share of conv_out's weights that moved, and the peak resident memory that the system reports; exits
with a message if that is more than 24 GB, or if no weight moved.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

MAX_BYTES = 24 * 10**9
# of weights and moments, and of fp32 weights while they are loaded
LEAST_BYTES = 18 * 10**9
RESOLUTION_PX = 512


def main() -> None:
    import torch

    from safelight.bench.recipes.suite import build
    from safelight.bench.recipes.workload import Workload, random_batches
    from safelight.data.decode_memory import available_bytes
    from safelight.trainer.run_log.environment import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random:sdxl", help="a smaller SDXL, to try the script")
    parser.add_argument("--out", type=Path, required=True, help="file to append the result line to")
    options = parser.parse_args()
    available = available_bytes()
    if options.base == "random:sdxl" and available is not None and available < LEAST_BYTES:
        sys.exit(f"{available / 1e9:.1f} GB of memory are free, and the step needs {LEAST_BYTES / 1e9:.0f} at least")
    work = Workload(
        options.base,
        latent_size=RESOLUTION_PX // 8,
        precision="bf16",
        optimizer="adamw8bit, rounded",
        checkpointing="full",
        device="cpu",
    )
    trainer = build("safelight-fused", work.resolved())
    last = trainer.unet.conv_out.weight
    before = last.detach().clone()
    (losses,) = (trainer.step(batch) for batch in random_batches(1, work.resolved()))
    num_moved = int((last != before).sum())
    # ru_maxrss is in KiB on Linux
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = {
        "bench": "full_size",
        **describe(torch.device("cpu")),
        "command": "python -m tools.sdxl_step",
        "base": options.base,
        "loss": round(float(losses.mean()), 6),
        "grad_norm": round(float(trainer.optimizer.last_norm), 6),
        "weights_moved_of_conv_out": round(num_moved / last.numel(), 4),
        "peak_gb": round(peak_bytes / 1e9, 2),
    }
    with options.out.open("a") as out:
        out.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    if peak_bytes > MAX_BYTES or not num_moved:
        sys.exit("more than 24 GB" if num_moved else "no weight moved")


if __name__ == "__main__":
    main()
