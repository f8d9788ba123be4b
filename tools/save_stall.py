"""Measure how long saving a checkpoint of a full-size SD1.5 blocks training, on a CPU.

    python -m tools.save_stall --dir DIR

859,520,964 random bf16 weights in channels-last order with 16-bit remainders and 8-bit moments. Two variants
alternate: the training loop writes the checkpoint itself, or it only takes a snapshot and a thread writes it. Needs
about 14 GiB of memory and 6 GiB of disk. Appends one JSON line to --out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from safelight.bench.core.results import RESULTS, append, make_record
from safelight.data.decode_memory import available_bytes
from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.checkpoint.files import Position, folder_of, save_checkpoint
from safelight.trainer.checkpoint.identity import Identity
from safelight.trainer.checkpoint.saver import Saver
from safelight.trainer.checkpoint.snapshot import num_bytes_of
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import meta_unet
from safelight.trainer.optim.optimizer import UNetOptimizer, make_optimizer

NEEDED_GIB = 14
REPEATS = 3
IDENTITY = Identity({}, [], "random")


def make_state(base: str) -> tuple[torch.nn.Module, UNetOptimizer]:
    """Return a UNet with random bf16 weights in channels-last order, and its optimizer with random moments."""
    unet = meta_unet(resolve_base(base)).to(torch.bfloat16).to_empty(device="cpu").to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in unet.parameters():
            p.uniform_(-1, 1, generator=generator)
        optimizer = make_optimizer(unet, Optimizer(), torch.bfloat16)
        for x in optimizer.live_state().values():
            if x.dtype in (torch.uint8, torch.int16):
                x.random_(generator=generator)
    return unet, optimizer


def save_in_loop(folder: Path, unet, optimizer: UNetOptimizer) -> float:
    """Save a checkpoint in this thread and return how many seconds that takes."""
    began = time.perf_counter()
    save_checkpoint(
        folder,
        partial(FullFineTune(unet).write, tensors=unet.state_dict()),
        {key: x.to("cpu", copy=True).contiguous() for key, x in optimizer.live_state().items()},
        Position(step=1),
        IDENTITY,
    )
    return time.perf_counter() - began


def save_in_thread(saver: Saver, unet, optimizer: UNetOptimizer, step: int) -> dict[str, float]:
    """Save a checkpoint by the saver's thread and return seconds.

    thread_stall_s: while the loop is blocked. thread_stall_cpu_s: its CPU time of these. thread_whole_s: until the
    checkpoint is complete.
    """
    began, began_cpu = time.perf_counter(), time.thread_time()
    saver.save(FullFineTune(unet), optimizer.live_state(), Position(step=step))
    stalled, ran = time.perf_counter() - began, time.thread_time() - began_cpu
    saver.wait()
    return {"thread_stall_s": stalled, "thread_stall_cpu_s": ran, "thread_whole_s": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="folder to write to; must not exist yet")
    parser.add_argument("--base", default="random:sd15", help="base model whose UNet is saved")
    parser.add_argument("--out", type=Path, default=RESULTS / "saves.jsonl", help="file the result line is added to")
    parser.add_argument("--thread-alone", action="store_true", help="measure only saves by the thread, as in a run")
    parser.add_argument("--note", default="", help="text kept in the result line")
    arguments = parser.parse_args()
    if arguments.dir.exists():
        sys.exit(f"{arguments.dir} already exists; choose another folder")
    if arguments.base == "random:sd15" and (available_bytes() or 0) < NEEDED_GIB * 2**30:
        sys.exit(f"less than {NEEDED_GIB} GiB of memory is free; close other programs, or use --base tiny")
    unet, optimizer = make_state(arguments.base)
    all_seconds: defaultdict[str, list[float]] = defaultdict(list)
    device = torch.device("cpu")
    with Saver(arguments.dir, IDENTITY, 1, lambda: None, print, device) as saver:
        saver.reserve(FullFineTune(unet), optimizer.live_state())
        began = time.perf_counter()
        saver.wait()
        reserving = time.perf_counter() - began
        for step in range(1, REPEATS + 1):
            if not arguments.thread_alone:
                shutil.rmtree(folder_of(arguments.dir / "before", 1), ignore_errors=True)
                all_seconds["loop_stall_s"].append(save_in_loop(arguments.dir / "before", unet, optimizer))
            for name, seconds in save_in_thread(saver, unet, optimizer, step).items():
                all_seconds[name].append(seconds)
    num_bytes = num_bytes_of([*unet.state_dict().values(), *optimizer.live_state().values()])
    figures = {name: [round(s, 3) for s in sorted(seconds)] for name, seconds in all_seconds.items()}
    figures |= {"checkpoint_gib": round(num_bytes / 2**30, 3), "reserve_s": round(reserving, 2)}
    config = {
        "base": arguments.base,
        "memory": optimizer.memory,
        "precision": "bf16",
        "device": "cpu",
        "thread_alone": arguments.thread_alone,
        "repeats": REPEATS,
    }
    append(arguments.out, make_record("save_stall", config, figures, device, arguments.note))
    print(figures)
    shutil.rmtree(arguments.dir)


if __name__ == "__main__":
    main()
