"""Before an epoch's steps: their shapes are gone through once, largest first, and recorded where the run has CUDA graphs.

So the peak of a GPU's memory comes before the first step and not hours later, at the first batch of the largest bucket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from safelight.data.batches import MicroBatch
from safelight.kernels.jit import has_triton
from safelight.trainer.config import Config, Loss
from safelight.trainer.diffusion import NoiseSchedule
from safelight.trainer.graphs import CudaRecorder, Recorder, StepGraphs, blank, in_order, shapes_of
from safelight.trainer.need import Need, graphs_against
from safelight.trainer.optim import UNetOptimizer
from safelight.trainer.step import Inputs, micro_step


def reason_against(config: Config, device: torch.device, need: Need | None, budget: int) -> str:
    """Return why a run's steps are not recorded as CUDA graphs, '' where they are.

    config: with `auto` of optimizer.memory and train.checkpointing settled. need: what is planned of the GPU; budget: bytes
    that the run may take of it. Raises ValueError where train.cuda_graphs is on and cannot be.
    """
    if config.train.cuda_graphs == "off":
        return "train.cuda_graphs is off"
    if need is None or device.type != "cuda":
        reason = "they need a CUDA device"
    else:
        reason = graphs_against(config, need, budget) or ("" if has_triton() else "triton is not installed")
    if config.train.cuda_graphs == "on" and reason:
        raise ValueError(f"train.cuda_graphs is on, but {reason}; set it to auto")
    return reason


class GraphRecording:
    """Rehearses and records a run's micro-steps. recorder: None where they are taken one by one.

    rehearses: whether without graphs a shape larger than all before is gone through before the epoch that meets it.
    """

    def __init__(
        self, unet: nn.Module, optimizer: UNetOptimizer, schedule: NoiseSchedule, scaling_factor: float, loss: Loss,
        recorder: Recorder | None, rehearses: bool,
    ):  # fmt: skip
        self._optimizer, self._recorder, self._rehearses = optimizer, recorder, rehearses
        self._run_of = partial(_run_of, unet, optimizer, schedule, scaling_factor, loss)
        self._graphs: StepGraphs | None = None
        self._num_samples = self._num_rehearsed = 0

    def begin(
        self, plan: Sequence[MicroBatch], latent_factor: int, accumulate: int, num_samples: int,
        first: Callable[[], Inputs],
    ) -> tuple[StepGraphs | None, str]:  # fmt: skip
        """Return the graphs of an epoch's micro-batches, None without, and a line on what was done, '' for nothing.

        accumulate: micro-batches a step; num_samples: of a full one. first: gives inputs of any of them. Call it between
        steps. Raises torch.OutOfMemoryError.
        """
        if self._recorder is None and not self._rehearses:
            return None, ""
        sizes = [(len(m.refs), m.bucket.height // latent_factor, m.bucket.width // latent_factor) for m in plan]
        wanted, run = shapes_of(sizes, accumulate), self._run_of(num_samples)
        began = time.monotonic()
        if self._recorder is None:
            largest = in_order(wanted)[0]
            if largest.num_latents <= self._num_rehearsed:
                return None, ""
            self._num_rehearsed = largest.num_latents
            with self._optimizer.rehearsal():
                run(blank(first(), largest), largest.is_first, True)
            return None, f"the largest batch was gone through, {largest}, in {time.monotonic() - began:.1f} s"
        if self._graphs is None or num_samples != self._num_samples:
            if self._graphs is not None:
                self._graphs.clear()
            self._graphs, self._num_samples = StepGraphs(run, self._optimizer, self._recorder), num_samples
        num = self._graphs.prepare(wanted, first())
        took = (
            f"{num} shapes of batches were recorded as CUDA graphs in {time.monotonic() - began:.1f} s" if num else ""
        )
        return self._graphs, took


def _run_of(
    unet: nn.Module, optimizer: UNetOptimizer, schedule: NoiseSchedule, scaling_factor: float, loss: Loss,
    num_samples: int,
) -> Callable:  # fmt: skip
    """Return micro_step as a function of inputs, is_first and is_last."""

    def run(inputs: Inputs, is_first: bool, is_last: bool):
        return micro_step(unet, optimizer, inputs, schedule, scaling_factor, loss, num_samples, is_first, is_last)

    return run


def recording_for(
    unet: nn.Module, optimizer: UNetOptimizer, schedule: NoiseSchedule, scaling_factor: float, loss: Loss,
    device: torch.device, with_graphs: bool,
) -> GraphRecording:  # fmt: skip
    """Return the recording of a run on a device."""
    recorder = CudaRecorder(device) if with_graphs else None
    return GraphRecording(unet, optimizer, schedule, scaling_factor, loss, recorder, rehearses=device.type == "cuda")
