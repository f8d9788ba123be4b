"""The traces that a plan is made from, on meta tensors: each made when it is asked for, and kept.

Of steps of two batch sizes the events are recorded; those of other sizes follow from them (trainer/replay.py). One image is
always replayed: a trace of it would differ by some KiB of vectors that are not copied where a batch has one row.
"""

from __future__ import annotations

import functools

import torch

from safelight.trainer.config import Config
from safelight.trainer.meta_run import MetaRun, Traced
from safelight.trainer.models import resolve_model
from safelight.trainer.replay import AllocationTrace
from safelight.trainer.trace import CUDA_ROUNDING

CUDA = torch.device("cuda")
# batch sizes that are traced
TRACED = (2, 4)


@functools.lru_cache(maxsize=8)
def _meta_run(settings: str, dtype: torch.dtype) -> MetaRun:
    """Return a run on meta tensors, of settings as JSON: all that its memory depends on but batches."""
    config = Config.model_validate_json(settings)
    run = MetaRun(config, resolve_model(config.model), CUDA, dtype)
    # the first step makes what the optimizer keeps
    run.step(1, 8, 8)
    return run


def meta_run(config: Config, dtype: torch.dtype, fused: bool, num_micro: int) -> MetaRun:
    """Return a config's run on meta tensors, as on a GPU, in the best memory mode that the dtype allows."""
    train = {
        "kernels": config.train.kernels, "ema_decay": config.train.ema_decay, "accumulate": num_micro,
        "accumulate_dtype": config.train.accumulate_dtype,
    }  # fmt: skip
    optimizer = config.optimizer.model_copy(update={"memory": "auto", "fused_backward": fused, "clipping": "auto"})
    return _meta_run(Config(model=config.model, train=train, optimizer=optimizer).model_dump_json(), dtype)


def step_of(run: MetaRun, how: str, size: int, latents: tuple[int, int], num_micro: int) -> Traced:
    """Return the trace of a step with a way of checkpointing. What it adds is the same in all memory modes."""

    def key(n: int) -> tuple:
        return "step", how, n, *latents, num_micro

    def traced(n: int) -> Traced:
        if key(n) not in run.traced:
            run.checkpoint(how)
            run.traced[key(n)] = run.step(n, *latents, num_micro)
        return run.traced[key(n)]

    if key(size) not in run.traced:
        found = None
        if size == 1 or all(key(n) in run.traced for n in TRACED):
            n, m = TRACED
            found = traced(n).between(n, traced(m), m, size, CUDA_ROUNDING)
        run.traced[key(size)] = found or traced(size)
    return run.traced[key(size)]


def forward_of(run: MetaRun, latents: tuple[int, int], num: int, rows: int = 1) -> int:
    """Return what a forward pass of num x rows images without gradients adds to what is held."""

    def recorded(n: int) -> AllocationTrace:
        key = ("forward", n, *latents)
        if key not in run.traced:
            run.traced[key] = run.forward(n, *latents)
        return run.traced[key]

    n, m = TRACED
    found = recorded(n).between(n, recorded(m), m, num * rows) or recorded(num * rows)
    return found.peak(CUDA_ROUNDING).total - run.live.total
