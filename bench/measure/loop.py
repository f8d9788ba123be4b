"""`safelight bench loop`: seconds an epoch by the wall clock, everything included, ours against EveryDream's way.

Ours is `safelight train`'s own loop: rows read from the cache, the step, the log, a checkpoint at each epoch's end. Beside it
the EveryDream style with the same photographs: decoded, VAE- and text-encoded every step, a loss read and a line written
every step as its TensorBoard log does, and weights and optimizer saved at each epoch's end. The first epoch of each, which
fills caches and warms up, is told apart; ours is charged with the encoding of its cache there.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from safelight.bench.core.device_timeline import busy_us, kernel_runs
from safelight.bench.core.results import make_record
from safelight.bench.recipes.other_trainers import EveryDream, Photographs, make_baseline, write_photographs
from safelight.bench.recipes.suite import OURS, free
from safelight.bench.recipes.workload import SEED, Workload, random_batches
from safelight.data.ingest import ingest
from safelight.errors import UserError
from safelight.trainer.config.toml import Config, parse_config
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_vae
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.step.profiler_ranges import told_to
from safelight.trainer.train import train

EVERYDREAM = "everydream"


@dataclass
class Epochs:
    """Wall-clock seconds of each epoch, the first apart; idle: share of the last epoch in which a GPU ran nothing, None on a
    CPU; waited: share of the later epochs in which the loop waited for its next batch."""

    first_s: float
    seconds: list[float] = field(default_factory=list)
    idle: float | None = None
    waited: float = 0.0


def config_for(work: Workload, dataset: Path, run_dir: Path, num_epochs: int, side_px: int) -> Config:
    """Return the config of our run: one bucket, no validation and samples, a checkpoint an epoch, a log line every ten steps."""
    return parse_config(
        {
            "run": {"dir": str(run_dir), "device": work.device},
            "model": {"base": work.base, "precision": work.precision},
            "data": {"path": str(dataset), "resolution": side_px, "max_aspect": 1.0, "validation_fraction": 0.0},
            "train": {"batch_size": work.batch_size, "checkpointing": work.checkpointing, "epochs": num_epochs},
            "optimizer": {"name": work.optimizer},
            "validate": {"every_epochs": 0},
            "sample": {"every_epochs": 0},
            "save": {"every_epochs": 1, "keep": 1},
            "log": {"tensorboard": True},
        },
        "bench loop",
    )


def _busy_share(profiler, seconds: float) -> float:
    """Return the share of a time in which a GPU had a kernel running, by its own timeline."""
    results = profiler.profiler.kineto_results
    runs = kernel_runs(results.events(), results.trace_start_ns())
    return busy_us((run.start, run.end) for run in runs) / 1e6 / seconds


class _Clock:
    """Takes the time at each epoch's end, and a GPU's timeline of the last epoch."""

    def __init__(self, device: torch.device, steps_per_epoch: int, num_epochs: int):
        self.device, self.per_epoch, self.num_epochs = device, steps_per_epoch, num_epochs
        self.began, self.ends, self.num_loads = time.perf_counter(), [], 0
        self.idle: float | None = None
        self.waited_s = 0.0
        self._profiler = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Entered while the loop waits for a batch; the first epoch's waits are not told."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.ends:
                self.waited_s += time.perf_counter() - began

    def listen(self, name: str) -> AbstractContextManager:
        """Called with each named stretch of our loop; tells where an epoch begins.

        A step loads twice: its batch, and whether another follows. Replayed as a graph it has no other stretch, and rehearsed
        before an epoch it has all the others.
        """
        if name != "load":
            return nullcontext()
        if self.num_loads == 2 * self.per_epoch * (len(self.ends) + 1):
            self.epoch_ended()
        self.num_loads += 1
        return self.waiting()

    def epoch_ended(self) -> None:
        """Called when an epoch's step, log and checkpoint are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())
        if self.device.type != "cuda":
            return
        if self._profiler is not None:
            self._profiler.stop()
            self.idle = 1 - _busy_share(self._profiler, self.ends[-1] - self.ends[-2])
            self._profiler = None
        elif len(self.ends) == self.num_epochs - 1:
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.start()

    def epochs(self) -> Epochs:
        times = [b - a for a, b in zip([self.began, *self.ends], self.ends, strict=False)]
        return Epochs(times[0], times[1:], self.idle, self.waited_s / sum(times[1:]))


def run_ours(
    work: Workload, dataset: Path, folder: Path, num_epochs: int, steps_per_epoch: int, side_px: int
) -> Epochs:
    """Train our run; an epoch ends where the next one's first step begins."""
    clock = _Clock(torch.device(work.device), steps_per_epoch, num_epochs)

    with told_to(clock.listen):
        train(config_for(work, dataset, folder / "run", num_epochs, side_px), terminal=Terminal())
    # the last one ends when train has saved and returned
    clock.epoch_ended()
    return clock.epochs()


def run_everydream(work: Workload, photographs: Photographs, folder: Path, num_epochs: int, steps: int) -> Epochs:
    """Train as EveryDream does, on the same photographs."""
    clock = _Clock(torch.device(work.device), steps, num_epochs)
    baseline: EveryDream = make_baseline(EVERYDREAM, work)
    baseline.photographs, take = photographs, photographs.take

    def timed(num: int):
        with clock.waiting():
            return take(num)

    photographs.take = timed
    (batch,) = random_batches(1, work)
    with (folder / "log.jsonl").open("w") as log:
        for epoch in range(num_epochs):
            for step in range(steps):
                loss = baseline.step(batch)
                log.write(json.dumps({"epoch": epoch, "step": step, "loss": loss.item()}) + "\n")
            save_file({k: v.contiguous() for k, v in baseline.unet.state_dict().items()}, folder / "unet.safetensors")
            torch.save(baseline.optimizer.state_dict(), folder / "optimizer.pt")
            clock.epoch_ended()
    return clock.epochs()


def bench_loop(work: Workload, num_photographs: int, num_epochs: int) -> Iterator[dict]:
    """Yield a result line of each. Raises UserError for fewer than two epochs, or photographs that fill no batch."""
    work = work.resolved()
    if num_epochs < 3:
        raise UserError(f"--epochs {num_epochs} leaves nothing after the first epoch and a timed one; use 3 or more")
    if num_photographs < work.batch_size or num_photographs % work.batch_size:
        raise UserError(f"--photographs {num_photographs} is no multiple of batch size {work.batch_size}")
    steps = num_photographs // work.batch_size
    vae = load_vae(resolve_base(work.base), "", SEED)
    side_px = work.latent_size * 2 ** (len(vae.config.block_out_channels) - 1)
    with tempfile.TemporaryDirectory(prefix="safelight-bench-") as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        files = write_photographs(folder / "photos", num_photographs, side_px)
        captions = [f"a photograph of scene number {number}, unsplash photography" for number in range(len(files))]
        for file, caption in zip(files, captions, strict=True):
            file.with_suffix(".txt").write_text(caption)
        ingest([folder / "photos"], folder / "dataset")
        runs = {
            OURS: lambda: run_ours(work, folder / "dataset", folder, num_epochs, steps, side_px),
            EVERYDREAM: lambda: run_everydream(work, Photographs(files, captions, side_px), folder, num_epochs, steps),
        }
        for recipe, run in runs.items():
            found = run()
            free(torch.device(work.device))
            yield _line(recipe, work, num_photographs, num_epochs, found)


def _line(recipe: str, work: Workload, num: int, num_epochs: int, found: Epochs) -> dict:
    fastest, *_, slowest = sorted(found.seconds)
    middle = sorted(found.seconds)[len(found.seconds) // 2]
    config = {
        "recipe": recipe,
        "base": work.base,
        "latent_size": work.latent_size,
        "batch_size": work.batch_size,
        "precision": work.precision,
        "optimizer": work.optimizer,
        "checkpointing": work.checkpointing,
        "photographs": num,
        "epochs": num_epochs,
    }
    figures = {
        "first_epoch_s": round(found.first_s, 2),
        "epoch_s": [round(s, 3) for s in (fastest, middle, slowest)],
        "images_per_s": round(num / middle, 3),
        "idle_share": None if found.idle is None else round(found.idle, 4),
        "waited_share": round(found.waited, 4),
    }
    return make_record("loop", config, figures, torch.device(work.device))
