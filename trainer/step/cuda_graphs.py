"""The training step as CUDA graphs: recorded once for each shape of batch, then replayed by one call of the host.

A graph runs the same operators on the same memory again, and no Python. So a batch is copied into inputs that stay where they
are, a step's numbers (learning rate, weight decay, clipping) stand on the device and are written before it, and whatever a
step changes is changed in place. Its draws are keyed by what the inputs hold.

Graphs share one pool of memory: they run one after another, and none leaves anything behind but its small results. Every new
shape is rehearsed before any is recorded: Triton compiles, cuDNN and cuBLAS choose, and what the rehearsals took is given
back, so that the pool and they never stand side by side: a batch of a size that comes later has all graphs given up and
recorded again. The largest comes first, so that the pool grows once.
Source: docs.pytorch.org, CUDA semantics, CUDA Graphs.

Before an epoch's steps: their shapes are gone through once, largest first, and recorded where the run has CUDA graphs.

So the peak of a GPU's memory comes before the first step and not hours later, at the first batch of the largest bucket.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from safelight.data.batches import MicroBatch
from safelight.errors import UserError
from safelight.trainer.config.toml import Loss
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.optim.optimizer import UNetOptimizer
from safelight.trainer.step.step import Inputs, MicroResult, micro_step


@dataclass(frozen=True)
class Shape:
    """What one graph is for: a batch's size, its latents' height and width, and its place among a step's micro-batches."""

    size: int
    height: int
    width: int
    is_first: bool = True
    is_last: bool = True

    @property
    def num_latents(self) -> int:
        return self.size * self.height * self.width

    def __str__(self) -> str:
        return f"{self.size} of {self.width} x {self.height} latents"


def shape_of(inputs: Inputs, is_first: bool = True, is_last: bool = True) -> Shape:
    size, _, height, width = inputs.mean_BCHW.shape
    return Shape(size, height, width, is_first, is_last)


def shapes_of(sizes: Iterable[tuple[int, int, int]], accumulate: int) -> set[Shape]:
    """Return the shapes of an epoch's micro-batches, given in order as (size, height, width), taken `accumulate` a step."""
    sizes = list(sizes)
    last = len(sizes) - 1
    return {
        Shape(*size, number % accumulate == 0, number % accumulate == accumulate - 1 or number == last)
        for number, size in enumerate(sizes)
    }


class Recorder(Protocol):
    """What records. rehearse runs something; settle frees what that took; record returns its replay and its results; forget:
    all that was recorded has been given up."""

    def rehearse(self, run: Callable[[], object]) -> None: ...

    def settle(self) -> None: ...

    def record(self, run: Callable[[], MicroResult]) -> tuple[Callable[[], None], MicroResult]: ...

    def forget(self) -> None: ...


class CudaRecorder:
    """Records CUDA graphs on a device, all into one pool of memory. Raises ValueError where a step cannot be recorded."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # nothing may be recorded on the default stream, nor what ran there first
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, run: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()

    def record(self, run: Callable[[], MicroResult]) -> tuple[Callable[[], None], MicroResult]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that reads batches ahead may pin memory meanwhile
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        except RuntimeError as error:
            # leaving a capture that failed raises an error of its own, which tells nothing
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            # what torch's allocator knows of the capture stays: this process takes no further step
            raise UserError(
                f"a step cannot be recorded as a CUDA graph here ({str(first).splitlines()[0][:200]}); "
                "set train.cuda_graphs to off"
            ) from first
        return graph.replay, result

    def forget(self) -> None:
        # torch takes no handle whose graphs are gone while a result of one is held (create_or_incref_pool asserts)
        self._pool = torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class _Graph:
    """inputs: what it reads; replay: runs it again; result: what it writes, overwritten by the next replay."""

    inputs: Inputs
    replay: Callable[[], None]
    result: MicroResult


def in_order(shapes: Iterable[Shape]) -> list[Shape]:
    """Return shapes with the largest first."""

    def order(shape: Shape) -> tuple:
        return -shape.num_latents, -shape.height, -shape.size, shape.is_first, shape.is_last

    return sorted(shapes, key=order)


def _work_of(shape: Shape) -> tuple:
    """Return what a shape's first run compiles and makes: a step's other places add up or copy, which needs neither.

    A step is stepped the same after any batch: with the first shapes its end is rehearsed.
    """
    return shape.size, shape.height, shape.width, shape.is_first and shape.is_last


def blank(like: Inputs, shape: Shape) -> Inputs:
    """Return inputs of a shape, zeros, of the form of others."""
    size, place = shape.size, (shape.size, like.mean_BCHW.shape[1], shape.height, shape.width)
    return Inputs(
        like.mean_BCHW.new_zeros(place),
        None if like.logvar_BCHW is None else like.logvar_BCHW.new_zeros(place),
        like.text_BTD.new_zeros(size, *like.text_BTD.shape[1:]),
        like.words_B5.new_zeros(size, like.words_B5.shape[1]),
    )


def _copy(source: Inputs, target: Inputs) -> None:
    for name in ("mean_BCHW", "logvar_BCHW", "text_BTD", "words_B5"):
        found: Tensor | None = getattr(source, name)
        if found is not None:
            getattr(target, name).copy_(found, non_blocking=True)


class StepGraphs:
    """Graphs of a stage's micro-step, by shape.

    run: (inputs, is_first, is_last of the step's micro-batches) -> results, tensors that the next replay overwrites.
    optimizer: that run steps. Call `prepare` between steps alone.
    """

    def __init__(self, run: Callable[[Inputs, bool, bool], MicroResult], optimizer: UNetOptimizer, recorder: Recorder):
        self._run, self._optimizer, self._recorder = run, optimizer, recorder
        self._graphs: dict[Shape, _Graph] = {}
        self._rehearsed: set[tuple] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Give all graphs up: what they have baked in is to change."""
        self._graphs.clear()
        self._optimizer.release_captures()
        self._recorder.forget()

    def prepare(self, wanted: Iterable[Shape], like: Inputs) -> int:
        """Record the shapes that have no graph yet, all anew where one must be rehearsed, and return how many.

        like: inputs of any shape, for the rest of their form.
        """
        new = in_order(s for s in set(wanted) if s not in self._graphs)
        if not new:
            return 0
        strange = [shape for shape in new if _work_of(shape) not in self._rehearsed]
        if strange and self._graphs:
            new = in_order([*new, *self._graphs])
            self.clear()
        # nor may a rehearsal find what a pool, or validation, has left
        self._recorder.settle()
        inputs = {shape: blank(like, shape) for shape in new}
        for shape in strange:
            with self._optimizer.rehearsal():
                self._recorder.rehearse(lambda shape=shape: self._take(inputs[shape], shape))
        self._rehearsed |= {_work_of(shape) for shape in strange}
        self._recorder.settle()
        for shape in new:
            replay, result = self._recorder.record(lambda shape=shape: self._take(inputs[shape], shape))
            self._optimizer.finish_capture()
            self._graphs[shape] = _Graph(inputs[shape], replay, result)
        return len(new)

    def _take(self, inputs: Inputs, shape: Shape) -> MicroResult:
        return self._run(inputs, shape.is_first, shape.is_last)

    def __call__(self, inputs: Inputs, is_first: bool = True, is_last: bool = True) -> MicroResult:
        """Replay the graph of these inputs' shape on them. Raises KeyError where prepare was not told of it."""
        graph = self._graphs[shape_of(inputs, is_first, is_last)]
        _copy(inputs, graph.inputs)
        graph.replay()
        return graph.result


class GraphRecording:
    """Rehearses and records a run's micro-steps. recorder: None where they are taken one by one.

    rehearses: whether without graphs a shape larger than all before is gone through before the epoch that meets it.
    """

    def __init__(
        self,
        unet: nn.Module,
        optimizer: UNetOptimizer,
        schedule: NoiseSchedule,
        scaling_factor: float,
        loss: Loss,
        recorder: Recorder | None,
        rehearses: bool,
    ):
        self._optimizer, self._recorder, self._rehearses = optimizer, recorder, rehearses
        self._run_of = partial(_run_of, unet, optimizer, schedule, scaling_factor, loss)
        self._graphs: StepGraphs | None = None
        self._num_samples = self._num_rehearsed = 0

    def begin(
        self,
        plan: Sequence[MicroBatch],
        latent_factor: int,
        accumulate: int,
        num_samples: int,
        first: Callable[[], Inputs],
    ) -> tuple[StepGraphs | None, str]:
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
    unet: nn.Module,
    optimizer: UNetOptimizer,
    schedule: NoiseSchedule,
    scaling_factor: float,
    loss: Loss,
    num_samples: int,
) -> Callable:
    """Return micro_step as a function of inputs, is_first and is_last."""

    def run(inputs: Inputs, is_first: bool, is_last: bool):
        return micro_step(unet, optimizer, inputs, schedule, scaling_factor, loss, num_samples, is_first, is_last)

    return run


def recording_for(
    unet: nn.Module,
    optimizer: UNetOptimizer,
    schedule: NoiseSchedule,
    scaling_factor: float,
    loss: Loss,
    device: torch.device,
    with_graphs: bool,
) -> GraphRecording:
    """Return the recording of a run on a device."""
    recorder = CudaRecorder(device) if with_graphs else None
    return GraphRecording(unet, optimizer, schedule, scaling_factor, loss, recorder, rehearses=device.type == "cuda")
