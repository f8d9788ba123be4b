"""Activation checkpointing of a diffusers UNet, patched or not: what is saved for backward and what is recomputed.

    none        Everything autograd saves. A patched UNet saves the norms' inputs but no outputs of norms or
    activations,
                which is already less than selective checkpointing saves in an unpatched one.
    selective   Outputs of convolutions, matmuls and attention are saved; the rest of each block is recomputed, without
                any matmul. In a patched UNet only the feed-forward's first projection is left to drop, and recomputing
                it costs its matmul.
    full        Only each block's inputs are saved; backward runs the block again.
    offload     As full, but the blocks' inputs, and whatever is saved between blocks, wait in host memory
                (kernels/unet/activation_offload.py).

Blocks are diffusers' residual and transformer blocks. Recomputed values have the same bits, and so do gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from safelight.kernels.unet.activation_offload import set_offload
from safelight.kernels.unet.attention import attention_operators
from safelight.kernels.unet.patched_resnet import PatchedModule, PatchedResnetBlock
from safelight.kernels.unet.patched_transformer import PatchedTransformerBlock

# from most to least memory
MODES = ("none", "selective", "full", "offload")


@functools.cache
def _saved_operators() -> frozenset:
    aten = torch.ops.aten
    matmuls = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
    return frozenset(op.default for op in matmuls) | frozenset(attention_operators())


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    is_saved = operator in _saved_operators() or "attention" in operator.name()
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def _own_arguments(block: nn.Module, args: tuple) -> tuple:
    """Return a block's arguments with the shared projections reduced to the block's own."""
    if isinstance(block, PatchedResnetBlock | PatchedTransformerBlock):
        # absent if the UNet does not share projections
        index = getattr(block, "time_index" if isinstance(block, PatchedResnetBlock) else "text_index", None)
        return tuple({index: x[index]} if isinstance(x, tuple | list) else x for x in args)
    return args


def _full(keep_random_state: bool) -> Callable:
    def run(block: nn.Module, *args) -> Tensor:
        # pass every tensor as an argument of its own: checkpoint then saves it through autograd, where hooks see it
        leaves, spec = tree_flatten(_own_arguments(block, args))
        call = functools.partial(_call, block, spec)
        return checkpoint(call, *leaves, use_reentrant=False, preserve_rng_state=keep_random_state)

    return run


def _call(block: nn.Module, spec, *leaves) -> Tensor:
    return block(*tree_unflatten(leaves, spec))


def _selective(keep_random_state: bool) -> Callable:
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)

    def run(block: nn.Module, *args) -> Tensor:
        # a patched block saves its norms' inputs only; `recompute` is all that is left to do
        if isinstance(block, PatchedModule):
            return block(*args)
        return checkpoint(
            block.__call__, *args, use_reentrant=False, preserve_rng_state=keep_random_state, context_fn=contexts
        )

    return run


def apply_checkpointing(unet: nn.Module, mode: str) -> None:
    """Set the checkpointing mode of a UNet2DConditionModel, which holds until another is set.

    Call it again after kernels.unet.patch.apply: it sets the patched blocks' `recompute`. Raises ValueError for an
    unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"checkpointing {mode!r} is unknown; use {', '.join(MODES)}")
    for module in unet.modules():
        if isinstance(module, PatchedTransformerBlock):
            module.recompute = mode == "selective"
    set_offload(unet, mode == "offload")
    if mode == "none":
        unet.disable_gradient_checkpointing()
        return
    # preserving the random state reads it from the device at every block, so do it only if there is dropout
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in unet.modules())
    unet.enable_gradient_checkpointing((_selective if mode == "selective" else _full)(has_dropout))
