"""Activation checkpointing of a diffusers UNet, patched or not: what is kept for the backward pass, what is made again.

    none        all that autograd saves. A patched UNet's functions save norms' inputs and no outputs of norms or
                activations: less than selective checkpointing keeps of an original
    selective   outputs of convolutions, matrix products and attention are kept, the rest of every block is made again: no
                matrix work. Of a patched UNet all that is left to drop is the feed-forward's projection, which costs
                its product again
    full        the inputs of every block are kept, blocks run again

Blocks are diffusers': residual blocks and transformer blocks. Recomputed values have the same bits, so gradients do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from safelight.kernels.attention import attention_operators
from safelight.kernels.patched_resnet import Swapped
from safelight.kernels.patched_transformer import PatchedTransformerBlock

MODES = ("none", "selective", "full")


@functools.cache
def _kept() -> frozenset:
    aten = torch.ops.aten
    products = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
    return frozenset(op.default for op in products) | frozenset(attention_operators())


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    keep = operator in _kept() or "attention" in operator.name()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _full(keep_random_state: bool) -> Callable:
    def run(block: nn.Module, *args) -> Tensor:
        return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=keep_random_state)

    return run


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
    if mode == "none":
        unet.disable_gradient_checkpointing()
        return
    # the generator's state is read from the device and put back at every block, for dropout alone
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in unet.modules())
    unet.enable_gradient_checkpointing((_full if mode == "full" else _selective)(has_dropout))
