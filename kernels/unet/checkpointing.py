"""Activation checkpointing of a diffusers UNet, patched or not: what is kept for the backward pass, what is made again.

    none        all that autograd saves. A patched UNet's functions save norms' inputs and no outputs of norms or
                activations: less than selective checkpointing keeps of an original
    selective   outputs of convolutions, matrix products and attention are kept, the rest of every block is made again: no
                matrix work. Of a patched UNet all that is left to drop is the feed-forward's projection, which costs
                its product again
    full        the inputs of every block are kept, blocks run again
    offload     as full, and these inputs, with all that is saved between blocks, wait in host memory (activation_offload.py)

Blocks are diffusers': residual blocks and transformer blocks. Recomputed values have the same bits, so gradients do.
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
from safelight.kernels.unet.patched_resnet import PatchedResnetBlock, Swapped
from safelight.kernels.unet.patched_transformer import PatchedTransformerBlock

# the most memory first
MODES = ("none", "selective", "full", "offload")


@functools.cache
def _kept() -> frozenset:
    aten = torch.ops.aten
    products = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
    return frozenset(op.default for op in products) | frozenset(attention_operators())


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    keep = operator in _kept() or "attention" in operator.name()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _own(block: nn.Module, args: tuple) -> tuple:
    """Return a block's arguments with its own piece alone of what a step projected for all blocks."""
    if isinstance(block, PatchedResnetBlock | PatchedTransformerBlock):
        # absent where a UNet's blocks project for themselves
        index = getattr(block, "time_index" if isinstance(block, PatchedResnetBlock) else "text_index", None)
        return tuple({index: x[index]} if isinstance(x, tuple | list) else x for x in args)
    return args


def _full(keep_random_state: bool) -> Callable:
    def run(block: nn.Module, *args) -> Tensor:
        # every tensor an argument of its own: these are saved as autograd saves tensors, where hooks reach them
        leaves, spec = tree_flatten(_own(block, args))
        again = functools.partial(_call, block, spec)
        return checkpoint(again, *leaves, use_reentrant=False, preserve_rng_state=keep_random_state)

    return run


def _call(block: nn.Module, spec, *leaves) -> Tensor:
    return block(*tree_unflatten(leaves, spec))


def _selective(keep_random_state: bool) -> Callable:
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)

    def run(block: nn.Module, *args) -> Tensor:
        if isinstance(block, Swapped):
            return block(*args)
        return checkpoint(
            block.__call__, *args, use_reentrant=False, preserve_rng_state=keep_random_state, context_fn=contexts
        )

    return run


def apply_checkpointing(unet: nn.Module, mode: str) -> None:
    """Let a UNet2DConditionModel checkpoint its activations; the mode stays until another is set.

    Set it again after kernels.patch.apply, whose `recompute` it decides. Raises ValueError for an unknown mode.
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
    # the generator's state is read from the device and put back at every block, for dropout alone
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in unet.modules())
    unet.enable_gradient_checkpointing((_selective if mode == "selective" else _full)(has_dropout))
