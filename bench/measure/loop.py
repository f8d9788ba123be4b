"""`safelight bench loop`: wall-clock seconds per epoch of the whole training loop, ours and EveryDream's.

Our loop is that of `safelight train`: rows read from the cache, the step, the log, and a checkpoint after each epoch.
EveryDream's trains on the same photographs: decoded, VAE- and text-encoded every step, the loss read and logged every
step as its TensorBoard log does, and weights and optimizer saved after each epoch. The first epoch, which warms up and
fills caches, is reported separately; in our loop it includes encoding the dataset.
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
from safelight.bench.recipes.other_trainers import (
    EveryDream,
    Photographs,
    make_baseline,
    why_no_everydream,
    write_photographs,
)
from safelight.bench.recipes.suite import OURS, free
from safelight.bench.recipes.workload import SEED, Workload, random_batches
from safelight.data.prepare.ingest import ingest
from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_vae
from safelight.trainer.run_log.terminal import Terminal
from safelight.trainer.step.profiler_ranges import listen_to_ranges
from safelight.trainer.train import train

EVERYDREAM = "everydream"


@dataclass
class Epochs:
    """Wall-clock seconds of the first epoch and of each later one.

    idle: share of the last epoch in which the GPU ran nothing, None on a CPU. waited: share of the epochs after the
    first in which the loop waited for its next batch.
    """

    first_s: float
    seconds: list[float] = field(default_factory=list)
    idle: float | None = None
    waited: float = 0.0


def config_for(work: Workload, dataset: Path, run_dir: Path, num_epochs: int, side_px: int) -> Config:
    """Return the config of our run: one bucket, no validation or samples, a checkpoint per epoch, TensorBoard on."""
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
    """Return the share of `seconds` in which the GPU ran a kernel, by its own timeline."""
    results = profiler.profiler.kineto_results
    runs = kernel_runs(results.events(), results.trace_start_ns())
    return busy_us((run.start, run.end) for run in runs) / 1e6 / seconds


class _Clock:
    """Times each epoch and the waits for data, and profiles a GPU during the last epoch."""

    def __init__(self, device: torch.device, steps_per_epoch: int, num_epochs: int):
        self.device, self.per_epoch, self.num_epochs = device, steps_per_epoch, num_epochs
        self.began, self.ends, self.num_loads = time.perf_counter(), [], 0
        self.idle: float | None = None
        self.waited_s = 0.0
        self._profiler = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait for a batch; the first epoch's waits are not counted."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.ends:
                self.waited_s += time.perf_counter() - began

    def listen(self, name: str) -> AbstractContextManager:
        """Listen to the phases of our loop: time each "load", and detect from their number that a new epoch began.

        A step loads twice: its batch, and a check whether another follows. Only loads can be counted, because a step
        replayed as a CUDA graph has no other phases, and the warm-up of graphs has all the others.
        """
        if name != "load":
            return nullcontext()
        if self.num_loads == 2 * self.per_epoch * (len(self.ends) + 1):
            self.epoch_ended()
        self.num_loads += 1
        return self.waiting()

    def epoch_ended(self) -> None:
        """Record the end of an epoch, after its last step, log and checkpoint."""
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
        """Return the times of all epochs."""
        times = [b - a for a, b in zip([self.began, *self.ends], self.ends, strict=False)]
        return Epochs(times[0], times[1:], self.idle, self.waited_s / sum(times[1:]))


def run_ours(
    work: Workload, dataset: Path, folder: Path, num_epochs: int, steps_per_epoch: int, side_px: int
) -> Epochs:
    """Run our training loop; an epoch ends when the next one's first step begins."""
    clock = _Clock(torch.device(work.device), steps_per_epoch, num_epochs)

    with listen_to_ranges(clock.listen):
        train(config_for(work, dataset, folder / "run", num_epochs, side_px), terminal=Terminal())
    # the last epoch ends when train has saved its checkpoint and returned
    clock.epoch_ended()
    return clock.epochs()


def run_everydream(work: Workload, photographs: Photographs, folder: Path, num_epochs: int, steps: int) -> Epochs:
    """Run EveryDream's training loop on the same photographs."""
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
    """Yield a result line for each loop; of EveryDream's only if it can train the base.

    Raises UserError for fewer than 3 epochs, or photographs that do not fill whole batches.
    """
    work = work.resolved()
    if num_epochs < 3:
        raise UserError(
            f"--epochs {num_epochs} is too few: the first is a warm-up and at least two are timed; use 3 or more"
        )
    if num_photographs < work.batch_size or num_photographs % work.batch_size:
        raise UserError(f"--photographs {num_photographs} is not a multiple of --batch-size {work.batch_size}")
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
        if why_no_everydream(work.base):
            del runs[EVERYDREAM]
        for recipe, run in runs.items():
            epochs = run()
            free(torch.device(work.device))
            yield _make_result(recipe, work, num_photographs, num_epochs, epochs)


def _make_result(recipe: str, work: Workload, num: int, num_epochs: int, epochs: Epochs) -> dict:
    """Return the result line of a loop over `num` photographs."""
    fastest, *_, slowest = sorted(epochs.seconds)
    middle = sorted(epochs.seconds)[len(epochs.seconds) // 2]
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
        "first_epoch_s": round(epochs.first_s, 2),
        "epoch_s": [round(s, 3) for s in (fastest, middle, slowest)],
        "images_per_s": round(num / middle, 3),
        "idle_share": None if epochs.idle is None else round(epochs.idle, 4),
        "waited_share": round(epochs.waited, 4),
    }
    return make_record("loop", config, figures, torch.device(work.device))
