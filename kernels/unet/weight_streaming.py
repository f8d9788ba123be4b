"""Streams a UNet's weights from host memory (kernels/optim/streamed_weights.py): which ones, and when they are taken.

Streamed are the large weights of residual and transformer blocks, except those that several blocks share in one product
(kernels/unet/patch.py). A block is taken before its forward pass: in training, when checkpointing runs it again, in
validation and in sampling. Of a weight that autograd saves for the backward pass only its place is kept, and its block
is taken when it is unpacked. That works in every checkpointing mode: inside a recomputed block, checkpointing's own
hooks keep a view of the slot, which is valid because a block's backward pass ends before another block is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safelight.kernels.moment_blocks import MIN_8BIT_ELEMENTS
from safelight.kernels.optim.streamed_weights import StreamedWeights
from safelight.kernels.unet.activation_offload import Offload, offload_of, without_graph
from safelight.kernels.unet.patch import shared_projections


def streamed_blocks(unet: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return (block, its streamed weights) of each residual and transformer block that has any, trained or not."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    shared = shared_projections(unet)
    stay = {p for name, p in unet.named_parameters() if name in shared}
    found = []
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D | BasicTransformerBlock):
            large = [p for p in block.parameters() if p.numel() >= MIN_8BIT_ELEMENTS]
            if weights := [p for p in large if p not in stay]:
                found.append((block, weights))
    return found


@dataclass(frozen=True, slots=True)
class _Saved:
    """A tensor saved for backward that is a view of a block's slot."""

    block: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class WeightStream:
    """Takes a UNet's blocks as its passes need them, from its construction on. weights: by block."""

    def __init__(self, unet: nn.Module, blocks: list[nn.Module], weights: StreamedWeights):
        self._weights = weights
        self._offload: Offload | None = None
        self._context: torch.autograd.graph.saved_tensors_hooks | None = None
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, index=index: weights.take(index))
        unet.register_forward_pre_hook(self._begin)
        unet.register_forward_hook(self._end, always_call=True)

    def _begin(self, unet: nn.Module, *_) -> None:
        self._weights.begin_pass()
        if torch.is_grad_enabled():
            self._offload = offload_of(unet)
            self._context = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            self._context.__enter__()

    def _end(self, *_) -> None:
        if self._context is not None:
            self._context.__exit__()
            self._context = None

    def _pack(self, x: Tensor) -> object:
        block = self._weights.block_in(x)
        if block is not None:
            return _Saved(block, x.shape, x.stride(), x.storage_offset())
        # autograd calls the innermost hooks alone
        return without_graph(x) if self._offload is None else self._offload.pack(x)

    def _unpack(self, saved: object) -> Tensor:
        if not isinstance(saved, _Saved):
            return Offload.unpack(saved)
        self._weights.take(saved.block)
        return self._weights.view_of_taken(saved.size, saved.stride, saved.offset)
