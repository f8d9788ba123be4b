"""A UNet's forward pass as a CUDA graph, while pictures are drawn.

It is captured once for a shape of batch and replayed in every denoising step by a single host call, where it would be a
thousand launches. Inputs are copied to fixed addresses; the result is overwritten by the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from safelight.trainer.step.cuda_graphs import CudaRecorder, Recorder
from safelight.units import GIB

Inputs = tuple[Tensor, Tensor, Mapping]


@dataclass(frozen=True)
class _Graph:
    """inputs: tensors the graph reads. replay: runs it. result: the tensor it writes."""

    inputs: Inputs
    replay: Callable[[], None]
    result: Tensor


class UNetGraphs:
    """Calls a UNet by the graph of its forward pass, of one shape at a time.

    recorder: captures the graph. has_room: called after a first pass, tells whether the graph may keep what that pass
    has freed; without room the UNet is called without a graph.
    """

    def __init__(self, unet: nn.Module, recorder: Recorder, has_room: Callable[[], bool]):
        self._unet, self._recorder, self._has_room = unet, recorder, has_room
        self._shapes: list[tuple] = []
        self._graph: _Graph | None = None

    def __call__(self, latents: Tensor, timestep: Tensor, arguments: Mapping) -> Tensor:
        """Return what the UNet predicts; valid until the next call. arguments: of its forward pass, besides."""
        inputs = latents, timestep, arguments
        shapes = [(tuple(x.shape), x.dtype) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        if shapes != self._shapes:
            self.release()
            self._graph, self._shapes = self._capture(inputs), shapes
        if self._graph is None:
            return predict(self._unet, *inputs)
        for source, target in zip(tree_leaves(inputs), tree_leaves(self._graph.inputs), strict=True):
            if isinstance(source, Tensor):
                target.copy_(source, non_blocking=True)
        self._graph.replay()
        return self._graph.result

    def _capture(self, inputs: Inputs) -> _Graph | None:
        own: Inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        self._recorder.free_cached_memory()
        self._recorder.warm_up(lambda: predict(self._unet, *own))
        has_room = self._has_room()
        self._recorder.free_cached_memory()
        if not has_room:
            return None
        try:
            replay, result = self._recorder.capture(lambda: predict(self._unet, *own))
        except torch.OutOfMemoryError:
            # the caller goes on with fewer pictures, and captures again
            self._recorder.forget()
            raise
        return _Graph(own, replay, result)

    def release(self) -> None:
        """Free the graph and its memory. The next call captures it again."""
        if self._graph is not None:
            self._graph = None
            self._recorder.forget()
            self._recorder.free_cached_memory()
        self._shapes = []


def predict(unet: nn.Module, latents: Tensor, timestep: Tensor, arguments: Mapping) -> Tensor:
    """Return what a UNet predicts, without a graph. Arguments as of UNetGraphs."""
    return unet(latents, timestep, **arguments).sample


def unet_graphs(unet: nn.Module, device: torch.device) -> UNetGraphs:
    """Return the graphs of a UNet on a GPU."""

    def has_room() -> bool:
        # what torch has cached is what the pass before took; decoding needs about as much beside the graph
        taken = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] >= max(taken, GIB)

    return UNetGraphs(unet, CudaRecorder(device), has_room)
