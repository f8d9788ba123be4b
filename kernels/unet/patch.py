"""The swap into a diffusers UNet: `apply(unet)` lets its modules run on our kernels, `remove(unet)` gives it back.

No Parameter is made, renamed or moved to another module: state dict, optimizer and checkpoints are the same with the patch
and without, and either resumes from the other. What changes is the class of the modules that are known (their forward
pass), the order of convolution weights in memory (channels-last), and where weights that are projected together lie (side
by side). A module that is not known in every detail is left as it is, and named.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from safelight.kernels.ops.packed_linear import adjacent, pack, unpack
from safelight.kernels.unet.attention import AttentionChoice, attention_cases, choose_attention
from safelight.kernels.unet.patched_resnet import (
    Passed,
    PatchedConvIn,
    PatchedConvOut,
    PatchedResnetBlock,
    PatchedUpsample,
    Swapped,
    TimeProjections,
    is_norm,
    is_plain_conv,
    time_parameters,
)
from safelight.kernels.unet.patched_transformer import (
    PatchedTransformer,
    PatchedTransformerBlock,
    PatchedUNet,
    qkv_parameters,
    text_parameters,
)

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# blocks that hand time embedding and text on as they are
KNOWN_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D")
# of one product for keys and values: its weights' gradient is there at once, at the end of the backward pass
MAX_TEXT_BYTES = 64 << 20


@functools.cache
def _patches() -> dict[type[nn.Module], type[Swapped]]:
    """Return what takes the place of which of diffusers' classes."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    return {
        ResnetBlock2D: PatchedResnetBlock,
        Transformer2DModel: PatchedTransformer,
        BasicTransformerBlock: PatchedTransformerBlock,
        Upsample2D: PatchedUpsample,
    }


@functools.cache
def _class(patched: type[Swapped], original: type[nn.Module]) -> type:
    # it goes by the original's name, which save_pretrained writes and diffusers reads back
    return type(original.__name__, (patched, original), {"original": original})


def _swap(module: nn.Module, patched: type[Swapped]) -> None:
    module.__class__ = _class(patched, type(module))


@dataclass(frozen=True)
class Patch:
    """What `apply` did. swapped: (name, class) of each module that runs on kernels.

    refused: (name, why) of each that could have been swapped but for a detail; left: (name, class) of the rest that has
    Parameters. packed: (what, tensors, bytes) of weights that lie side by side.
    """

    swapped: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    packed: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        counts = Counter(kind for _, kind in self.swapped)
        text = "kernels in " + ", ".join(f"{n} {kind}" for kind, n in counts.items())
        refused = "".join(f"; not in {name}, {why}" for name, why in self.refused)
        return text + refused + (f"; {len(self.left)} other modules as they are" if self.left else "")


def is_wanted(setting: str, device: torch.device) -> bool:
    """Return whether `train.kernels` = auto | on | off wants the patch on a device: auto on a GPU alone.

    On a CPU the kernels' references stand in, which are slower than PyTorch's own operators.
    """
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def is_patched(unet: nn.Module) -> bool:
    """Return whether `apply` was called on a UNet."""
    return isinstance(unet, PatchedUNet)


def apply(unet: UNet2DConditionModel, choice: AttentionChoice | None = None, *, recompute: bool = False) -> Patch:
    """Let a UNet run on our kernels, in place, and return what was swapped. Call `repack` where its weights move later.

    choice: the attention to run; probed here if None. recompute: feed-forward blocks keep nothing between their two
    products, for one product more in the backward pass. Raises ValueError for what is no UNet2DConditionModel, or is
    patched already.
    """
    from diffusers import UNet2DConditionModel

    if type(unet) is not UNet2DConditionModel:
        what = "patched already" if is_patched(unet) else f"a {type(unet).__name__}"
        raise ValueError(f"the UNet is {what}; kernels.patch.apply takes an unpatched UNet2DConditionModel")
    first = next(unet.parameters())
    if choice is None:
        choice = choose_attention(first.device, first.dtype, attention_cases(unet))
    swapped, refused = [], []
    for name, module in unet.named_modules():
        patched = _patches().get(type(module))
        if patched is None:
            continue
        why = patched.refusal(module)
        if why:
            refused.append((name, why))
            continue
        swapped.append((name, type(module).__name__))
        _swap(module, patched)
    _swap(unet, PatchedUNet)
    swapped += _patch_ends(unet)
    for module in unet.modules():
        if isinstance(module, PatchedTransformerBlock):
            module.choice, module.recompute = choice, recompute
        if isinstance(module, PatchedTransformer) and isinstance(module.transformer_blocks[0], PatchedTransformerBlock):
            # in a tuple: the projection keeps its one place in the state dict
            module.transformer_blocks[0].before = (module.proj_in,)
    _number(unet)
    repack(unet)
    _to_channels_last(unet)
    told = tuple(name + "." for name, _ in [*swapped, *refused])
    left = [
        (name, type(module).__name__)
        for name, module in unet.named_modules()
        if next(module.parameters(recurse=False), None) is not None and not f"{name}.".startswith(told)
    ]
    packed = [(what, len(group), sum(p.numel() * p.element_size() for p in group)) for what, group in _groups(unet)]
    return Patch(tuple(swapped), tuple(refused), tuple(left), tuple(packed))


def _patch_ends(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Swap the first convolution, and the last with the norm and activation before it; yield what was swapped."""
    if is_plain_conv(unet.conv_in, unet.conv_in.kernel_size[0]):
        _swap(unet.conv_in, PatchedConvIn)
        yield "conv_in", "Conv2d"
    norm, act, conv = unet.conv_norm_out, unet.conv_act, unet.conv_out
    if norm is not None and is_norm(norm, nn.GroupNorm) and type(act) is nn.SiLU and is_plain_conv(conv, 3):
        _swap(norm, Passed), _swap(act, Passed), _swap(conv, PatchedConvOut)
        # in a tuple: the norm keeps its one place in the state dict
        conv.norm_before = (norm,)
        yield "conv_norm_out", "GroupNorm"
        yield "conv_out", "Conv2d"


def _number(unet: nn.Module) -> None:
    """Tell modules their place among what a step projects once, if that may stand in for time embedding and text."""
    resnets = [m for m in unet.modules() if isinstance(m, PatchedResnetBlock)]
    blocks = [m for m in unet.modules() if isinstance(m, PatchedTransformerBlock)]
    is_known = _is_known(unet)
    if is_known and unet.time_embed_act is None:
        for index, resnet in enumerate(resnets):
            resnet.time_index = index
        unet.time_embed_act = TimeProjections(resnets)
    unet.text_groups = tuple(map(tuple, _text_groups(blocks))) if is_known else ()
    for index, block in enumerate(block for group in unet.text_groups for block in group):
        block.text_index = index


def _groups(unet: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield (what, Parameters) of everything that lies side by side in a patched UNet."""
    blocks = [m for m in unet.modules() if isinstance(m, PatchedTransformerBlock)]
    for block in blocks:
        yield "q, k, v of a self-attention", qkv_parameters(block)
    if isinstance(unet.time_embed_act, TimeProjections):
        weights, *biases = time_parameters(unet.time_embed_act.blocks)
        yield "time embeddings of a step", weights
        for group in biases:
            yield "biases of time embeddings", group
    for group in unet.text_groups:
        yield "keys and values of a step's text", text_parameters(group)
    if not unet.text_groups:
        for block in blocks:
            yield "keys and values of a cross-attention", text_parameters([block])


def shared_products(unet: nn.Module) -> dict[str, str]:
    """Return parameter name -> product, of Parameters that blocks share a product for; empty if the UNet is not patched.

    Their gradients come together, at the end of the backward pass, and not with their block's.
    """
    if not is_patched(unet):
        return {}
    found: dict[nn.Parameter, str] = {}
    if isinstance(unet.time_embed_act, TimeProjections):
        for group in time_parameters(unet.time_embed_act.blocks):
            found |= dict.fromkeys(group, "time projections")
    for index, blocks in enumerate(unet.text_groups):
        found |= dict.fromkeys(text_parameters(blocks), f"text projections {index}")
    return {name: found[p] for name, p in unet.named_parameters() if p in found}


def repack(unet: nn.Module) -> None:
    """Lay weights side by side again, where something gave them other memory: an optimizer that brings them to 16 bits.

    Whatever keeps their addresses or detached views must be made after it.
    """
    for _, parameters in _groups(unet):
        if adjacent(parameters, 0) is None:
            pack(parameters)


def _is_known(unet: nn.Module) -> bool:
    """Return whether nothing but swapped modules sees the time embedding and the text.

    Only then may what a step projects once stand in their place.
    """
    from diffusers.models.unets import unet_2d_blocks

    parts = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]
    attentions = [a for part in parts for a in getattr(part, "attentions", ())]
    return (
        all(type(part) in [getattr(unet_2d_blocks, name) for name in KNOWN_BLOCKS] for part in parts)
        and all(isinstance(resnet, PatchedResnetBlock) for part in parts for resnet in part.resnets)
        and all(isinstance(a, PatchedTransformer) for a in attentions)
        and all(isinstance(block, PatchedTransformerBlock) for a in attentions for block in a.transformer_blocks)
    )


def _text_groups(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Return the blocks whose keys and values are one product: of one text width, up to MAX_TEXT_BYTES of weights."""
    groups: list[list[nn.Module]] = []
    room, width = 0, 0
    for block in blocks:
        weights = text_parameters([block])
        size = sum(w.numel() * w.element_size() for w in weights)
        if not groups or size > room or weights[0].shape[1] != width:
            groups.append([])
            room, width = MAX_TEXT_BYTES, weights[0].shape[1]
        groups[-1].append(block)
        room -= size
    return groups


@torch.no_grad()
def _to_channels_last(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.detach().contiguous(memory_format=torch.channels_last)


def remove(unet: nn.Module) -> None:
    """Give the original UNet back, with the weights as they are now, contiguous and apart. Nothing if it is not patched."""
    if not is_patched(unet):
        return
    if isinstance(unet.time_embed_act, TimeProjections):
        del unet.time_embed_act
        unet.time_embed_act = None
    del unet.text_groups
    for module in unet.modules():
        for name in ("norm_before", "before", "time_index", "text_index", "choice", "recompute"):
            module.__dict__.pop(name, None)
        if isinstance(module, Swapped):
            module.__class__ = type(module).original
    unpack(list(unet.parameters()))
