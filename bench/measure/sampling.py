"""Pictures/s of the sampler: `generate` with a base's UNet and autoencoder, as every command that draws calls it.

Denoising and decoding are timed apart. The UNet and the autoencoder are opened as `sample`, `compare` and `evaluate`
open those of a run, and the autoencoder decodes on the device that they would choose.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from safelight.bench.core.harness import percentiles
from safelight.bench.core.results import make_record
from safelight.bench.recipes.workload import Workload, config_of, random_rows, stand_in
from safelight.trainer.inference.draw import OpenRun
from safelight.trainer.inference.sampling import Settings, generate, settings_of
from safelight.trainer.inference.unet_graphs import UNetGraphs
from safelight.trainer.models.base import resolve_base


@dataclass
class _Denoising:
    """Callback of `generate` that notes when the last denoising step of a batch has ended."""

    device: torch.device
    ended: float = field(default=0.0)

    def __call__(self, done: int, total: int) -> None:
        if done == total:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.ended = time.perf_counter()


def bench_sampling(work: Workload, sizes: tuple[int, ...], repeats: int, steps: int = 0) -> Iterator[dict]:
    """Yield a result line for each number of pictures that are drawn at a time.

    steps: denoising steps of a picture; 0: those that samples have by default. Guidance is on, so the UNet sees each
    picture twice. The first batch of each size is a warm-up.
    """
    work = work.resolved()
    config, base, device = config_of(work), resolve_base(work.base), torch.device(work.device)
    if steps:
        config.sample.steps = steps
    settings = settings_of(config)
    with tempfile.TemporaryDirectory(prefix="safelight-sampling-") as folder:
        run = OpenRun(Path(folder), config, base, device, base.noise_schedule(config.loss.prediction))
        unet = run.unet(None)
        graphs = run.graphs(unet)
        for size in sizes:
            seconds = [_draw(run, unet, graphs, size, settings) for _ in range(repeats + 1)][1:]
            denoise_s, decode_s = zip(*seconds, strict=True)
            low, middle, high = percentiles([sum(pair) for pair in seconds])
            figures = {
                "images_per_s": [round(size / s, 4) for s in (high, middle, low)],
                "denoise_s": [round(s, 4) for s in percentiles(list(denoise_s))],
                "decode_s": [round(s, 4) for s in percentiles(list(decode_s))],
            }
            settings_of_line = {
                "base": work.base,
                "latent_size": work.latent_size,
                "batch_size": size,
                "precision": work.precision,
                "device": work.device,
                "steps": settings.steps,
                "cfg": settings.cfg,
                "sampler": settings.sampler,
                "repeats": repeats,
            }
            yield make_record("sampling", settings_of_line, figures, device)


def _draw(
    run: OpenRun, unet: torch.nn.Module, graphs: UNetGraphs | None, size: int, settings: Settings
) -> tuple[float, float]:
    """Draw a batch of pictures and return the seconds of (denoising, decoding)."""
    side = settings.width // run.codec.factor
    _, text = random_rows(size + 1, run.config.model.base, side)
    conditioning = stand_in(run.config.model.base, side)(torch.from_numpy(text))
    decode_on, _ = run.fit_to_memory(settings)
    denoising, began = _Denoising(run.device), time.perf_counter()
    generate(
        unet,
        run.codec,
        conditioning[list(range(size))],
        conditioning[[size]],
        run.schedule,
        settings,
        batch_size=size,
        decode_on=decode_on,
        progress=denoising,
        graphs=graphs,
    )
    return denoising.ended - began, time.perf_counter() - denoising.ended
