"""The training step as CUDA graphs: captured once per batch shape, then replayed by a single host call.

A replay launches the same kernels on the same memory and runs no Python. So a batch is copied into inputs at fixed
addresses, the step's hyperparameters (learning rate, weight decay, clipping) are written to the device before the
replay, and state is updated in place. Random draws are keyed by the inputs, so each replay draws different numbers.

All graphs share one memory pool: they run one after another, and only their small results outlive a replay. Before a
capture, every new shape runs once as a dry run (a warm-up): Triton compiles, cuDNN and cuBLAS choose their algorithms,
and the memory used is freed, so that the pool and the memory cached by warm-ups never exist at the same time. When a
shape first appears in a later epoch, all graphs are dropped and captured again. The largest shape is captured first, so
that the pool grows only once.

Without graphs, an epoch's largest shape still gets a dry run before the first step: if the GPU is too small, the run
fails at its start, not hours later.
Source: docs.pytorch.org, CUDA semantics, CUDA Graphs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from safelight.data.epochs import MicroBatch
from safelight.errors import UserError
from safelight.trainer.optim.optimizer import UNetOptimizer
from safelight.trainer.step.step import Inputs, MicroResult, StepContext, micro_step


@dataclass(frozen=True)
class Shape:
    """What a graph is captured for: batch size, height and width in latents, and its place among the micro-steps."""

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
    """Return the shapes of an epoch's micro-batches.

    sizes: (batch size, height, width) in latents of each micro-batch, in order. accumulate: micro-batches per step.
    """
    sizes = list(sizes)
    last = len(sizes) - 1
    return {
        Shape(*size, number % accumulate == 0, number % accumulate == accumulate - 1 or number == last)
        for number, size in enumerate(sizes)
    }


def largest_first(shapes: Iterable[Shape]) -> list[Shape]:
    """Return the shapes in the order in which they are captured."""

    def order(shape: Shape) -> tuple:
        return -shape.num_latents, -shape.height, -shape.size, shape.is_first, shape.is_last

    return sorted(shapes, key=order)


class Recorder(Protocol):
    """What captures graphs: CudaRecorder, or a stand-in for tests on the CPU."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Call `run` on the capturing stream."""
        ...

    def free_cached_memory(self) -> None:
        """Return torch's cached free memory to the device."""
        ...

    def capture(self, run: Callable[[], MicroResult]) -> tuple[Callable[[], None], MicroResult]:
        """Capture a call of `run`; return a function that replays it, and its result, which each replay overwrites."""
        ...

    def forget(self) -> None:
        """Called after all captured graphs have been dropped."""
        ...


class CudaRecorder:
    """Captures CUDA graphs on a device into one memory pool. Raises UserError if a step cannot be captured."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # CUDA cannot capture on the default stream, and the warm-up must run on the capturing stream
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, run: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def free_cached_memory(self) -> None:
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()

    def capture(self, run: Callable[[], MicroResult]) -> tuple[Callable[[], None], MicroResult]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory during the capture
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        except RuntimeError as error:
            # ending a failed capture raises a second, uninformative error; the first one is the cause
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            # torch's allocator is still in capture mode, so this process cannot take another step
            raise UserError(
                f"a step cannot be captured as a CUDA graph here ({str(first).splitlines()[0][:200]}); "
                "set train.cuda_graphs to off"
            ) from first
        return graph.replay, result

    def forget(self) -> None:
        # a new handle: torch asserts (create_or_incref_pool) if a pool's handle is reused after its graphs are freed
        # while one of their tensors is still alive
        self._pool = torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class _Graph:
    """inputs: tensors the graph reads. replay: runs it. result: tensors it writes, overwritten by the next replay."""

    inputs: Inputs
    replay: Callable[[], None]
    result: MicroResult


def _warm_up_key(shape: Shape) -> tuple:
    """Return a key of what a shape's warm-up compiles: shapes with equal keys need only one warm-up.

    A micro-step's position within the step only decides whether gradients are copied or added, which compiles nothing
    new. A step of a single micro-step uses no gradient buffers and has a key of its own. The optimizer step is the
    same for all shapes and is warmed up with the first ones.
    """
    return shape.size, shape.height, shape.width, shape.is_first and shape.is_last


def blank(like: Inputs, shape: Shape) -> Inputs:
    """Return zero inputs of a shape. like: inputs of any shape, whose 4-dimensional tensors are latents."""

    def zeros(x: Tensor) -> Tensor:
        rest = (x.shape[1], shape.height, shape.width) if x.dim() == 4 else x.shape[1:]
        return x.new_zeros(shape.size, *rest)

    return like.map(zeros)


class StepGraphs:
    """The graphs of a stage's micro-steps, by shape.

    run: the micro-step to capture, called with (inputs, is_first, is_last). optimizer: the one that `run` steps.
    Call `prepare` between steps only.
    """

    def __init__(self, run: Callable[[Inputs, bool, bool], MicroResult], optimizer: UNetOptimizer, recorder: Recorder):
        self._run, self._optimizer, self._recorder = run, optimizer, recorder
        self._graphs: dict[Shape, _Graph] = {}
        self._warmed_up: set[tuple] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs, because something that is baked into them is about to change."""
        self._graphs.clear()
        self._optimizer.release_captures()
        self._recorder.forget()

    def prepare(self, shapes: Iterable[Shape], like: Inputs) -> int:
        """Capture the shapes of an epoch that have no graph yet, and return how many were captured.

        If any of them needs a warm-up, or if the short batch of a bucket was of another size before, all are dropped
        and captured again, so that graphs do not pile up. like: inputs of any shape.
        """
        shapes = set(shapes)
        new = largest_first(shapes - self._graphs.keys())
        if not new:
            return 0
        cold = [shape for shape in new if _warm_up_key(shape) not in self._warmed_up]
        unused = self._graphs.keys() - shapes
        outdated = {old for old in unused if any(replace(old, size=shape.size) == shape for shape in new)}
        if self._graphs and (cold or outdated):
            new = largest_first((self._graphs.keys() | shapes) - outdated)
            self.clear()
        # also before the warm-ups: they must not run beside memory that validation or a dropped pool left cached
        self._recorder.free_cached_memory()
        inputs = {shape: blank(like, shape) for shape in new}
        for shape in cold:
            with self._optimizer.dry_run():
                self._recorder.warm_up(lambda shape=shape: self._micro_step(inputs[shape], shape))
        self._warmed_up |= {_warm_up_key(shape) for shape in cold}
        self._recorder.free_cached_memory()
        for shape in new:
            replay, result = self._recorder.capture(lambda shape=shape: self._micro_step(inputs[shape], shape))
            self._optimizer.finish_capture()
            self._graphs[shape] = _Graph(inputs[shape], replay, result)
        return len(new)

    def _micro_step(self, inputs: Inputs, shape: Shape) -> MicroResult:
        return self._run(inputs, shape.is_first, shape.is_last)

    def __call__(self, inputs: Inputs, is_first: bool = True, is_last: bool = True) -> MicroResult:
        """Replay the graph for the inputs' shape. Raises KeyError for a shape that was not prepared."""
        graph = self._graphs[shape_of(inputs, is_first, is_last)]
        for source, target in zip(inputs.tensors(), graph.inputs.tensors(), strict=True):
            target.copy_(source, non_blocking=True)
        graph.replay()
        return graph.result


class GraphCapture:
    """Prepares an epoch: captures graphs for its shapes or, without graphs, warms up the largest one.

    recorder: None if the run uses no graphs. warms_up: whether the largest shape gets a dry run without graphs; only
    useful on a GPU, whose memory may be too small.
    """

    def __init__(self, context: StepContext, recorder: Recorder | None, warms_up: bool):
        self._context, self._recorder, self._warms_up = context, recorder, warms_up
        self._graphs: StepGraphs | None = None
        self._num_samples = self._largest_warmed_up = 0

    @property
    def uses_graphs(self) -> bool:
        return self._recorder is not None

    def release(self) -> None:
        """Free the captured graphs and their memory, between steps."""
        if self._graphs is not None:
            self._graphs.clear()
            self._graphs = None

    def begin(
        self,
        plan: Sequence[MicroBatch],
        latent_factor: int,
        accumulate: int,
        num_samples: int,
        example: Callable[[], Inputs],
    ) -> tuple[StepGraphs | None, str]:
        """Return the graphs of an epoch's micro-batches (None without graphs) and a message, '' if nothing was done.

        latent_factor: pixels per latent. accumulate: micro-batches per step. num_samples: samples in a full step.
        example: returns inputs of any shape. Call between steps only. Raises torch.OutOfMemoryError.
        """
        if self._recorder is None and not self._warms_up:
            return None, ""
        sizes = [(len(m.refs), m.bucket.height // latent_factor, m.bucket.width // latent_factor) for m in plan]
        shapes = shapes_of(sizes, accumulate)

        def run(inputs: Inputs, is_first: bool, is_last: bool) -> MicroResult:
            return micro_step(self._context, inputs, num_samples, is_first, is_last)

        began = time.monotonic()
        if self._recorder is None:
            largest = largest_first(shapes)[0]
            if largest.num_latents <= self._largest_warmed_up:
                return None, ""
            self._largest_warmed_up = largest.num_latents
            with self._context.dry_run():
                run(blank(example(), largest), largest.is_first, True)
            return None, f"warmed up with the largest batch, {largest}, in {time.monotonic() - began:.1f} s"
        if self._graphs is None or num_samples != self._num_samples:
            if self._graphs is not None:
                self._graphs.clear()
            self._graphs = StepGraphs(run, self._context.optimizer, self._recorder)
            self._num_samples = num_samples
        num = self._graphs.prepare(shapes, example())
        message = f"captured {num} batch shapes as CUDA graphs in {time.monotonic() - began:.1f} s" if num else ""
        return self._graphs, message


def graph_capture(context: StepContext, with_graphs: bool) -> GraphCapture:
    """Return the GraphCapture of a run on its device."""
    recorder = CudaRecorder(context.device) if with_graphs else None
    return GraphCapture(context, recorder, warms_up=context.device.type == "cuda")
